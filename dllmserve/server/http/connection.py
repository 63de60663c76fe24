"""uvicorn's HTTP/1.1 protocol with limits on what a connection may hold, and for how long.

uvicorn limits an idle keep-alive connection and nothing else: it keeps a connection for ever that
sends half a request or never reads its answer. The invariant here: an open connection either has
a request being answered, whose body :class:`~dllmserve.server.http.body.BodyGuard` times, or it
has a timer that ends it. :mod:`~dllmserve.server.http.slots` limits the number of connections.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from dllmserve.server.http.head import check_head, path_of
from dllmserve.server.http.http10 import speak_http_1_0
from dllmserve.server.http.refusal import Refused
from dllmserve.server.http.respond import ABORT, ANSWERED, LINGER_S
from dllmserve.server.http.slots import Connections, ConnectionSlot

#: requests that may wait on one connection for the answers before theirs
MAX_PIPELINED = 16
#: a client that reads fewer bytes than this in write_timeout_s counts as one that does not read
MIN_PROGRESS_BYTES = 65536
#: bytes given to the parser at once; a limit on unparsed bytes may be exceeded by so many
_SLICE = 2048
#: bytes read from a socket at once; reading stops while so many bytes wait to be parsed
_READ_BYTES = 65536

_log = logging.getLogger("dllmserve.access")

#: where the parser is: between requests, in the request line and headers, or in the body
_Part = Literal["idle", "head", "body"]


def _nothing() -> None:
    """Drop nothing: the connection has ended."""


class _Flow(FlowControl):
    """Does not resume reading while enough bytes wait to be parsed."""

    def __init__(self, transport: asyncio.Transport, crowded: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._crowded = crowded

    def resume_reading(self) -> None:
        """Read on, if there is room."""
        if not self._crowded():
            super().resume_reading()


class GuardedProtocol(HttpToolsProtocol):
    """One connection.

    Besides its limits it differs from uvicorn's own in this:

    - Heads that RFC 9112 forbids are refused, see :func:`~dllmserve.server.http.head.check_head`.
    - Malformed requests are answered with the error object, after the answers to earlier
      requests on the connection, and never inside an answer.
    - A client that leaves ends every request it had sent, pipelined ones included. Reading stops
      while 64 KiB of pipelined requests wait, so its leaving is not noticed during that time.
    - Trailers after a chunked body do not become headers.
    - ``Upgrade`` is ignored and the request's body is read, because some clients offer HTTP/2.
    - A request that was answered before its body was read cannot keep the connection for ever.
    - An HTTP/1.0 client gets no chunks and no ``100 Continue``, because it knows neither.

    Args:
        config, server_state, app_state: uvicorn's.
        connections: all connections of the server.
        slot: the slot of this connection.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        connections: Connections,
        slot: ConnectionSlot,
    ) -> None:
        super().__init__(config, server_state, app_state, asyncio.get_running_loop())
        self._connections = connections
        self._slot = slot
        self._limits = connections.limits
        self._stats = connections.stats
        self._part: _Part = "idle"
        self._header_count = 0
        self._header_bytes = 0
        # bytes since the parser last finished a part of a request
        self._unparsed = 0
        # of the body that is being received: its own bytes, and those of chunk sizes and extensions
        self._body_bytes = 0
        self._framing = 0
        self._upgrade_head: bytes | None = None
        # requests that are not answered completely, oldest first
        self._open_cycles: deque[RequestResponseCycle] = deque()
        # bytes received while a pipelined request waits; they are parsed when none waits
        self._held = bytearray()
        self._refusal: Refused | None = None
        self._has_turn = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the head timer; its time counts from when the connection was accepted."""
        super().connection_made(transport)
        self.flow = _Flow(transport, self._crowded)
        if hasattr(transport, "max_size"):  # else each read of 256 KiB
            transport.max_size = _READ_BYTES
        self._slot.drop = self.abort
        if self._slot.gone:  # dropped while its handshake ended
            self.abort()
        self._head_timer = self.loop.call_at(self._slot.deadline, self._on_head_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop every timer and tell every unanswered request that its client is gone."""
        self._connections.leave(self._slot)
        for timer in (self._head_timer, self._write_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._write_timer = self._linger_timer = None
        self._stop_keep_alive()
        self._end_turn()
        while self._open_cycles:
            self._disconnect(self._open_cycles.popleft())
        super().connection_lost(exc)
        # This breaks the reference cycles, so that the connection and its heads are freed with the
        # last task that uses them, and not later by the garbage collector.
        self.pipeline.clear()
        self._held.clear()
        self.cycle = self.scope = None  # type: ignore[assignment]
        self._slot.drop = _nothing

    def abort(self) -> None:
        """Drop the connection at once, with all unsent bytes. May be called at any time."""
        self.transport.abort()

    def shutdown(self) -> None:
        """Close when nothing is unanswered; uvicorn calls it when the server stops."""
        if not self.transport.is_closing():  # closed twice, a TLS transport cannot be aborted
            super().shutdown()
            self._watch_close()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection on which no further request came."""
        super().timeout_keep_alive_handler()
        self._watch_close()

    def data_received(self, data: bytes) -> None:
        """Parse the bytes that came, and answer a request that is refused."""
        if self._refusal is not None:
            return
        self._stop_keep_alive()
        self._held += data
        self._parse_held()

    def _parse_held(self) -> None:
        """Parse until a request has to wait for others, and read on if there is room."""
        held, at = self._held, 0
        try:
            while at < len(held) and not self.pipeline:
                self._parse(bytes(held[at : at + _SLICE]))
                at += _SLICE
        except Refused as refused:
            self._refuse(refused)
        except httptools.HttpParserError as error:
            cause = error.__context__
            if not isinstance(cause, Refused):
                text = "The request is not valid HTTP/1.1."
                if not isinstance(error, httptools.HttpParserCallbackError):
                    text = f"{text[:-1]}: {error}."  # fixed texts of the parser
                cause = Refused(400, "malformed_request", text)
            self._refuse(cause)
        del held[:at]
        if self._crowded():
            self.flow.pause_reading()
        elif self.cycle is None or len(self.cycle.body) <= HIGH_WATER_LIMIT:
            # uvicorn stops reading while a request waits, and would not notice that a client leaves
            self.flow.resume_reading()
        self._watch_read()

    def _crowded(self) -> bool:
        """Whether enough waits to be parsed."""
        return len(self._held) >= _READ_BYTES

    def _parse(self, data: bytes) -> None:
        """Give a few bytes to the parser; refuse a request with too many unparsed bytes."""
        cycle = self.cycle if self._part == "body" else None
        size, body_bytes = len(data), self._body_bytes
        self._unparsed += size
        self._feed(data)
        most = self._limits.max_header_bytes
        if self._unparsed > most:
            raise self._headers_too_large()
        if cycle is not None and self._part == "body" and self.cycle is cycle:
            self._framing += size - (self._body_bytes - body_bytes)
            if self._framing > most + self._body_bytes:
                text = (
                    f"Chunk sizes and extensions are limited to {most} bytes and the body's size;"
                )
                raise Refused(431, "headers_too_large", f"{text} send larger chunks.")

    def _feed(self, data: bytes) -> None:
        """Give bytes to the parser; parse a request that offers an upgrade a second time."""
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                # The parser took the request to have no body, so it is parsed again without the
                # header. The parser is new, because an old one stops after "Connection: close".
                data = (self._upgrade_head or b"") + data[upgrade.args[0] :]
                self._upgrade_head = None
                self._make_parser()

    def _make_parser(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        # as uvicorn does: bytes after the last request of a connection are ignored
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def _headers_too_large(self) -> Refused:
        most = self._limits.max_header_bytes
        text = f"Request line and headers are limited to {most} bytes; send less."
        return Refused(431, "headers_too_large", text)

    def on_message_begin(self) -> None:
        """A request's first byte."""
        if len(self._open_cycles) > MAX_PIPELINED:
            text = f"At most {MAX_PIPELINED} requests may wait on one connection; await answers."
            raise Refused(400, "too_many_pipelined", text)
        super().on_message_begin()
        calls: dict[str, Any] = {ABORT: self.abort, ANSWERED: self._on_answered}
        self.scope["extensions"] = calls
        self._part = "head"
        self._header_count = self._header_bytes = 0
        self._unparsed = self._body_bytes = self._framing = 0

    def on_url(self, url: bytes) -> None:
        """A part of the request's target."""
        super().on_url(url)
        if len(self.url) > self._limits.max_target_bytes:
            most = self._limits.max_target_bytes
            text = f"The request target is limited to {most} bytes; put data into the body."
            raise Refused(414, "target_too_long", text)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A complete header, or trailer."""
        self._header_count += 1
        self._header_bytes += len(name) + len(value) + 4
        if self._header_count > self._limits.max_headers:
            text = f"A request is limited to {self._limits.max_headers} headers; send fewer."
            raise Refused(431, "too_many_headers", text)
        if self._part == "body":
            # a trailer that became a header would not be checked by the guards
            return
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Check the head and start the request."""
        if self._header_bytes + len(self.url) > self._limits.max_header_bytes:
            raise self._headers_too_large()
        version = self.parser.get_http_version()
        check_head(version, self.url, self.headers)
        if self.parser.should_upgrade():
            self._ignore_upgrade(version)
            return
        if not self._connections.begin(self._slot, path_of(self.url), self.headers):
            most = self._limits.max_connections
            text = f"The server is answering its limit of {most} connections; try again later."
            raise Refused(503, "too_many_connections", text)
        super().on_headers_complete()
        if version == "1.0":
            speak_http_1_0(self.cycle)
        self._open_cycles.append(self.cycle)
        self._part = "body"
        self._unparsed = 0
        self._stop_head_timer()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """Answer a client's request at once; requests of probes and strangers take turns."""
        go = super()._start_asgi_task

        def start() -> bool:
            if self.transport.is_closing():
                return False
            self._has_turn = True
            go(cycle, app)
            return True

        if self._slot.busy:
            go(cycle, app)
        else:
            self._connections.take_turn(start)

    def _end_turn(self) -> None:
        if self._has_turn:
            self._has_turn = False
            self._connections.end_turn()

    def _ignore_upgrade(self, version: str) -> None:
        """Store the head of the request without the ``Upgrade`` header, to parse it again."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise Refused(400, "connect_not_supported", "This server is not a proxy.")
        head = [method, b" ", self.url, b" HTTP/", version.encode(), b"\r\n"]
        for name, value in self.headers:
            if name != b"upgrade":
                head += [name, b": ", value, b"\r\n"]
        self._upgrade_head = b"".join([*head, b"\r\n"])

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._unparsed = 0
        self._body_bytes += len(body)
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
                self._limits.header_timeout_s, self._on_head_timeout
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
        """Start a timer on a connection that has no unanswered request."""
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
            limit = self._limits.header_timeout_s
            text = f"The request's headers were not complete after {limit:g} seconds."
            self._refuse(Refused(408, "header_timeout", text))
        else:
            self._close()

    def pause_writing(self) -> None:
        """The write buffer is full: the client has to read from now on."""
        super().pause_writing()
        self._start_write_timer()
        self._end_turn()

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
                self._limits.write_timeout_s, self._on_write_timeout
            )

    def _on_write_timeout(self) -> None:
        self._write_timer = None
        if self._unsent - self.transport.get_write_buffer_size() >= MIN_PROGRESS_BYTES:
            self._start_write_timer()  # the client reads a large answer slowly
            return
        self._stats.dropped["slow_reader"] += 1
        self.abort()

    def _close(self) -> None:
        """Close once everything is sent, and in any case some time later."""
        if not self.transport.is_closing():
            self.transport.close()
            self._watch_close()

    def _watch_close(self) -> None:
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._start_write_timer()

    def on_response_complete(self) -> None:
        """Go on after an answer: with the next request, or with the refusal that waits."""
        self._end_turn()
        super().on_response_complete()
        if self._open_cycles:
            # the part of the body that the application did not read
            self._open_cycles.popleft().body.clear()
        if not self._open_cycles:
            self._connections.rest(self._slot)
        if self.transport.is_closing():
            self._watch_close()
        elif self._refusal is not None and not self._open_cycles:
            self._send_refusal(self._refusal)
        elif self._held and self._refusal is None and not self.pipeline:
            self._parse_held()
        else:
            self._watch_read()

    def _on_answered(self) -> None:
        """Make the connection idle: only the rest of a body is awaited, so it may be dropped."""
        self._end_turn()
        if len(self._open_cycles) <= 1:
            self._connections.rest(self._slot)

    def send_400_response(self, msg: str) -> None:
        """Answer a malformed request; kept for uvicorn, which calls it by this name."""
        self._refuse(Refused(400, "malformed_request", msg))

    def _refuse(self, refusal: Refused) -> None:
        """Read no more; answer with an error once all earlier requests are answered."""
        self._refusal = refusal
        self._held.clear()
        self._stats.refused[refusal.status] += 1
        fields = {"status": refusal.status, "code": refusal.code}
        _log.info("connection refused", extra=fields)
        self._stop_head_timer()
        if self._part == "body" and not self._drop_broken():
            self._close()
            for cycle in self._open_cycles:  # their answers cannot be completed
                self._disconnect(cycle)
        elif not self._open_cycles:
            self._send_refusal(refusal)

    def _drop_broken(self) -> bool:
        """Drop the request whose body was refused; False if its answer has begun already."""
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

    def _send_refusal(self, refusal: Refused) -> None:
        """Write the error and close, but not before the client had time to read it.

        Closing with unread data resets the connection, and the client may lose the answer. So
        only the writing side is closed, and further input is read and dropped for a moment.
        """
        self._stop_keep_alive()
        self._connections.rest(self._slot)
        more = self._connections.refusal_headers(self.headers or ())
        self.transport.write(refusal.answer([*self.server_state.default_headers, *more]))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._linger_timer = self.loop.call_later(LINGER_S, self.abort)
