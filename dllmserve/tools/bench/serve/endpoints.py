"""The three APIs: how a request looks, and how its answer is read."""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import msgspec

from dllmserve.tools.bench.serve.http import BAD_ANSWER, LOST, HttpClient, Reply
from dllmserve.tools.bench.serve.options import ServeOptions
from dllmserve.tools.bench.serve.outcome import REJECTED, REJECTIONS, Outcome, RequestFailed
from dllmserve.tools.bench.serve.sse import SseParser

BROKEN_STREAM, STREAM_ERROR, FAILED_RESULT = "broken stream", "stream error", "failed result"
#: seconds that the server may hold a question for a result
LONG_POLL = 20
#: seconds between questions to a server that does not hold them
POLL = 0.05
#: seconds that a stream may stay open after its last event
_LINGER = 1.0
#: characters of a server's message that are kept
_MESSAGE = 300


class Api(ABC):
    """One way of asking.

    Args:
        client: of the server.
        options: of the load test.
        model: name in the requests.
    """

    def __init__(self, client: HttpClient, options: ServeOptions, model: str | None) -> None:
        self._client, self._options, self._model = client, options, model

    def body(self, prompt: str, fields: Mapping[str, Any]) -> bytes:
        """A request; the request's own fields win over --body, which wins over the options."""
        return msgspec.json.encode({**self._fields(prompt), **(self._options.body or {}), **fields})

    @abstractmethod
    def _fields(self, prompt: str) -> dict[str, Any]:
        """A request by the options alone."""

    async def _post(
        self, path: str, body: bytes, outcome: Outcome, stream: Reply | None = None
    ) -> Reply:
        """The request that counts: with its moment of sending, and a status that is checked."""
        reply = stream or Reply()
        try:
            await self._client.exchange("POST", path, body, reply)
        except RequestFailed as failure:
            if stream is not None and failure.kind == LOST and reply.status == 200:
                raise RequestFailed(BROKEN_STREAM, failure.message, 200) from failure
            raise
        finally:
            outcome.sent, outcome.status = reply.sent_at, reply.status or None
        _check_status(reply)
        return reply

    @abstractmethod
    async def ask(self, body: bytes, outcome: Outcome) -> None:
        """Send a request, wait for its answer and note moments and counts.

        Raises:
            RequestFailed: there is no answer, or it is not what the API promises.
        """


class OpenAI(Api):
    """``/v1/chat/completions`` or ``/v1/completions``."""

    def _fields(self, prompt: str) -> dict[str, Any]:
        options = self._options
        chat = options.endpoint == "chat"
        asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        sampling = {"max_tokens": options.max_tokens, "temperature": options.temperature}
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": self._model, **asked, **sampling, **(streaming if options.stream else {})}

    async def ask(self, body: bytes, outcome: Outcome) -> None:
        """See :meth:`Api.ask`."""
        chat = self._options.endpoint == "chat"
        path = "/v1/chat/completions" if chat else "/v1/completions"
        if not self._options.stream:
            reply = await self._post(path, body, outcome)
            answer = json_object(reply)
            if not isinstance(answer.get("choices"), list):
                raise RequestFailed(BAD_ANSWER, "an answer without choices", reply.status)
            outcome.finished = asyncio.get_running_loop().time()
            _note_usage(outcome, answer.get("usage"), reply)
            return
        stream = _Stream()
        try:
            reply = await self._post(path, body, outcome, stream.reply)
        finally:
            # a stream that breaks has had a first text nevertheless
            outcome.first_text = stream.first_text
        stream.check()
        outcome.finished = stream.done_at
        _note_usage(outcome, stream.usage, reply)


class Native(Api):
    """``/v1/generate``, then ``/v1/result/{id}`` until the answer is there."""

    def _fields(self, prompt: str) -> dict[str, Any]:
        options = self._options
        return {
            "prompt": prompt,
            "gen_length": options.max_tokens,
            "temperature": options.temperature,
        }

    async def ask(self, body: bytes, outcome: Outcome) -> None:
        """See :meth:`Api.ask`."""
        reply = await self._post("/v1/generate", body, outcome)
        ids = json_object(reply).get("request_ids")
        if not isinstance(ids, list) or len(ids) != 1 or not isinstance(ids[0], (int, str)):
            raise RequestFailed(BAD_ANSWER, "a submission without one request id", reply.status)
        clock = asyncio.get_running_loop().time
        path = f"/v1/result/{ids[0]}?wait={LONG_POLL}&details=true"
        while True:
            asked = clock()
            reply = Reply()
            await self._client.exchange("GET", path, b"", reply)
            _check_status(reply, submitted=True)
            answer = json_object(reply)
            if (status := answer.get("status")) != "running":
                break
            if clock() - asked < POLL:
                outcome.polled = True
                await asyncio.sleep(POLL)
        if status in ("failed", "cancelled"):
            raise RequestFailed(FAILED_RESULT, _message(answer) or str(status), reply.status)
        if status != "finished":
            raise RequestFailed(BAD_ANSWER, f"a result with status {status!r}", reply.status)
        outcome.finished = clock()
        _note_usage(outcome, answer.get("usage"), reply)


