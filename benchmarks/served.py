"""A server for a benchmark, from its start to its end."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from dllmserve.tools.bench.serve.http import HttpClient, Reply

START_S = 120


@contextmanager
def served(arguments: Sequence[str], variables: Mapping[str, str]) -> Iterator[int]:
    """Run ``dllmserve serve``; gives its port once it is ready.

    Args:
        arguments: of the command, besides the port.
        variables: of its environment, besides ours.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "dllmserve", "serve", *arguments, "--port", str(port)]
    process = subprocess.Popen(command, env={**os.environ, **variables})
    try:
        asyncio.run(_ready(port))
        yield port
    finally:
        process.terminate()
        process.wait(30)


async def _ready(port: int) -> None:
    """Wait for the server."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        try:
            client = HttpClient(f"http://127.0.0.1:{port}", {})
            reply = Reply()
            await client.exchange("GET", "/ready", b"", reply)
            await client.close()
            if reply.status == 200:
                return
        except Exception as error:
            if time.monotonic() > until:
                raise RuntimeError("the server did not start") from error
        await asyncio.sleep(0.2)
    raise RuntimeError("the server did not start")
