"""A server that does what a test says: delays, refusals, broken streams. It keeps its own log."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

MODEL = "fake-8b"


@dataclass(frozen=True)
class Plan:
    """What becomes of one request; seconds, and numbers of chunks.

    ``broken`` drops the connection after the text, ``no_done`` ends the stream early but in
    order, ``error`` is an event in the stream, ``garbage`` one that is not JSON, ``linger`` how
    long a stream stays open after its end.
    """

    first: float = 0.0
    chunks: int = 3
    gap: float = 0.0
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    broken: bool = False
    no_done: bool = False
    error: bool = False
    garbage: bool = False
    linger: float = 0.0
    usage: dict[str, Any] | None = field(
        default_factory=lambda: {"prompt_tokens": 5, "completion_tokens": 12, "forward_passes": 4}
    )


@dataclass
class Seen:
    """A request as the server saw it; ``arrived`` is on the clock of ``time.monotonic``."""

    path: str
    body: Any
    headers: dict[str, str]
    peer: tuple[str, int]
    arrived: float
    answered: float | None = None


class Fake:
    """The server's state; change ``plan`` and ``long_poll`` before sending requests."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.reset()

    def reset(self) -> None:
        """Forget everything; what is still under way for an earlier test goes on unseen."""
        self.plan: Callable[[int], Plan] = lambda number: Plan()
        self.long_poll = True
        self.models: Response = JSONResponse({"object": "list", "data": [{"id": MODEL}]})
        self.seen: list[Seen] = []
        self.polls = 0
        self._jobs: dict[int, tuple[float, Plan]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def stall(self, seconds: float) -> None:
        """Keep the server from doing anything at all for a while, from now on."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(time.sleep, seconds)

    def app(self) -> Starlette:
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/generate", self._generate, methods=["POST"]),
            Route("/v1/result/{id:int}", self._result),
        ]
        return Starlette(routes=routes)

    async def _models(self, request: Request) -> Response:
        self._loop = asyncio.get_running_loop()
        return self.models

    async def _note(self, request: Request) -> tuple[Seen, Plan]:
        assert request.client is not None
        arrived = time.monotonic()
        seen = Seen(
            request.url.path,
            json.loads(await request.body()),
            dict(request.headers),
            tuple(request.client),  # type: ignore[arg-type]
            arrived,
        )
        self.seen.append(seen)
        return seen, self.plan(len(self.seen) - 1)

    async def _complete(self, request: Request) -> Response:
        seen, plan = await self._note(request)
        if plan.status != 200:
            await asyncio.sleep(plan.first)
            body = {"error": {"message": f"no: {plan.status}", "type": "x"}}
            return JSONResponse(body, plan.status, plan.headers)
        if seen.body.get("stream"):
            events = self._events(seen, plan, chat=seen.path.endswith("chat/completions"))
            return StreamingResponse(events, media_type="text/event-stream", headers=plan.headers)
        await asyncio.sleep(plan.first + plan.gap * (plan.chunks - 1))
        seen.answered = time.monotonic()
        if plan.garbage:
            return PlainTextResponse("<html>not JSON</html>")
        answer = {"choices": [{"text": "a"}], "usage": plan.usage}
        return JSONResponse(answer, headers=plan.headers)

    async def _events(self, seen: Seen, plan: Plan, chat: bool) -> AsyncIterator[bytes]:
        if chat:  # the role, which is no text
            yield _event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        yield b": keep-alive\n\n"
        for number in range(plan.chunks):
            await asyncio.sleep(plan.gap if number else plan.first)
            choice = {"delta": {"content": "ab "}} if chat else {"text": "ab "}
            yield _event({"choices": [choice]})
        if plan.garbage:
            yield b"data: {not json\n\n"
        if plan.error:
            yield _event({"error": {"message": "the engine died", "code": None}})
            yield b"data: [DONE]\n\n"
            return
        if plan.broken:
            raise ConnectionError
        if plan.no_done:
            return
        if plan.usage is not None:
            yield _event({"choices": [], "usage": plan.usage})
        seen.answered = time.monotonic()
        yield b"data: [DONE]\n\n"
        await asyncio.sleep(plan.linger)

    async def _generate(self, request: Request) -> Response:
        _, plan = await self._note(request)
        if plan.status != 200:
            return JSONResponse({"detail": "full"}, plan.status, plan.headers)
        number = len(self.seen) - 1
        self._jobs[number] = (time.monotonic() + plan.first, plan)
        return JSONResponse({"request_ids": [number], "status": "submitted"})

    async def _result(self, request: Request) -> Response:
        self.polls += 1
        number = request.path_params["id"]
        ready, plan = self._jobs[number]
        left = ready - time.monotonic()
        if left > 0 and self.long_poll and "wait" in request.query_params:
            await asyncio.sleep(left)
        elif left > 0:
            return JSONResponse({"request_id": number, "status": "running"})
        if plan.error:
            failed = {"message": "the engine died"}
            return JSONResponse({"request_id": number, "status": "failed", "error": failed})
        answer = {"request_id": number, "status": "finished", "text": "ab"}
        return JSONResponse({**answer, "usage": plan.usage})


def _event(value: Any) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


@contextmanager
def running() -> Iterator[Fake]:
    """A fake server in a thread of its own."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(2048)
    fake = Fake(f"http://127.0.0.1:{listener.getsockname()[1]}")
    config = uvicorn.Config(
        fake.app(),
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield fake
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()
