"""Connections that misbehave: half a request, a body that trickles, an answer nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket

#: a receive window and a segment size that keep the system's buffers small, as a far client has
_WINDOW, _SEGMENT = 4096, 536
_DRIP_S = 0.5


async def half_header(port: int, patience_s: float) -> float | None:
    """Send half of the headers and wait; seconds until the server closed, or None."""
    return await _until_closed(
        port, b"POST /v1/generate HTTP/1.1\r\nHost: h\r\nX-A", b"", patience_s
    )


async def slow_body(port: int, patience_s: float) -> float | None:
    """Send a byte of the body now and then; seconds until the server closed, or None."""
    head = (
        b"POST /v1/generate HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\n\r\n{"
    )
    return await _until_closed(port, head, b" ", patience_s)


async def _until_closed(port: int, first: bytes, drip: bytes, patience_s: float) -> float | None:
    loop = asyncio.get_running_loop()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began = loop.time()
    dripping = asyncio.create_task(_drip(writer, drip)) if drip else None
    writer.write(first)
    try:
        async with asyncio.timeout(patience_s):
            # an answer such as 408 may come first
            while await reader.read(4096):
                continue
        return loop.time() - began
    except ConnectionError:
        return loop.time() - began
    except TimeoutError:
        return None
    finally:
        if dripping is not None:
            dripping.cancel()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _drip(writer: asyncio.StreamWriter, piece: bytes) -> None:
    while not writer.is_closing():
        await asyncio.sleep(_DRIP_S)
        writer.write(piece)


class Reader:
    """A client on a connection with small buffers, which reads only when it is told to.

    Args:
        port: of the server.
        path, body: of the request.

    Attributes:
        port: of this end, once connected.
    """

    def __init__(self, port: int, path: str, body: object) -> None:
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        self._request = head.encode() + data
        self._server = ("127.0.0.1", port)
        self._socket = socket.socket()
        self.port = 0

    async def ask(self) -> None:
        """Connect and send the request."""
        loop = asyncio.get_running_loop()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WINDOW)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT)
        self._socket.setblocking(False)
        await loop.sock_connect(self._socket, self._server)
        self.port = self._socket.getsockname()[1]
        await loop.sock_sendall(self._socket, self._request)

    async def read(self) -> int:
        """Read to the end; the number of bytes."""
        loop, size = asyncio.get_running_loop(), 0
        with contextlib.suppress(ConnectionError):
            while piece := await loop.sock_recv(self._socket, 1 << 16):
                size += len(piece)
        return size

    def close(self) -> None:
        """Leave."""
        self._socket.close()
