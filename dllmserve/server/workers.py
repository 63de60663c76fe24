"""What another server that runs the application has been told: how many workers, which port.

Several worker processes cannot serve one model: each would load its own, with its own jobs.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path

from starlette.types import Receive

from dllmserve.errors import ConfigError
from dllmserve.process.daemon import process_fields

_REASON = (
    "dllmserve runs in one server process: another worker would load the model once more and "
    "not know the jobs of the first. Use one worker here; to grow, give --data-parallel-size, or "
    "run several servers behind a gateway (docs/serving.md)"
)
_PROC = Path("/proc")


def refuse_several_workers() -> None:
    """Raise ConfigError in a worker of a multi-worker server.

    Raises:
        ConfigError: this process is one of several workers of uvicorn, which has been told to
            stop, or of gunicorn, which stops by itself.
    """
    if _of_uvicorn():
        # it would start refused workers again for ever
        os.kill(os.getppid(), signal.SIGTERM)
        raise ConfigError(_REASON)
    if _of_gunicorn():
        raise ConfigError(_REASON)


def listening_port(receive: Receive) -> int | None:
    """The port that uvicorn listens on or is about to; None if it is not known.

    The application is not told, and its job file is named after the port, so that two servers on
    one machine do not want the same one. gunicorn's worker does not know it either.

    Args:
        receive: of uvicorn's lifespan, whose object has uvicorn's options.
    """
    if os.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn"):
        return None
    config = getattr(getattr(receive, "__self__", None), "config", None)
    port = getattr(config, "port", None)
    elsewhere = getattr(config, "uds", None) or getattr(config, "fd", None) is not None
    return port if isinstance(port, int) and port and not elsewhere else None


def _of_uvicorn() -> bool:
    """Whether the parent starts several processes, unlike the one of ``--reload``."""
    if multiprocessing.parent_process() is None:
        return False
    if not _PROC.is_dir():
        return True  # it cannot be told apart from --reload
    parent = _command(os.getppid())
    if "--reload" not in parent and _told(parent, "UVICORN_WORKERS", "WEB_CONCURRENCY"):
        return True
    # however else they were asked for; but those that were refused before us may be gone
    return sum(_is_spawned(_command(child)) for child in _children(os.getppid())) > 1


def _of_gunicorn() -> bool:
    """Whether the parent is gunicorn and was told to fork several workers.

    A count in its configuration file is not seen; a job store in a file then refuses the second
    worker.
    """
    if not os.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn"):
        return False
    words = shlex.split(os.environ.get("GUNICORN_CMD_ARGS", "")) + _command(os.getppid())
    return _told(words, "WEB_CONCURRENCY")


def _told(words: Sequence[str], *variables: str) -> bool:
    """Whether a command line, or else the first variable that is set, asks for several workers."""
    values = [_count(words), *(os.environ.get(name, "") for name in variables)]
    given = next(filter(None, values), "")
    return given.isdigit() and int(given) > 1


def _count(words: Sequence[str]) -> str:
    """The number of workers in a command line; "" if there is none."""
    found = ""
    for place, word in enumerate(words):
        if word in ("-w", "--workers"):
            found = "".join(words[place + 1 : place + 2])
        elif word.startswith("--workers="):
            found = word.partition("=")[2]
        elif word.startswith("-w") and word[2:].isdigit():
            found = word[2:]
    return found


def _is_spawned(words: Sequence[str]) -> bool:
    """Whether a command line is that of a process that multiprocessing has spawned."""
    return "--multiprocessing-fork" in words


def _command(pid: int) -> list[str]:
    """Command line of a process; empty if it is gone."""
    try:
        text = (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return []
    return text.split("\0")


def _children(parent: int) -> list[int]:
    """Process ids of a process's children."""
    entries = [entry for entry in _PROC.iterdir() if entry.name.isdigit()]
    return [int(e.name) for e in entries if process_fields(e)[1:2] == [str(parent)]]
