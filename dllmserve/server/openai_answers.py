"""Answers of the OpenAI endpoints: whole, and as streams of pieces."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request as HttpRequest

from dllmserve import __version__
from dllmserve.async_llm import TextDelta
from dllmserve.outputs import RequestOutput
from dllmserve.server.common import note_runs
from dllmserve.server.failures import as_api_error, log_failure
from dllmserve.server.http.respond import error_object, error_type
from dllmserve.server.service import Run, close_all
from dllmserve.server.sse import event

#: names the software behind an answer; OpenAI's clients show it
FINGERPRINT = f"dllmserve-{__version__}"
DONE = b"data: [DONE]\n\n"


class PromptTokens(BaseModel):
    """More about the tokens of prompts."""

    cached_tokens: int


class UsageAnswer(BaseModel):
    """Tokens, forward passes and waiting time of an answer."""

    prompt_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens: int
    total_tokens: int
    forward_passes: int
    tokens_per_forward: float
    queue_time: float


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: UsageAnswer


class CompletionChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: None
    finish_reason: Literal["stop", "length"]


class CompletionAnswer(_Answer):
    """Answer of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class AnswerMessage(BaseModel):
    """The model's message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(_Answer):
    """Answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


@dataclass
class Reply:
    """The frame of one answer.

    Attributes:
        chat: /v1/chat/completions, else /v1/completions.
        model: its name.
        choices: answers to each prompt; choice i belongs to prompt i // choices.
        echoes: text before each answer, by prompt; empty without echo.
        include_usage, continuous_usage: whether a stream tells the usage at its end, and in each
            piece.
    """

    chat: bool
    model: str
    choices: int
    echoes: Sequence[str] = ()
    include_usage: bool = False
    continuous_usage: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        prefix = "chatcmpl" if self.chat else "cmpl"
        self.id = f"{prefix}-{secrets.token_hex(12)}"

    def whole(self, runs: Sequence[Run], outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for index, output in enumerate(outputs):
            choice: dict[str, Any] = {"index": index}
            if self.chat:
                message = {"role": "assistant", "content": output.text, "refusal": None}
                choice["message"] = message
            else:
                choice["text"] = self.echo(index) + output.text
            reason = reason_of(runs[index], output)
            choices.append(choice | {"logprobs": None, "finish_reason": reason})
        kind = "chat.completion" if self.chat else "text_completion"
        return self._frame(kind, choices) | {"usage": self.usage(runs, outputs)}

    def echo(self, index: int) -> str:
        """The prompt of a choice, if it is echoed."""
        return self.echoes[index // self.choices] if self.echoes else ""

    def usage(
        self, runs: Sequence[Run], outputs: Sequence[RequestOutput], unfinished: int = 0
    ) -> dict[str, Any]:
        """Tokens of all choices; each prompt counts once. Forwards come with the last output.

        Args:
            runs: all runs.
            outputs: outputs of the runs that are finished.
            unfinished: tokens that the other runs have given out so far.
        """
        prompt = sum(run.request.prompt_len for run in runs[:: self.choices])
        cached = sum(output.cached_tokens for output in outputs[:: self.choices])
        completion = sum(output.completion_tokens for output in outputs) + unfinished
        forwards = sum(output.forward_passes for output in outputs)
        waits = [run.queue_time for run in runs if run.queue_time is not None]
        found = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "queue_time": round(max(waits, default=0.0), 6),
        }
        if len(outputs) < len(runs):
            return found  # what only outputs tell is not known of all of them
        return found | {
            "prompt_tokens_details": {"cached_tokens": min(cached, prompt)},
            "forward_passes": forwards,
            "tokens_per_forward": round(completion / forwards, 3) if forwards else 0.0,
        }

    def chunk(
        self, index: int, text: str | None, reason: str | None = None, *, first: bool = False
    ) -> dict[str, Any]:
        """One piece of a stream."""
        choice: dict[str, Any] = {"index": index}
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            if text is not None:
                delta["content"] = text
            choice["delta"] = delta
        else:
            choice["text"] = text or ""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        frame = self._frame(kind, [choice | {"logprobs": None, "finish_reason": reason}])
        return frame | {"usage": None} if self.include_usage else frame

    def last(self, runs: Sequence[Run], outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The piece without choices that tells the usage."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._frame(kind, []) | {"usage": self.usage(runs, outputs)}

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        }


def reason_of(run: Run, output: RequestOutput) -> str:
    """Why an answer ended.

    JSON under a schema, and one of several texts, are whole even where they fill all of their
    length, and clients take "length" for a part.
    """
    params = run.request.params
    whole = params.json_schema is not None or params.choice is not None
    return "stop" if whole else output.finish_reason


async def stream(reply: Reply, runs: list[Run], http: HttpRequest) -> AsyncGenerator[bytes, None]:
    """Events with pieces of committed text. An error after the start is an event as well."""
    outputs: dict[int, RequestOutput] = {}
    sent: dict[int, int] = {}

    def piece(*about: Any, first: bool = False) -> bytes:
        chunk = reply.chunk(*about, first=first)
        if reply.continuous_usage:
            chunk["usage"] = reply.usage(runs, list(outputs.values()), sum(sent.values()))
        return event(chunk)

    try:
        for index in range(len(runs)):
            if reply.chat:
                yield piece(index, "", first=True)
            elif reply.echo(index):
                yield piece(index, reply.echo(index))
        async with aclosing(_merged(runs)) as merged:
            async for index, delta in merged:
                if delta.output is None:
                    sent[index] = sent.get(index, 0) + delta.tokens
                else:
                    outputs[index] = delta.output
                    sent.pop(index, None)
                if delta.text:
                    yield piece(index, delta.text)
                if delta.output is not None:
                    yield piece(index, None, reason_of(runs[index], delta.output))
        if reply.include_usage:
            yield event(reply.last(runs, [outputs[i] for i in sorted(outputs)]))
    except Exception as failure:
        log_failure(failure)
        error = as_api_error(failure)
        kind = error_type(error.status)
        yield event(error_object(error.message, type=kind, code=error.code, param=error.param))
    finally:
        close_all(runs)
        note_runs(http, runs, sum(o.completion_tokens for o in outputs.values()))
    yield DONE


async def _merged(runs: Sequence[Run]) -> AsyncGenerator[tuple[int, TextDelta], None]:
    """Pieces of text of all runs, with the run's index; the first failure ends them."""
    found: asyncio.Queue[tuple[int, TextDelta] | Exception | None] = asyncio.Queue()

    async def read(index: int, run: Run) -> None:
        try:
            async for delta in run.text():
                found.put_nowait((index, delta))
            found.put_nowait(None)
        except Exception as error:  # the reader of the queue raises it
            found.put_nowait(error)

    tasks = [asyncio.create_task(read(index, run)) for index, run in enumerate(runs)]
    try:
        left = len(tasks)
        while left:
            item = await found.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
