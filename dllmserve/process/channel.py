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
#: a message is never larger; a longer one means that the two sides are out of step
MAX_MESSAGE = 1 << 28
_CHUNK = 1 << 18
#: bytes after which the engine turns to its step, whatever else waits in the socket: some sixty
#: prompts of 4,096 tokens, which take 30 ms to decode and to check
_ENOUGH = 1 << 20


class ChannelClosed(ConnectionError):
    """The other side is gone."""


class Channel:
    """One end that blocks: sends from any thread, receives with a timeout in one.

    Args:
        connected: the end.
        patience_s: seconds after which a send that the other side does not read has failed; None
            waits as long as it takes.
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
        """The end that a worker was started with. Its own child processes do not get it."""
        os.set_inheritable(descriptor, False)
        return cls(socket.socket(fileno=descriptor))

    def send(self, data: bytes) -> None:
        """Send a message. Raises ChannelClosed if the other side is gone, or reads no more."""
        try:
            with self._sending:
                self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise ChannelClosed(f"the other process is gone: {error}") from error

    def receive(self, timeout_s: float | None) -> list[bytes]:
        """Messages that are there; waits up to ``timeout_s`` for the first, with None for ever.

        What is more than a megabyte is left for the next call.

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
    """One end on an event loop. Made by :meth:`open`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, connected: socket.socket) -> Connection:
        """Take over an end; it is closed with the connection."""
        loop = asyncio.get_running_loop()
        reader = _LastWords(loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport, _ = await loop.create_unix_connection(lambda: protocol, sock=connected)
        return cls(reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    def send(self, data: bytes) -> None:
        """Send a message, sooner or later; a dead worker is noticed by :meth:`receive`."""
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


class _LastWords(asyncio.StreamReader):
    """Gives all that has arrived, also when the other side has left without reading its own.

    The system calls that a reset, and asyncio would forget what had come before it: that a
    request was admitted, for example, which a dead engine may have died of.
    """

    def set_exception(self, exc: BaseException) -> None:
        """The end, instead of an error."""
        self.feed_eof()
