"""The socket between a worker and its owner: messages with their length in front.

It is one of a pair that has no name, so nobody else can open it: no other user, no other engine.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
import threading

_LENGTH = struct.Struct(">I")
#: bytes of the largest message; a larger length means that the two sides are out of step
MAX_MESSAGE = 1 << 28
_CHUNK = 1 << 18
#: bytes that one receive() reads at most, so that the engine's next step does not wait for long:
#: some sixty prompts of 4,096 tokens, which take 30 ms to decode and to check
_ENOUGH = 1 << 20


class ChannelClosed(ConnectionError):
    """The other side is gone."""


class Channel:
    """One blocking end of the socket. Any thread may send; one thread receives, with a timeout.

    Args:
        connected: the end.
        patience_s: seconds after which a send fails if the other side does not read; None waits
            without a limit.
    """

    def __init__(self, connected: socket.socket, patience_s: float | None = None) -> None:
        self._socket = connected
        self._socket.settimeout(patience_s)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._buffer = bytearray()
        self._sending = threading.Lock()

    @classmethod
    def inherited(cls, descriptor: int) -> Channel:
        """The end that a worker inherited. The worker's own child processes do not inherit it."""
        os.set_inheritable(descriptor, False)
        return cls(socket.socket(fileno=descriptor))

    def send(self, data: bytes) -> None:
        """Send a message. Raises ChannelClosed if the other side is gone or does not read."""
        try:
            with self._sending:
                self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise ChannelClosed(f"the other process is gone: {error}") from error

    def receive(self, timeout_s: float | None) -> list[bytes]:
        """Return the messages that have arrived.

        Waits up to ``timeout_s`` seconds for the first, or without a limit for None. Reads about
        a megabyte at most; the next call returns the rest.

        Raises:
            ChannelClosed: the other side is gone.
        """
        wait, read = None if timeout_s is None else timeout_s * 1000, 0
        while read < _ENOUGH and self._poll.poll(wait):
            try:
                chunk = self._socket.recv(_CHUNK)
            except OSError as error:
                raise ChannelClosed(f"the other process is gone: {error}") from error
            if not chunk:
                raise ChannelClosed("the other process has closed the socket")
            self._buffer += chunk
            wait, read = 0.0, read + len(chunk)
        return self._whole()

    def _whole(self) -> list[bytes]:
        """Take the complete messages out of the buffer."""
        found, start, end = [], 0, len(self._buffer)
        while end - start >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer, start)
            if size > MAX_MESSAGE:
                raise ChannelClosed(f"a message of {size} bytes, over {MAX_MESSAGE}")
            if end - start - _LENGTH.size < size:
                break
            begin = start + _LENGTH.size
            found.append(bytes(self._buffer[begin : begin + size]))
            start = begin + size
        del self._buffer[:start]
        return found

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class Connection:
    """One end of the socket on an event loop. :meth:`open` makes it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, connected: socket.socket) -> Connection:
        """Take over an end; it is closed with the connection."""
        loop = asyncio.get_running_loop()
        reader = _KeepingReader(loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport, _ = await loop.create_unix_connection(lambda: protocol, sock=connected)
        return cls(reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    def send(self, data: bytes) -> None:
        """Queue a message for sending. :meth:`receive` notices a dead worker."""
        self._writer.write(_LENGTH.pack(len(data)) + data)

    async def receive(self) -> bytes | None:
        """The next message, or None once the other side is gone."""
        try:
            (size,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if size > MAX_MESSAGE:
                return None
            return await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, OSError):
            return None

    def close(self) -> None:
        """Close the socket."""
        self._writer.close()


class _KeepingReader(asyncio.StreamReader):
    """Returns everything that has arrived before it reports the end of the connection.

    A worker that dies with unread messages resets the connection. asyncio would then drop what
    the worker had sent before: that it admitted a request, for example, which may have killed it.
    """

    def set_exception(self, exc: BaseException) -> None:
        """Treat an error as the end of the stream."""
        self.feed_eof()
