"""A guarded server inside the test's event loop, and a client that can misbehave."""

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.server import ServerState

from dllmserve.server.http.connection import GuardedProtocol
from dllmserve.server.http.listener import Listener
from dllmserve.server.http.refusal import RefusalHeaders, no_headers
from dllmserve.server.http.slots import Classify, ConnectionLimits, Connections, ConnectionStats

#: what no test waits longer for; far more than any of them needs
PATIENCE = 20.0


@dataclass
class Live:
    """A server that listens."""

    port: int
    stats: ConnectionStats
    state: ServerState
    connections: Connections


@dataclass
class Answer:
    """One response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/json"
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error, dict)
        return error


def pending_timers() -> list[object]:
    """Timers of connections that are still to fire."""
    scheduled = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
    owners = (getattr(t._callback, "__self__", None) for t in scheduled if not t.cancelled())
    return [owner for owner in owners if isinstance(owner, GuardedProtocol)]


def client(path: str, headers: Any) -> Literal["client"]:
    """Nobody needs a key."""
    return "client"


@contextlib.asynccontextmanager
async def serving(
    app: ASGIApp,
    *,
    keep_alive: float = 5,
    sndbuf: int | None = None,
    refusal_headers: RefusalHeaders = no_headers,
    classify: Classify = client,
    context: ssl.SSLContext | None = None,
    host: str = "127.0.0.1",
    **limits: Any,
) -> AsyncIterator[Live]:
    """Serve an app on a free port. At the end nothing of it may be left."""
    connections = Connections(
        ConnectionLimits(**limits), classify=classify, refusal_headers=refusal_headers
    )
    stats = connections.stats
    config = uvicorn.Config(
        app,
        http="httptools",
        ws=asyncio.Protocol,  # must never be used
        log_config=None,
        lifespan="off",
        timeout_keep_alive=keep_alive,  # type: ignore[arg-type]
    )
    state = ServerState()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.create_server((host, 0), family=family, backlog=512)
    sock.setblocking(False)
    if sndbuf is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf)

    config.load()
    listener = Listener(
        sock,
        connections,
        lambda place: GuardedProtocol(config, state, {}, connections, place),
        context=context,
    )
    try:
        yield Live(sock.getsockname()[1], stats, state, connections)
    finally:
        listener.close()
        await listener.wait_closed()
        sock.close()
        for connection in list(state.connections):
            connection.shutdown()
        for task in list(state.tasks):
            task.cancel()
        await until(lambda: not state.tasks, "tasks are left")
        for connection in list(state.connections):
            connection.transport.abort()
        await until(lambda: not state.connections, "connections are left")
        await asyncio.sleep(0)
        assert stats.open == stats.busy == 0
        assert not connections._idle and not connections._held
        assert not pending_timers()


async def until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> float:
    """Wait for a condition; the seconds it took."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    while not condition():
        assert loop.time() - start < seconds, what
        await asyncio.sleep(0.005)
    return loop.time() - start


@dataclass
class Client:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def answer(self, *, head: bool = False) -> Answer:
        """The next response; EOFError if the server closed instead."""
        async with asyncio.timeout(PATIENCE):
            top = await self.reader.readuntil(b"\r\n\r\n")
            lines = top.decode("latin-1").split("\r\n")
            headers = {
                key.lower(): value.strip()
                for key, _, value in (line.partition(":") for line in lines[1:] if line)
            }
            body = b""
            if headers.get("transfer-encoding") == "chunked":
                while size := int((await self.reader.readuntil(b"\r\n"))[:-2], 16):
                    body += (await self.reader.readexactly(size + 2))[:-2]
                await self.reader.readexactly(2)
            elif not head:
                body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return Answer(int(lines[0].split()[1]), headers, body)

    async def ask(self, data: bytes) -> Answer:
        await self.send(data)
        return await self.answer()

    async def closed(self) -> float:
        """Wait until the server has closed; the seconds it took. Nothing may come before."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        async with asyncio.timeout(PATIENCE):
            try:
                rest = await self.reader.read()
            except ConnectionError:
                rest = b""
        assert rest == b""
        return loop.time() - start


@contextlib.asynccontextmanager
async def connected(
    port: int, context: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection(host, port, ssl=context)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def ask(port: int, data: bytes) -> Answer:
    """One request on a connection of its own."""
    async with connected(port) as client:
        return await client.ask(data)


def get(path: str = "/", *headers: str) -> bytes:
    """A GET request."""
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: h", *headers, "", ""]).encode("latin-1")


def post(body: bytes, *headers: str, path: str = "/") -> bytes:
    """A POST request with Content-Length."""
    lines = [f"POST {path} HTTP/1.1", "Host: h", f"Content-Length: {len(body)}"]
    if not any(line.lower().startswith("content-type:") for line in headers):
        lines.append("Content-Type: application/json")
    return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1") + body


def chunked(*parts: bytes, path: str = "/", end: bytes = b"0\r\n\r\n") -> bytes:
    """A POST request with a chunked body."""
    head = f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + body + end


async def read_body(receive: Receive) -> bytes:
    """The whole body of a request."""
    body = b""
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return body
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def reply(send: Send, body: bytes = b"ok", status: int = 200, *headers: Any) -> None:
    """A complete response."""
    length = (b"content-length", str(len(body)).encode())
    start = {"type": "http.response.start", "status": status, "headers": [length, *headers]}
    await send(start)
    await send({"type": "http.response.body", "body": body})


@dataclass
class Echo:
    """An app that answers with method, path, and body, and keeps what it saw."""

    seen: list[Scope] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    before: Callable[[Scope, Receive, Send], Awaitable[None]] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(scope)
        if self.before is not None:
            await self.before(scope, receive, send)
        body = await read_body(receive)
        self.bodies.append(body)
        await reply(send, f"{scope['method']} {scope['path']} ".encode() + body)


@dataclass
class Waiter:
    """An app that answers when it is told to, or notes that its client left."""

    go: asyncio.Event = field(default_factory=asyncio.Event)
    started: int = 0
    left: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.started += 1
        await read_body(receive)
        gone: asyncio.Task[Message] = asyncio.ensure_future(_awaited(receive))
        told = asyncio.ensure_future(self.go.wait())
        try:
            await asyncio.wait({gone, told}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            told.cancel()
            gone.cancel()
        if gone.done() and not gone.cancelled():
            assert gone.result()["type"] == "http.disconnect"
            self.left += 1
            return
        await reply(send, b"told")


async def _awaited(receive: Receive) -> Message:
    return await receive()
