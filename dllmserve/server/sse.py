"""Server-sent events: a response with keep-alive comments that notices a client that leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import TypeVar

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dllmserve.errors import DllmServeError

T = TypeVar("T")

_COMMENT = b": keep-alive\n\n"
_encoder = msgspec.json.Encoder()


class ClientGone(Exception):
    """The client has closed the connection; there is nobody to answer."""


def event(data: object, name: str | None = None) -> bytes:
    r"""One event with JSON data.

    Example:
        >>> event({"a": 1})
        b'data: {"a":1}\n\n'
    """
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + _encoder.encode(data) + b"\n\n"


class EventStream(Response):
    """Sends the events of a generator, and a comment line when the generator is silent for long.

    The generator is closed as soon as the client is gone, which drops the client's request.

    Args:
        events: encoded events; the generator handles its own errors.
        keep_alive_s: seconds of silence before a comment.
        ended: called at the end, even if the generator was never begun and so cannot clean up.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        keep_alive_s: float,
        ended: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(
            headers={
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",  # nginx would hold events back
            }
        )
        del self.headers["content-length"]
        self._events, self._keep_alive_s, self._ended = events, keep_alive_s, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            async with aclosing(self._events):
                await send(start)
                await self._until_gone(receive, send)
        finally:
            self._ended()

    async def _until_gone(self, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send_all(send))
        leaving = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not sending.done():
                sending.cancel()
            with suppress(asyncio.CancelledError):
                await sending

    async def _send_all(self, send: Send) -> None:
        waiting: asyncio.Task[bytes] | None = None
        try:
            while True:
                if waiting is None:
                    waiting = asyncio.ensure_future(_next(self._events))
                done, _ = await asyncio.wait((waiting,), timeout=self._keep_alive_s)
                if not done:
                    await _send(send, _COMMENT)
                    continue
                try:
                    chunk = waiting.result()
                except StopAsyncIteration:
                    break
                waiting = None
                await _send(send, chunk)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if waiting is not None:
                waiting.cancel()
                # awaited even if it has ended, because asyncio logs errors that nobody retrieves
                with suppress(asyncio.CancelledError, StopAsyncIteration):
                    await waiting


async def unless_gone(http: HttpRequest, work: Awaitable[T]) -> T:
    """Wait for the work, and cancel it when the client closes the connection.

    Raises:
        ClientGone: the client is gone.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_gone(http.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            with suppress(asyncio.CancelledError, DllmServeError):
                await working


async def _gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)


async def _send(send: Send, chunk: bytes) -> None:
    await send({"type": "http.response.body", "body": chunk, "more_body": True})
