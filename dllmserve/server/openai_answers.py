"""Answers of the OpenAI endpoints: whole, and as streams of pieces."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest

from dllmserve import __version__
from dllmserve.engine.tokenizer import Tokenizer
from dllmserve.outputs import RequestOutput, TextDelta, TokenLogprob
from dllmserve.server.common import note_runs
from dllmserve.server.failures import as_api_error, log_failure
from dllmserve.server.http.respond import error_object, error_type
from dllmserve.server.openai_logprobs import AnswerLogprobs, ChatLogprobs, CompletionLogprobs
from dllmserve.server.service import Run, close_all
from dllmserve.server.sse import event
from dllmserve.server.tool_calls import Calls

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
    edits: int
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
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionAnswer(_Answer):
    """Answer of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class AnswerFunction(BaseModel):
    """A function that the model calls."""

    name: str
    arguments: str = Field(description="A JSON object, valid by the function's parameters.")


class AnswerCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: AnswerFunction


class AnswerMessage(BaseModel):
    """The model's message: a text, calls of tools, or both."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[AnswerCall] | None = Field(
        default=None, description="Not there without calls."
    )
    function_call: AnswerFunction | None = Field(
        default=None, description="In place of tool_calls, for requests with functions."
    )


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"]


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
        calls: how answers call tools; None without tools.
        whole_texts: texts are whole even where they fill all of their length: JSON under a schema,
            and one of several texts. Clients take "length" for a part.
        top_logprobs: how many of the likeliest tokens are told beside each; None: no
            log-probabilities.
        tokenizer: for the texts of tokens.
    """

    chat: bool
    model: str
    choices: int
    echoes: Sequence[str] = ()
    include_usage: bool = False
    continuous_usage: bool = False
    calls: Calls | None = None
    whole_texts: bool = False
    top_logprobs: int | None = None
    tokenizer: Tokenizer | None = None
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
            message: dict[str, Any] = {}
            if self.calls is not None:
                message = self.calls.message(output.text)
            elif self.chat:
                message = {"role": "assistant", "content": output.text, "refusal": None}
            if self.chat:
                choice["message"] = message
            else:
                choice["text"] = self.echo(index) + output.text
            called = message.get("tool_calls") or message.get("function_call")
            told = self.logprobs(index)
            length = len(self.echo(index)) + len(output.text)
            choice["logprobs"] = told and told.add(output.logprobs or (), length)
            choices.append(choice | {"finish_reason": self.reason(output, called)})
        kind = "chat.completion" if self.chat else "text_completion"
        return self._frame(kind, choices) | {"usage": self.usage(runs, outputs)}

    def echo(self, index: int) -> str:
        """The prompt of a choice, if it is echoed."""
        return self.echoes[index // self.choices] if self.echoes else ""

    def reason(self, output: RequestOutput, called: object) -> str:
        """Why an answer ended."""
        if called and self.calls is not None:
            return self.calls.called
        return "stop" if self.whole_texts else output.finish_reason

    def logprobs(self, index: int) -> AnswerLogprobs | None:
        """Tells log-probabilities of an answer, if they were asked for."""
        if self.top_logprobs is None:
            return None
        offset = len(self.echo(index))
        return AnswerLogprobs(self.tokenizer, chat=self.chat, top=self.top_logprobs, offset=offset)

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
            "edits": sum(output.edits for output in outputs),
        }

    def chunk(
        self,
        index: int,
        delta: dict[str, Any],
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One piece of a stream.

        Args:
            index: of the choice.
            delta: of a chat; a completion has its "content" as its text.
            reason: why the answer ended, in its last piece.
            logprobs: of the tokens in it.
        """
        told = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        choice = {"index": index, **told, "logprobs": logprobs, "finish_reason": reason}
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        frame = self._frame(kind, [choice])
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


class _Choice:
    """The stream of one choice: what is told for each piece of its text."""

    def __init__(self, reply: Reply, index: int) -> None:
        self._reply, self._index = reply, index
        self._reader = None if reply.calls is None else reply.calls.reader()
        self._called = False
        self._logprobs = reply.logprobs(index)
        self._untold: list[TokenLogprob] = []

    def first(self) -> list[Any]:
        """Arguments of :meth:`Reply.chunk` for what comes before the answer."""
        if self._reply.chat:
            # calls have no content beside them
            content = "" if self._reader is None else None
            return [(self._index, {"role": "assistant", "content": content})]
        echo = self._reply.echo(self._index)
        return [(self._index, {"content": echo})] if echo else []

    def told(self, delta: TextDelta) -> list[Any]:
        """Arguments of :meth:`Reply.chunk` for a piece."""
        made: list[Any] = [[self._index, found, None] for found in self._deltas(delta)]
        if delta.output is not None:
            made.append([self._index, {}, self._reply.reason(delta.output, self._called)])
        self._untold += delta.logprobs or ()
        if made and self._logprobs is not None:
            # a text that may become a call is held back, and its tokens with it
            end = None
            if delta.output is not None:
                end = len(self._reply.echo(self._index)) + len(delta.output.text)
            made[0].append(self._logprobs.add(self._untold, end))
            self._untold = []
        return made

    def _deltas(self, delta: TextDelta) -> list[dict[str, Any]]:
        if self._reader is None or self._reply.calls is None:
            return [{"content": delta.text}] if delta.text else []
        pieces = self._reader.add(delta.text)
        if delta.output is not None:
            pieces += self._reader.finish()
        self._called = self._called or any(piece.kind == "call" for piece in pieces)
        return [self._reply.calls.delta(piece) for piece in pieces]


async def stream(reply: Reply, runs: list[Run], http: HttpRequest) -> AsyncGenerator[bytes, None]:
    """Events with pieces of committed text. An error after the start is an event as well."""
    outputs: dict[int, RequestOutput] = {}
    sent: dict[int, int] = {}
    choices = [_Choice(reply, index) for index in range(len(runs))]

    def piece(about: Any) -> bytes:
        chunk = reply.chunk(*about)
        if reply.continuous_usage:
            chunk["usage"] = reply.usage(runs, list(outputs.values()), sum(sent.values()))
        return event(chunk)

    try:
        for about in (told for choice in choices for told in choice.first()):
            yield piece(about)
        async with aclosing(_merged(runs)) as merged:
            async for index, delta in merged:
                if delta.output is None:
                    sent[index] = sent.get(index, 0) + delta.tokens
                else:
                    outputs[index] = delta.output
                    sent.pop(index, None)
                for about in choices[index].told(delta):
                    yield piece(about)
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
