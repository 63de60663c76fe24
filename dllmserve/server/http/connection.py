"""uvicorn's HTTP/1.1 protocol with limits on what a connection may hold, and for how long.

uvicorn bounds an idle keep-alive connection and nothing else: one that sends half a request or
never reads its answer is kept for ever. The invariant here is that an open connection has
a request being answered, whose body :class:`~dllmserve.server.http.body.BodyGuard` times, or
a timer that ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from dllmserve._checks import check_float, check_int
from dllmserve.errors import ConfigError
from dllmserve.server.http.http10 import speak_http_1_0
from dllmserve.server.http.respond import CLOSE, LINGER_S, Headers, error_body, error_type

#: key of scope["extensions"] with a function that drops the request's connection at once
ABORT = "dllmserve.abort"
#: requests that may wait on one connection for the answers before theirs
MAX_PIPELINED = 16
#: see ConnectionLimits.max_turned_away
MAX_TURNED_AWAY = 64
#: a reader that takes less than this in write_timeout_s counts as one that does not read
MIN_PROGRESS_BYTES = 65536

_log = logging.getLogger("dllmserve.access")

#: what the parser is in: between requests, in the request line and headers, in the body
_Part = Literal["idle", "head", "body"]


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """What one connection may take. Beyond a limit it gets the status below and is closed.

    Attributes:
        header_timeout_s: seconds from a request's first byte, or from the connection's start,
            to the end of its headers; 408. Also for a body that nobody waits for any more.
        max_header_bytes: request line and headers together, and trailers; 431.
        max_headers: number of headers; 431.
        max_target_bytes: path and query; 414.
        max_connections: open connections of the server; 503.
        max_turned_away: connections over that limit that are answered before they are closed;
            more are just closed.
        write_timeout_s: seconds that a full write buffer may stand still; no status.

    Raises:
        ConfigError: a limit is not positive.
    """

    header_timeout_s: float = 10.0
    max_header_bytes: int = 65536
    max_headers: int = 100
    max_target_bytes: int = 8192
    max_connections: int = 1024
    max_turned_away: int = MAX_TURNED_AWAY
    write_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("header_timeout_s", "write_timeout_s"):
            check_float(ConfigError, name, getattr(self, name), 0, low_open=True)
        for name in ("max_header_bytes", "max_headers", "max_target_bytes", "max_connections"):
            check_int(ConfigError, name, getattr(self, name), 1)
        check_int(ConfigError, "max_turned_away", self.max_turned_away, 0)


@dataclass
class ConnectionStats:
    """Counts of one server, for metrics.

    Attributes:
        open: connections open now, without those being turned away.
        turned_away: connections over the limit that wait to be closed.
        refused: refused connections and requests, by status.
        stuck_readers: connections dropped because the client did not read.
    """

    open: int = 0
    turned_away: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    stuck_readers: int = 0


class _Refused(Exception):
    """A request that is not passed on: status, code and message of the answer."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


#: from the headers of a request, as far as they have come, to headers of its refusal
RefusalHeaders = Callable[[Headers], Headers]


def no_headers(_: Headers) -> Headers:
    """None at all."""
    return ()


def guarded_protocol(
    limits: ConnectionLimits,
    stats: ConnectionStats | None = None,
    refusal_headers: RefusalHeaders = no_headers,
) -> type[GuardedProtocol]:
    """The protocol class for one server, to be given to ``uvicorn.Config(http=...)``.

    Args:
        limits: for every connection.
        stats: counted into; by default a new one, which is the class's ``stats``.
        refusal_headers: what the answer to a refused request has besides its own headers.

    Example:
        >>> protocol = guarded_protocol(ConnectionLimits(header_timeout_s=5))
        >>> protocol.stats.open
        0
    """
    given = limits
    counts = stats if stats is not None else ConnectionStats()
    more = refusal_headers

    class Protocol(GuardedProtocol):
        limits = given
        stats = counts
        refusal_headers = staticmethod(more)

    return Protocol


