"""A small HTTP/1.1 client: one pool of connections, answers read as they arrive.

A general client can cost more than the server that it measures: httpx took 5.7 ms of CPU for a
short request with 64 in flight and 25 ms with 800, this one 0.2 and 0.4. Bytes go from the socket's
callback through a parser in C to the reader of events, without a task switch.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import cast

from dllmserve._needs import missing
from dllmserve.bench.serve.options import Address
from dllmserve.bench.serve.outcome import RequestFailed
from dllmserve.errors import ConfigError

try:
    import httptools
except ImportError as error:
    raise ConfigError(missing("bench serve", "httptools", "bench")) from error

#: seconds that an idle connection is used again; servers close theirs after 5 or more
_MAX_IDLE = 2.0
#: kinds of failure
NO_CONNECTION, LOST, BAD_ANSWER = "no connection", "connection lost", "bad answer"


class Reply:
    """The answer to one request, filled in as it comes.

    Args:
        on_body: told the pieces of a body with status 200; without it, and with any other
            status, ``body`` collects them.

    Attributes:
        sent_at: when the request was handed to the connection; None before.
        status: of HTTP; 0 before it has come.
        headers: by name in lower case.
        body: see above.
        complete: whether the answer came to its end.
        lost: why it did not, if the connection ended before.
    """

    def __init__(self, on_body: Callable[[bytes], None] | None = None) -> None:
        self.sent_at: float | None = None
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = bytearray()
        self.complete = False
        self.lost: str | None = None
        self.bad = False
        self._on_body = on_body
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self) -> None:
        """Wake up who waits; the connection is used again only if the answer is complete."""
        if not self._ended.done():
            self._ended.set_result(None)

    async def wait(self) -> None:
        """Return at the end."""
        await self._ended

    def take(self, piece: bytes) -> None:
        """A piece of the body."""
        if self._on_body is not None and self.status == 200:
            self._on_body(piece)
        else:
            self.body += piece

    def header(self, name: bytes) -> str | None:
        """Value of a header by its lower-case name."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")


class _Connection(asyncio.Protocol):
    """One connection; at most one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._reply: Reply | None = None
        self._parser = httptools.HttpResponseParser(self)
        self.reusable = True
        self.idle_since = 0.0

    def ask(self, request: bytes, reply: Reply, now: float) -> None:
        """Send a request; the reply is filled in by the callbacks below."""
        self._reply = reply
        if self._transport is None or self._transport.is_closing():
            self._lose("closed by the server")
            return
        reply.sent_at = now
        self._transport.write(request)

    def abort(self) -> None:
        """Close at once, whatever is under way."""
        self._reply, self.reusable = None, False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._reply is None:
            self.abort()  # nobody asked
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            reply, self._reply = self._reply, None
            if reply is not None:
                reply.bad, reply.lost = True, f"not HTTP/1.1: {error}"
                reply.end()
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        self._lose("reset" if exc is not None else "closed by the server")

    def _lose(self, why: str) -> None:
        reply, self._reply = self._reply, None
        if reply is None:
            return
        framed = {b"content-length", b"transfer-encoding"} & reply.headers.keys()
        if reply.status >= 200 and not framed and why != "reset":
            reply.complete = True  # such a body ends with its connection
        else:
            reply.lost = why
        reply.end()

    def on_message_begin(self) -> None:
        if self._reply is None:  # an answer too many: what comes next is anybody's guess
            self.reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reply is not None:
            self._reply.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._reply is not None:
            self._reply.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._reply is not None:
            self._reply.take(body)

    def on_message_complete(self) -> None:
        reply = self._reply
        if reply is None:
            return
        if reply.status < 200:  # an interim answer; the real one follows
            reply.headers.clear()
            return
        self._reply = None
        self.reusable = self.reusable and self._parser.should_keep_alive()
        reply.complete = True
        reply.end()


class HttpClient:
    """Sends requests to one server. Nothing is tried twice, and no redirect followed.

    Args:
        address: of the server.
        headers: sent with every request, by name in lower case.
    """

    def __init__(self, address: Address, headers: Mapping[str, str]) -> None:
        self._address = address
        given = {"host": address.authority, "accept-encoding": "identity", **headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in given.items()).encode()
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._host = address.host
        # the system's certificates; SSL_CERT_FILE adds others
        self._tls = ssl.create_default_context() if address.tls else None

    async def open(self) -> None:
        """Look up the name once, and keep the first address that takes a connection.

        Raises:
            RequestFailed: none does.
        """
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(self._address.host, self._address.port)
        except OSError as error:
            raise RequestFailed(NO_CONNECTION, _reason(error)) from error
        failure: RequestFailed | None = None
        for host in dict.fromkeys(str(entry[4][0]) for entry in found):
            self._host = host
            try:
                self._keep(await self._connect())
                return
            except RequestFailed as error:
                failure = failure or error
        raise failure or RequestFailed(NO_CONNECTION, "the name has no address")

    async def exchange(self, method: str, path: str, body: bytes, reply: Reply) -> None:
        """Send a request and wait for the end of its answer.

        Raises:
            RequestFailed: no connection, or it was lost before an answer that is complete.
        """
        line = f"{method} {self._address.prefix}{path} HTTP/1.1\r\n".encode()
        kind = b"content-type: application/json\r\n" if body else b""
        length = f"content-length: {len(body)}\r\n\r\n".encode()
        connection = self._kept() or await self._connect()
        self._busy.add(connection)
        try:
            now = asyncio.get_running_loop().time()
            connection.ask(b"".join((line, self._head, kind, length, body)), reply, now)
            await reply.wait()
        finally:
            self._busy.discard(connection)
            if reply.complete and connection.reusable:
                self._keep(connection)
            else:
                connection.abort()
        if reply.lost is not None:
            raise RequestFailed(BAD_ANSWER if reply.bad else LOST, reply.lost, reply.status or None)

    async def close(self) -> None:
        """End all connections."""
        for connection in (*self._idle, *self._busy):
            connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)  # transports close in the loop's next turn

    def _keep(self, connection: _Connection) -> None:
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)

    def _kept(self) -> _Connection | None:
        """A connection that is ready, the one used last; old ones are closed."""
        oldest = asyncio.get_running_loop().time() - _MAX_IDLE
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and connection.idle_since >= oldest:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        name = self._address.host if self._tls is not None else None
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                _Connection, self._host, self._address.port, ssl=self._tls, server_hostname=name
            )
        except OSError as error:
            raise RequestFailed(NO_CONNECTION, _reason(error)) from error
        return connection


def allow_many_connections() -> None:
    """Raise this process's limit of open files as far as it may: a connection is one."""
    with suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _reason(error: OSError) -> str:
    """The system's words, without the address that asyncio puts in their place."""
    if isinstance(error, ssl.SSLError) or not error.errno or error.errno < 0:
        return error.strerror or str(error)
    return os.strerror(error.errno)
