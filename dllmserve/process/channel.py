"""The socket between the engine process and its owner: messages with their length in front."""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

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
    """The engine's side: blocking sends from any thread, receives with a timeout in one.

    Args:
        path: the owner's socket.
        owner: its process id; None for any.

    Raises:
        OSError: nobody listens there.
        ChannelClosed: another process than the owner listens there.
    """

    def __init__(self, path: str, owner: int | None = None) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        if owner is not None and _peer_pid(self._socket) not in (owner, None):
            self._socket.close()
            raise ChannelClosed("another process than the engine's owner listens there")
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._buffer = bytearray()
        self._sending = threading.Lock()

    def send(self, data: bytes) -> None:
        """Send a message. Raises ChannelClosed if the owner is gone."""
        try:
            with self._sending:
                self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise ChannelClosed(f"the engine's owner is gone: {error}") from error

    def receive(self, timeout_s: float) -> list[bytes]:
        """Messages that are there; waits up to ``timeout_s`` for the first.

        What is more than a megabyte is left for the next call.

        Raises:
            ChannelClosed: the owner is gone.
        """
        wait, read = timeout_s, 0
        while read < _ENOUGH and self._poll.poll(wait * 1000):
            try:
                chunk = self._socket.recv(_CHUNK)
            except OSError as error:
                raise ChannelClosed(f"the engine's owner is gone: {error}") from error
            if not chunk:
                raise ChannelClosed("the engine's owner has closed the socket")
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
    """The owner's side of an engine's socket, on an event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def send(self, data: bytes) -> None:
        """Send a message, sooner or later; a dead engine is noticed by :meth:`receive`."""
        self._writer.write(_LENGTH.pack(len(data)) + data)

    async def receive(self) -> bytes | None:
        """The next message, or None once the engine is gone."""
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


class Listener:
    """A socket in a directory that only this user can enter, for one engine.

    The directory is removed as soon as the engine has connected, so nothing is left behind
    however either side ends.
    """

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="dllmserve-"))  # mode 0700
        self.path = str(self._directory / "engine.sock")
        self._arrived: asyncio.Queue[tuple[int | None, Connection]] = asyncio.Queue()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Begin to listen.

        Raises:
            OSError: the path is too long for a socket (set TMPDIR), or cannot be bound.
        """
        loop = asyncio.get_running_loop()

        def protocol() -> asyncio.StreamReaderProtocol:
            return asyncio.StreamReaderProtocol(_LastWords(loop=loop), self._accept, loop=loop)

        self._server = await loop.create_unix_server(protocol, self.path)

    async def accept(self, pid: int) -> Connection:
        """Wait for process ``pid`` to connect; whoever else does is sent away."""
        while True:
            peer, connection = await self._arrived.get()
            if peer in (pid, None):
                return connection
            connection.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = _peer_pid(writer.get_extra_info("socket"))
        self._arrived.put_nowait((peer, Connection(reader, writer)))

    def close(self) -> None:
        """Stop listening and remove the directory."""
        if self._server is not None:
            self._server.close()
        # unlike shutil.rmtree, this works when no more files can be opened
        with suppress(OSError):
            Path(self.path).unlink(missing_ok=True)
            self._directory.rmdir()


def _peer_pid(connected: socket.socket) -> int | None:
    """Process on the other side of a UNIX socket; None where the system does not tell."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    size = struct.calcsize("3i")
    found = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid: int = struct.unpack("3i", found)[0]
    return pid