class GuardedProtocol(HttpToolsProtocol):
    """One connection. Use :func:`guarded_protocol`, which sets the class attributes.

    Besides its limits it differs from uvicorn's own in this:

    - Malformed requests are answered with the error object, after the answers to earlier
      requests on the connection, and never inside one.
    - A client that leaves ends every request it had sent, pipelined ones included.
    - Trailers after a chunked body do not become headers.
    - ``Upgrade`` is ignored and the request's body is read; some clients offer HTTP/2 so.
    - A request whose answer came before its body was read cannot keep the connection for ever.
    - An HTTP/1.0 client gets no chunks and no ``100 Continue``, which it would not know.
    """

    limits: ClassVar[ConnectionLimits]
    stats: ClassVar[ConnectionStats]
    refusal_headers: ClassVar[staticmethod[[Headers], Headers]] = staticmethod(no_headers)

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._part: _Part = "idle"
        self._header_count = 0
        self._header_bytes = 0
        # bytes since the parser last came to the end of something
        self._unparsed = 0
        self._upgrade_head: bytes | None = None
        # received and not yet answered completely, oldest first
        self._open_cycles: deque[RequestResponseCycle] = deque()
        self._refusal: _Refused | None = None
        self._counted = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock for the first request, or turn the connection away."""
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            # asyncio does so only if the listening socket was made with an explicit protocol;
            # otherwise each answer waits 40 ms between its headers and its body
            with contextlib.suppress(OSError):  # the client has left already
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.stats.open < self.limits.max_connections:
            self._counted = True
            self.stats.open += 1
            self._start_head_timer()
            return
        self.stats.turned_away += 1
        if self.stats.turned_away > self.limits.max_turned_away:
            self.stats.refused[503] += 1
            transport.abort()
            return
        most = self.limits.max_connections
        text = f"The server has its limit of {most} open connections; try again later."
        self._refuse(_Refused(503, "too_many_connections", text))

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop every timer and tell every unanswered request that its client is gone."""
        if self._counted:
            self.stats.open -= 1
        else:
            self.stats.turned_away -= 1
        for timer in (self._head_timer, self._write_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._write_timer = self._linger_timer = None
        self._stop_keep_alive()
        while self._open_cycles:
            self._disconnect(self._open_cycles.popleft())
        super().connection_lost(exc)

    def abort(self) -> None:
        """Drop the connection at once, with whatever is unsent. May be called at any time."""
        self.transport.abort()

    def shutdown(self) -> None:
        """Close when nothing is unanswered; uvicorn calls it when the server stops."""
        super().shutdown()
        self._watch_close()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection on which no further request came."""
        super().timeout_keep_alive_handler()
        self._watch_close()

    def data_received(self, data: bytes) -> None:
        """Parse what came; what is refused gets its answer here."""
        if self._refusal is not None:
            return
        self._stop_keep_alive()
        self._unparsed += len(data)
        try:
            self._feed(data)
            if self._unparsed > self.limits.max_header_bytes:
                raise self._headers_too_large()
        except _Refused as refused:
            self._refuse(refused)
        except httptools.HttpParserError as error:
            cause = error.__context__
            if not isinstance(cause, _Refused):
                text = "The request is not valid HTTP/1.1."
                if not isinstance(error, httptools.HttpParserCallbackError):
                    text = f"{text[:-1]}: {error}."  # fixed texts of the parser
                cause = _Refused(400, "malformed_request", text)
            self._refuse(cause)
        self._watch_read()

    def _feed(self, data: bytes) -> None:
        """Give bytes to the parser, and again those after a request that offers an upgrade."""
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                # the parser took the request to have no body: once more without the header
                data = (self._upgrade_head or b"") + data[upgrade.args[0] :]
                self._upgrade_head = None

    def _headers_too_large(self) -> _Refused:
        most = self.limits.max_header_bytes
        text = f"Request line and headers are limited to {most} bytes; send less."
        return _Refused(431, "headers_too_large", text)

    def on_message_begin(self) -> None:
        """A request's first byte."""
        if len(self._open_cycles) > MAX_PIPELINED:
            text = f"At most {MAX_PIPELINED} requests may wait on one connection; await answers."
            raise _Refused(400, "too_many_pipelined", text)
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: self.abort}  # type: ignore[dict-item]
        self._part = "head"
        self._header_count = self._header_bytes = 0
        self._unparsed = 0

    def on_url(self, url: bytes) -> None:
        """A part of the request's target."""
        super().on_url(url)
        if len(self.url) > self.limits.max_target_bytes:
            most = self.limits.max_target_bytes
            text = f"The request target is limited to {most} bytes; put data into the body."
            raise _Refused(414, "target_too_long", text)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A complete header, or trailer."""
        self._header_count += 1
        self._header_bytes += len(name) + len(value) + 4
        if self._header_count > self.limits.max_headers:
            text = f"A request is limited to {self.limits.max_headers} headers; send fewer."
            raise _Refused(431, "too_many_headers", text)
        if self._part == "body":
            # a trailer among the headers would come after the guards had looked at them
            return
        if name.lower() == b"transfer-encoding" and value.strip().lower() != b"chunked":
            text = "The only Transfer-Encoding is chunked; send the body uncompressed."
            raise _Refused(400, "unsupported_transfer_encoding", text)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request can be started."""
        if self._header_bytes + len(self.url) > self.limits.max_header_bytes:
            raise self._headers_too_large()
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            text = "This server speaks HTTP/1.1 and HTTP/1.0."
            raise _Refused(400, "unsupported_http_version", text)
        if self.parser.should_upgrade():
            self._ignore_upgrade(version)
            return
        super().on_headers_complete()
        if version == "1.0":
            speak_http_1_0(self.cycle)
        self._open_cycles.append(self.cycle)
        self._part = "body"
        self._unparsed = 0
        self._stop_head_timer()

    def _ignore_upgrade(self, version: str) -> None:
        """Note the request as it would be without the header."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise _Refused(400, "connect_not_supported", "This server is not a proxy.")
        head = [method, b" ", self.url, b" HTTP/", version.encode(), b"\r\n"]
        for name, value in self.headers:
            if name != b"upgrade":
                head += [name, b": ", value, b"\r\n"]
        self._upgrade_head = b"".join([*head, b"\r\n"])

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request's last byte."""
        if self._upgrade_head is not None:
            return
        self._part = "idle"
        self._unparsed = 0
        self._stop_head_timer()
        super().on_message_complete()

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(
                self.limits.header_timeout_s, self._on_head_timeout
            )

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_keep_alive(self) -> None:
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None

    def _watch_read(self) -> None:
        """See to it that a connection without unanswered requests has a timer."""
        if self._open_cycles or self._refusal is not None or self.transport.is_closing():
            return
        if self._part != "idle":
            self._start_head_timer()
        elif self._head_timer is None and self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _on_head_timeout(self) -> None:
        self._head_timer = None
        if self._part == "head":
            limit = self.limits.header_timeout_s
            text = f"The request's headers were not complete after {limit:g} seconds."
            self._refuse(_Refused(408, "header_timeout", text))
        else:
            self._close()

    def pause_writing(self) -> None:
        """The write buffer is full: the client has to read from now on."""
        super().pause_writing()
        self._start_write_timer()

    def resume_writing(self) -> None:
        """The client has read most of the write buffer."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        self._watch_close()

    def _start_write_timer(self) -> None:
        if self._write_timer is None:
            self._unsent = self.transport.get_write_buffer_size()
            self._write_timer = self.loop.call_later(
                self.limits.write_timeout_s, self._on_write_timeout
            )

    def _on_write_timeout(self) -> None:
        self._write_timer = None
        if self._unsent - self.transport.get_write_buffer_size() >= MIN_PROGRESS_BYTES:
            self._start_write_timer()  # one large answer on a slow line
            return
        self.stats.stuck_readers += 1
        self.abort()

    def _close(self) -> None:
        """Close once everything is sent, and in any case some time later."""
        self.transport.close()
        self._watch_close()

    def _watch_close(self) -> None:
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._start_write_timer()

    def on_response_complete(self) -> None:
        """A request has been answered: go on with the next, or with what was refused."""
        super().on_response_complete()
        if self._open_cycles:
            self._open_cycles.popleft()
        if self.transport.is_closing():
            self._watch_close()
        elif self._refusal is not None and not self._open_cycles:
            self._send_refusal(self._refusal)
        else:
            self._watch_read()

    def send_400_response(self, msg: str) -> None:
        """Answer a malformed request; kept for uvicorn, which calls it by this name."""
        self._refuse(_Refused(400, "malformed_request", msg))

    def _refuse(self, refusal: _Refused) -> None:
        """Read no more; answer with an error once all earlier requests are answered."""
        self._refusal = refusal
        self.stats.refused[refusal.status] += 1
        fields = {"status": refusal.status, "code": refusal.code}
        host = self.client[0] if self.client else ""
        _log.info("connection refused", extra={**fields, "client": host})
        self._stop_head_timer()
        if self._part == "body" and not self._drop_broken():
            self._close()
        elif not self._open_cycles:
            self._send_refusal(refusal)

    def _drop_broken(self) -> bool:
        """Take back the request whose body was refused; False if it can have no other answer."""
        if not self._open_cycles or self._open_cycles[-1].response_started:
            return False
        broken = self._open_cycles.pop()
        if self._open_cycles:
            self.pipeline.popleft()  # not started yet; uvicorn adds at this end
        self._disconnect(broken)
        return True

    @staticmethod
    def _disconnect(cycle: RequestResponseCycle) -> None:
        cycle.disconnected = True
        cycle.message_event.set()

    def _send_refusal(self, refusal: _Refused) -> None:
        """Write the error and close, but not before the client had time to read it.

        Closing with unread data resets the connection, and the client may lose the answer. So
        only this side is closed, and what still comes is thrown away for a moment.
        """
        self._stop_keep_alive()
        body = error_body(refusal.message, type=error_type(refusal.status), code=refusal.code)
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            CLOSE,
            *self.refusal_headers(self.headers or ()),
        ]
        if refusal.status == 503:
            headers.append((b"retry-after", b"1"))
        lines = b"".join(b"%b: %b\r\n" % pair for pair in headers)
        self.transport.write(STATUS_LINE[refusal.status] + lines + b"\r\n" + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._linger_timer = self.loop.call_later(LINGER_S, self.abort)