class _Stream:
    """Reads the events of one streamed answer."""

    def __init__(self) -> None:
        self._parser = SseParser()
        self._loop = asyncio.get_running_loop()
        self._failure: RequestFailed | None = None
        self.reply = Reply(self._feed)
        self.first_text: float | None = None
        self.done_at: float | None = None
        self.usage: Any = None

    def check(self) -> None:
        """Raise RequestFailed unless the stream came to its proper end."""
        if self._failure is not None:
            raise self._failure
        if self.done_at is None:
            raise RequestFailed(BROKEN_STREAM, "ended without [DONE]", 200)

    def _feed(self, piece: bytes) -> None:
        now = self._loop.time()
        for event in self._parser.feed(piece):
            if self.done_at is not None or self._failure is not None:
                return
            if event == b"[DONE]":
                self.done_at = now
                # most servers end the answer right after it; nobody has to wait for the others
                self.reply.end_in(_LINGER)
            elif event:
                self._take(event, now)

    def _take(self, event: bytes, now: float) -> None:
        try:
            chunk = msgspec.json.decode(event)
        except (msgspec.DecodeError, UnicodeDecodeError):
            chunk = None
        if not isinstance(chunk, dict):
            self._failure = RequestFailed(BAD_ANSWER, "an event that is no JSON object", 200)
        elif chunk.get("error"):
            self._failure = RequestFailed(STREAM_ERROR, _message(chunk), 200)
        else:
            if self.first_text is None and _has_text(chunk):
                self.first_text = now
            if chunk.get("usage"):
                self.usage = chunk["usage"]


def _check_status(reply: Reply, submitted: bool = False) -> None:
    """Raise RequestFailed for every status but 200; only a submission can be rejected."""
    if reply.status == 200:
        return
    rejected = reply.status in REJECTIONS and not submitted
    kind = REJECTED if rejected else f"http {reply.status}"
    raise RequestFailed(kind, error_message(reply), reply.status, "retry-after" in reply.headers)


def json_object(reply: Reply) -> dict[str, Any]:
    """The body of an answer.

    Raises:
        RequestFailed: it is no JSON object.
    """
    try:
        value = msgspec.json.decode(bytes(reply.body))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestFailed(BAD_ANSWER, f"not JSON: {error}", reply.status) from error
    if not isinstance(value, dict):
        raise RequestFailed(BAD_ANSWER, "no JSON object", reply.status)
    return value


def error_message(reply: Reply) -> str:
    """What the server says about its status, in one line."""
    try:
        return _message(json_object(reply))
    except RequestFailed:
        return _short(reply.body.decode("utf-8", "replace"))


def _message(answer: Mapping[str, Any]) -> str:
    """The message of an error object, of OpenAI's or FastAPI's form."""
    error = answer.get("error") or answer.get("detail") or answer.get("message")
    text = error.get("message") if isinstance(error, dict) else error
    return _short("" if text is None else str(text))


def _short(text: str) -> str:
    # control characters of a foreign server do not reach the terminal
    line = "".join(c if c.isprintable() else " " for c in text[: 4 * _MESSAGE])
    line = " ".join(line.split())
    return line if len(line) <= _MESSAGE else line[: _MESSAGE - 3] + "..."


def _has_text(chunk: Mapping[str, Any]) -> bool:
    """Whether an event brings text; the first one of a chat only names the role."""
    choices = chunk.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict):
            delta = choice.get("delta")
            text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
            if isinstance(text, str) and text:
                return True
    return False


def _note_usage(outcome: Outcome, usage: Any, reply: Reply) -> None:
    known = usage if isinstance(usage, dict) else {}
    outcome.prompt_tokens = _count(known.get("prompt_tokens"))
    outcome.output_tokens = _count(known.get("completion_tokens"))
    outcome.forward_passes = _count(known.get("forward_passes"))
    outcome.queue_seconds = _seconds(known.get("queue_time"))
    if outcome.queue_seconds is None:
        outcome.queue_seconds = _seconds(reply.headers.get("x-queue-time"))


def _count(value: Any) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value if whole else None


def _seconds(value: Any) -> float | None:
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if 0 <= seconds < math.inf else None
