"""Several worker processes cannot serve one model: each would load its own, with its own jobs."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

from dllmserve.errors import ConfigError

_REASON = (
    "dllmserve runs in one server process: another worker would load the model once more and "
    "not know the jobs of the first. Use one worker here, and several servers behind a gateway "
    "to grow (docs/serving.md)"
)


def refuse_several_workers() -> None:
    """Raise ConfigError, and stop the parent, in a worker of a multi-worker server.

    The parent would start refused workers again for ever.
    """
    if int(os.environ.get("WEB_CONCURRENCY", "1") or "1") > 1 or _one_of_several():
        if multiprocessing.parent_process() is not None:
            os.kill(os.getppid(), signal.SIGTERM)
        raise ConfigError(_REASON)


def _one_of_several() -> bool:
    """Whether the parent was told to start more than one worker."""
    if multiprocessing.parent_process() is None:
        return False
    path = Path(f"/proc/{os.getppid()}/cmdline")
    if not path.is_file():
        return True  # it cannot be told apart from one worker with --reload
    words = path.read_bytes().decode(errors="replace").split("\0")
    for index, word in enumerate(words):
        name, _, value = word.partition("=")
        if name in ("--workers", "-w"):
            count = value or (words[index + 1] if index + 1 < len(words) else "")
            return count.isdigit() and int(count) > 1
    return False
