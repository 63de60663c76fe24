"""Answers of /v1/responses: one writer makes the items of a response, and its events by the way."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from starlette.requests import Request as HttpRequest

from dllmserve.outputs import RequestOutput, TextDelta
from dllmserve.server.common import note_runs
from dllmserve.server.failures import as_api_error, log_failure
from dllmserve.server.openai_answers import Reply
from dllmserve.server.responses_bodies import ResponsesRequest, SchemaFormat
from dllmserve.server.service import Run
from dllmserve.server.sse import event
from dllmserve.server.tool_calls import Call, Piece

Event = dict[str, Any]


def frame_of(body: ResponsesRequest, id: str, model: str) -> dict[str, Any]:
    """A response that has just begun: what was asked for, and nothing of the answer."""
    form: Any = {"type": "text"}
    if body.text is not None and body.text.format is not None:
        form = body.text.format.model_dump(exclude_none=True, by_alias=True)
        if isinstance(body.text.format, SchemaFormat):
            form = {"name": "answer", **form}
    choice = body.tool_choice
    return {
        "id": id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": form},
        "tool_choice": choice
        if isinstance(choice, str)
        else choice.model_dump()
        if choice
        else "auto",
        "tools": [
            {"strict": True, "parameters": None, **tool.model_dump(), "type": "function"}
            for tool in body.tools or ()
        ],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": None,
        "metadata": body.metadata or {},
    }


class ResponseWriter:
    """Makes a response of an answer that comes in pieces.

    Args:
        frame: the response so far; it is completed.
        reply: how the answer is read.

    Attributes:
        response: the response.
    """

    def __init__(self, frame: dict[str, Any], reply: Reply) -> None:
        self.response = frame
        self._reply = reply
        self._reader = None if reply.calls is None else reply.calls.reader()
        self._logprobs = reply.logprobs(0)
        self._output: list[dict[str, Any]] = frame["output"]
        self._open = False
        self._called = False
        self._number = 0

    def begin(self) -> Iterator[Event]:
        """Events before the answer."""
        yield self._event("response.created", response=self.response)
        yield self._event("response.in_progress", response=self.response)

    def add(self, delta: TextDelta) -> Iterator[Event]:
        """Events of a piece of the answer; of the last one up to the end of its last item."""
        pieces = [Piece("text", delta.text)] if delta.text else []
        if self._reader is not None:
            pieces = self._reader.add(delta.text)
            if delta.output is not None:
                pieces += self._reader.finish()
        logprobs: list[Any] = []
        if self._logprobs is not None:
            logprobs = self._logprobs.add(delta.logprobs or ())["content"]
        for piece in pieces:
            if piece.kind == "call":
                yield from self._close()
                yield from self._begin_call(piece.text)
            elif piece.kind == "arguments":
                yield self._grown("response.function_call_arguments.delta", piece.text)
            else:
                yield from self._say(piece.text, logprobs)
                logprobs = []
        if delta.output is not None:
            if not self._output:
                yield from self._say("", [])
            yield from self._close()

    def end(self, output: RequestOutput) -> str:
        """Complete the response. Returns the type of the event that tells it."""
        cut = self._reply.reason(output, self._called) == "length"
        self.response["status"] = "incomplete" if cut else "completed"
        if cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self.response["usage"] = {
            "input_tokens": output.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": output.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": output.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": output.prompt_tokens + output.completion_tokens,
        }
        return "response.incomplete" if cut else "response.completed"

    def last(self, kind: str) -> Event:
        """The event that tells the whole response."""
        return self._event(kind, response=self.response)

    def failed(self, message: str) -> Event:
        """The event of a failure."""
        self.response["status"] = "failed"
        # clients know no other code of a server
        self.response["error"] = {"code": "server_error", "message": message}
        return self._event("response.failed", response=self.response)

    def _event(self, kind: str, **more: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **more}

    def _of_item(self, kind: str, **more: Any) -> Event:
        """An event about the last item."""
        where = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return self._event(kind, **where, **more)

    def _whole_item(self, kind: str) -> Event:
        return self._event(kind, output_index=len(self._output) - 1, item=self._output[-1])

    def _item_id(self, prefix: str) -> str:
        _, _, own = self.response["id"].partition("_")
        return f"{prefix}_{own}{len(self._output):04x}"

    def _begin_call(self, name: str) -> Iterator[Event]:
        call = Call(name, "")
        self._called = self._open = True
        item = {"id": self._item_id("fc"), "type": "function_call", "status": "in_progress"}
        self._output.append({**item, "call_id": call.id, "name": name, "arguments": ""})
        yield self._whole_item("response.output_item.added")

    def _grown(self, kind: str, text: str) -> Event:
        self._output[-1]["arguments"] += text
        return self._of_item(kind, delta=text)

    def _say(self, text: str, logprobs: list[Any]) -> Iterator[Event]:
        if not self._open or self._output[-1]["type"] != "message":
            yield from self._close()
            self._open = True
            item = {"id": self._item_id("msg"), "type": "message", "status": "in_progress"}
            self._output.append({**item, "role": "assistant", "content": []})
            yield self._whole_item("response.output_item.added")
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield self._of_item("response.content_part.added", content_index=0, part=part)
            self._output[-1]["content"] = [{**part, "logprobs": []}]
        if text:
            part = self._output[-1]["content"][0]
            part["text"] += text
            part["logprobs"] += logprobs
            more = {"content_index": 0, "delta": text, "logprobs": logprobs}
            yield self._of_item("response.output_text.delta", **more)

    def _close(self) -> Iterator[Event]:
        """Events of the end of the open item, if there is one."""
        if not self._open:
            return
        self._open, item = False, self._output[-1]
        item["status"] = "completed"
        if item["type"] == "function_call":
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("response.function_call_arguments.done", **told)
        else:
            (part,) = item["content"]
            done = {"content_index": 0, "text": part["text"], "logprobs": part["logprobs"]}
            yield self._of_item("response.output_text.done", **done)
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        yield self._whole_item("response.output_item.done")


async def response_events(
    writer: ResponseWriter, run: Run, http: HttpRequest, keep: Any
) -> AsyncGenerator[bytes, None]:
    """The events of a response, encoded.

    Args:
        writer: makes them.
        run: the answer.
        http: for the log.
        keep: stores the response; awaited before the last event, so that who has read that can go
            on from it.
    """
    output: RequestOutput | None = None
    try:
        for told in writer.begin():
            yield _encoded(told)
        async for delta in run.text():
            for told in writer.add(delta):
                yield _encoded(told)
            output = delta.output or output
        if output is not None:
            kind = writer.end(output)
            await keep(writer.response)
            yield _encoded(writer.last(kind))
    except Exception as failure:
        log_failure(failure)
        error = as_api_error(failure)
        yield _encoded(writer.failed(error.message))
    finally:
        run.close()
        note_runs(http, [run], 0 if output is None else output.completion_tokens)


def _encoded(told: Event) -> bytes:
    return event(told, told["type"])
