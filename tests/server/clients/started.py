"""A real server: "dllmserve serve" in a process of its own, on a free port of this machine."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: seconds that loading may take on a busy machine
LOADING_S = 120.0

_LISTENING = re.compile(r"listening on http://127\.0\.0\.1:(\d+)")


@dataclass(frozen=True)
class Started:
    """A server that has loaded its model.

    Attributes:
        port: that it listens on.
        log: its stderr: JSON lines.
        process: the API process.
    """

    port: int
    log: Path
    process: "subprocess.Popen[bytes]"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def lines(self) -> list[dict[str, Any]]:
        """The log so far. Fails if a line is no JSON object."""
        whole = self.log.read_text(encoding="ascii")
        return [json.loads(line) for line in whole.split("\n")[:-1]]

    def requests(self) -> list[dict[str, Any]]:
        """The log's lines of requests that have ended."""
        return [line for line in self.lines() if line["message"] == "request"]


@contextlib.contextmanager
def started(folder: Path, *options: str, **environment: str) -> Iterator[Started]:
    """Run "dllmserve serve" with options until the end of the block.

    Args:
        folder: for its log and everything else that it writes.
        options: of the command line; the port is a free one.
        environment: more variables.
    """
    log = folder / "server.log"
    env = {
        # what a test run sets for itself is not for the server
        **{k: v for k, v in os.environ.items() if not k.startswith(("DLLMSERVE_", "PYTHONPATH"))},
        "OMP_NUM_THREADS": "1",
        "XDG_STATE_HOME": str(folder / "state"),
        **environment,
    }
    command = [sys.executable, "-m", "dllmserve", "serve", "--port", "0"]
    command += ["--log-format", "json", "--shutdown-timeout", "1"]
    with log.open("wb") as stderr:
        process = subprocess.Popen([*command, *options], env=env, stderr=stderr)
    try:
        yield Started(_port(process, log), log, process)
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()


def _port(process: "subprocess.Popen[bytes]", log: Path) -> int:
    until = time.monotonic() + LOADING_S
    while time.monotonic() < until:
        text = log.read_text()
        if " is ready after " in text and (found := _LISTENING.search(text)):
            return int(found[1])
        assert process.poll() is None, f"the server ended: {text}"
        time.sleep(0.02)
    raise AssertionError(f"the server did not get ready: {log.read_text()}")
