"""A client that is cheap, never tries again by itself, and notices what is missing."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from dllmserve.tools.bench.serve.http import HttpClient, Reply
from dllmserve.tools.bench.serve.outcome import RequestFailed
from dllmserve.tools.bench.serve.sse import SseParser

#: longest wait for an answer, in seconds; a client that waits longer counts as hung
PATIENCE_S = 60.0


class LostAnswer(Exception):
    """No connection, or one that was lost before the end of the answer."""


class Hung(Exception):
    """No answer after PATIENCE_S seconds."""


@dataclass
class Answer:
    """A complete answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """``error.code``, if it is an error object."""
        try:
            error = self.json()["error"]
        except (ValueError, KeyError, TypeError):
            return None
        return str(error["code"])

    @property
    def retry_after(self) -> float | None:
        """Seconds of the header, if there is one."""
        value = self.headers.get("retry-after")
        return None if value is None else float(value)


@dataclass
class Events:
    """A stream of the OpenAI endpoints, as far as it came.

    Attributes:
        status: of HTTP.
        texts: by choice.
        reasons: finish reasons by choice.
        error: code of an error event.
        done: whether [DONE] came, as the last event.
        after_done: whether anything came after it.
        ended: whether the answer came to its end as HTTP has it.
        refusal: the whole answer, if the status is not 200.
        first_text: set with the first text.
    """

    status: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    error: str | None = None
    done: bool = False
    after_done: bool = False
    ended: bool = False
    refusal: Answer | None = None
    first_text: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def began(self) -> bool:
        """Whether any text came."""
        return any(self.texts.values())

    def take(self, data: bytes) -> None:
        """One event."""
        self.after_done |= self.done
        if data == b"[DONE]":
            self.done = True
            return
        body = json.loads(data)
        if "error" in body:
            self.error = str(body["error"]["code"])
            return
        for choice in body["choices"]:
            index = choice["index"]
            text = choice["delta"].get("content") if "delta" in choice else choice["text"]
            self.texts[index] = self.texts.get(index, "") + (text or "")
            if text:
                self.first_text.set()
            if choice["finish_reason"] is not None:
                self.reasons[index] = choice["finish_reason"]


class Client:
    """Requests to one server, over connections that are used again.

    Args:
        port: on 127.0.0.1.
        key: API key.
    """

    def __init__(self, port: int, key: str | None = None) -> None:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._http = HttpClient(f"http://127.0.0.1:{port}", headers)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End all connections."""
        await self._http.close()

    async def ask(
        self, method: str, path: str, body: object = None, timeout_s: float = PATIENCE_S
    ) -> Answer:
        """One request and its whole answer.

        Raises:
            LostAnswer: there is none.
            Hung: there is none yet.
        """
        reply, began = Reply(), time.monotonic()
        await self._exchange(method, path, body, reply, timeout_s)
        seconds = time.monotonic() - began
        return Answer(reply.status, reply.headers, bytes(reply.body), seconds)

    async def get(self, path: str, timeout_s: float = PATIENCE_S) -> Answer:
        """A GET request; see :meth:`ask`."""
        return await self.ask("GET", path, timeout_s=timeout_s)

    async def post(self, path: str, body: object, timeout_s: float = PATIENCE_S) -> Answer:
        """A POST request; see :meth:`ask`."""
        return await self.ask("POST", path, body, timeout_s)

    async def stream(
        self, path: str, body: object, events: Events | None = None, timeout_s: float = PATIENCE_S
    ) -> Events:
        """One stream to its end, with ``stream: true`` added.

        Args:
            path, body: of the request; ``body`` is a mapping.
            events: filled in as they come, for callers that leave early.
            timeout_s: for all of it.

        Raises:
            LostAnswer, Hung: as :meth:`ask`.
        """
        if not isinstance(body, Mapping):
            raise TypeError("the body of a stream must be a mapping")
        found = Events() if events is None else events
        parser = SseParser()

        def take(piece: bytes) -> None:
            for data in parser.feed(piece):
                found.take(data)

        reply, began = Reply(take), time.monotonic()
        await self._exchange("POST", path, {**body, "stream": True}, reply, timeout_s)
        found.status, found.ended = reply.status, True
        if reply.status != 200:
            seconds = time.monotonic() - began
            found.refusal = Answer(reply.status, reply.headers, bytes(reply.body), seconds)
        return found

    async def _exchange(
        self, method: str, path: str, body: object, reply: Reply, timeout_s: float
    ) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        try:
            async with asyncio.timeout(timeout_s):
                await self._http.exchange(method, path, data, reply)
        except TimeoutError as error:
            raise Hung(f"{method} {path} was not answered in {timeout_s:g} s") from error
        except RequestFailed as error:
            raise LostAnswer(str(error)) from error
