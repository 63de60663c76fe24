"""Listener: accepts connections, and counts and times them from then on, before any handshake.

asyncio's own servers make a protocol after the TLS handshake, for which they wait up to 60 seconds,
and count nothing before. When there are no open files left, they log a line for each attempt, as
fast as they can. Here a connection has a slot and a deadline from the moment that it is accepted,
with TLS or without.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from dllmserve.server.http.connection import GuardedProtocol
from dllmserve.server.http.logs import OncePerSecond
from dllmserve.server.http.refusal import Refused
from dllmserve.server.http.respond import LINGER_S
from dllmserve.server.http.slots import Connections, ConnectionSlot, group

#: connections that are accepted in a row, before the open connections are served again
AT_ONCE = 16
#: connections that the system keeps waiting for accept()
BACKLOG = 2048
#: bytes of the read buffer that asyncio allocates for a TLS connection as soon as it is accepted;
#: its default of 256 KiB would let senders without a key take much memory
_TLS_BUFFER = 32 * 1024
#: seconds until the next attempt when a connection could not be accepted
_RETRY_S = 0.1
#: errors of the system that mean: no file, or no memory, for another connection
_SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_log = logging.getLogger("dllmserve.server")


class Listener:
    """Accepts the connections of one listening socket.

    Args:
        sock: bound, listening, not blocking. Whoever opened it closes it.
        connections: gives slots to new connections, or refuses them.
        make: makes the protocol of a connection.
        context: for TLS.
        at_once: connections accepted in one go.
    """

    def __init__(
        self,
        sock: socket.socket,
        connections: Connections,
        make: Callable[[ConnectionSlot], asyncio.Protocol],
        *,
        context: ssl.SSLContext | None = None,
        at_once: int = AT_ONCE,
    ) -> None:
        self._sock = sock
        self._connections = connections
        self._make = make
        self._context = context
        self._at_once = at_once
        self._loop = asyncio.get_running_loop()
        # connections whose protocol has not started
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting: set[socket.socket] = set()
        self._pause_timer: asyncio.TimerHandle | None = None
        self._short = OncePerSecond(_log, logging.WARNING)
        self._full = OncePerSecond(_log, logging.WARNING)
        self._handshakes = OncePerSecond(_log, logging.INFO)
        self._crowds = OncePerSecond(_log, logging.INFO)
        self._answer_to_crowds = _crowded(connections)
        if context is not None:
            SSLProtocol.max_size = _TLS_BUFFER
        self._loop.add_reader(sock, self._accept)

    def close(self) -> None:
        """Stop accepting, and end the connections that are in their handshake."""
        self._loop.remove_reader(self._sock)
        if self._pause_timer is not None:
            self._pause_timer.cancel()
            self._pause_timer = None
        for sock in self._starting:
            _shut(sock)

    async def wait_closed(self) -> None:
        """Wait until no connection is in its handshake."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _accept(self) -> None:
        """Accept a few of the waiting connections."""
        for _ in range(self._at_once):
            wait = self._connections.seconds_to_room()
            if wait > 0:
                self._pause(wait)
                return
            try:
                sock, address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._not_accepted(error)
                return
            self._take(sock, address)

    def _not_accepted(self, error: OSError) -> None:
        """Drop idle connections if files are missing, and try again a moment later."""
        dropped = self._connections.give_files() if error.errno in _SHORT else 0
        self._short("no connection can be accepted", reason=error.strerror, dropped=dropped)
        self._pause(_RETRY_S)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._sock)
        self._pause_timer = self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        self._pause_timer = None
        self._loop.add_reader(self._sock, self._accept)

    def _take(self, sock: socket.socket, address: Any) -> None:
        """Start a connection, or close it."""
        who = group(sock.family, address)
        if self._connections.crowded(who):
            self._connections.stats.refused[429] += 1
            self._crowds("too many connections of one address")
            self._turn_away(sock)
            return
        slot = self._connections.enter(who, lambda: _shut(sock))
        if slot is None:
            self._full("all connections have requests under way; more are closed")
            sock.close()
            return
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            # asyncio sets this only if the listening socket was made with an explicit protocol.
            # Without it each answer waits 40 ms between its headers and its body
            with contextlib.suppress(OSError):  # the client has left already
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._starting.add(sock)
        task = self._loop.create_task(self._start(sock, slot))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start(self, sock: socket.socket, slot: ConnectionSlot) -> None:
        """Do the TLS handshake, if TLS is used, and start the protocol."""
        seconds: dict[str, float] = {}
        if self._context is not None:
            left = max(slot.deadline - self._loop.time(), 0.001)
            seconds = {"ssl_handshake_timeout": left, "ssl_shutdown_timeout": LINGER_S}
        try:
            await self._loop.connect_accepted_socket(
                lambda: self._make(slot), sock, ssl=self._context, **seconds
            )
        except OSError as error:  # ssl.SSLError among them
            if not slot.gone:
                self._connections.stats.dropped["handshake"] += 1
                self._handshakes("a TLS handshake failed", reason=_reason(error))
            self._connections.leave(slot)
            # the traceback is in a reference cycle that holds the buffer of the TLS connection
            error.__traceback__ = None
        except BaseException:
            self._connections.leave(slot)
            raise
        finally:
            self._starting.discard(sock)

    def _turn_away(self, sock: socket.socket) -> None:
        """Close a connection, and answer it before if that takes no TLS handshake."""
        with contextlib.suppress(OSError):  # the client has left already
            sock.setblocking(False)
            if self._context is None:
                sock.send(self._answer_to_crowds)
                sock.shutdown(socket.SHUT_WR)
                # closing with unread data would reset the connection
                sock.recv(65536)
        sock.close()


class GuardedServer(uvicorn.Server):
    """uvicorn's server with our listener, and without uvicorn's signal handling.

    Args:
        config: uvicorn's; its choice of protocols is ignored.
        connections: all connections of this server.
        at_once: see :class:`Listener`.
    """

    def __init__(
        self, config: uvicorn.Config, connections: Connections, at_once: int = AT_ONCE
    ) -> None:
        super().__init__(config)
        self._connections = connections
        self._at_once = at_once

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept from sockets that are bound."""
        await self.lifespan.startup()
        self.servers = []
        for sock in sockets or ():
            sock.setblocking(False)
            sock.listen(BACKLOG)
            listener = Listener(
                sock,
                self._connections,
                self._protocol,
                context=self.config.ssl,
                at_once=self._at_once,
            )
            self.servers.append(listener)  # type: ignore[arg-type]
        self.started = True

    def _protocol(self, slot: ConnectionSlot) -> GuardedProtocol:
        state = self.lifespan.state
        return GuardedProtocol(self.config, self.server_state, state, self._connections, slot)


def _crowded(connections: Connections) -> bytes:
    """The answer to a connection of an address that has too many."""
    most = connections.limits.max_per_address
    text = f"An address is limited to {most} open connections; close some, or use them again."
    refused = Refused(429, "too_many_connections", text)
    return refused.answer(list(connections.refusal_headers(())))


def _shut(sock: socket.socket) -> None:
    """Shut a connection down. The code that reads from it sees its end and closes it."""
    with contextlib.suppress(OSError):  # it has ended already
        sock.shutdown(socket.SHUT_RDWR)


def _reason(error: OSError) -> str:
    """Why a handshake failed, without any address."""
    return getattr(error, "reason", None) or error.strerror or type(error).__name__
