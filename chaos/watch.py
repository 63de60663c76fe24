"""Looks at /health from a process of its own, so that a busy client does not count as the server.

    python -m chaos.watch PORT

It looks, on a new connection each time, until its input is closed, and then writes the seconds
of each look as JSON; a look that did not get 200 counts as FAILED_S.
"""

from __future__ import annotations

import asyncio
import json
import select
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

PAUSE_S = 0.05
FAILED_S = 99.0
_REQUEST = b"GET /health HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"


def look(port: int) -> float:
    """Seconds of one look."""
    began = time.monotonic()
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=FAILED_S) as connection:
            connection.sendall(_REQUEST)
            answer = b""
            while piece := connection.recv(4096):
                answer += piece
    except OSError:
        return FAILED_S
    return time.monotonic() - began if answer.startswith(b"HTTP/1.1 200") else FAILED_S


def main() -> None:
    """Look until told to stop."""
    port, seconds = int(sys.argv[1]), []
    while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
        seconds.append(look(port))
    sys.stdout.write(json.dumps(seconds))


@asynccontextmanager
async def watching(port: int) -> AsyncIterator[list[float]]:
    """Look at /health for as long as the block runs; the list is filled at its end."""
    found: list[float] = []
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "chaos.watch", str(port)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield found
        # closing its input is the sign to stop
        written, _ = await process.communicate(b"")
        found += json.loads(written)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


if __name__ == "__main__":
    main()
