"""What another host that runs the application has been told: how many workers, which port.

Several worker processes cannot serve one model: each would load its own, with its own jobs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any

from starlette.types import Receive

from dllmserve.errors import ConfigError

_REASON = (
    "dllmserve runs in one server process: another worker would load the model once more and "
    "not know the jobs of the first. Use one worker here; to grow, give --data-parallel-size, or "
    "run several servers behind a gateway (docs/serving.md)"
)


def refuse_several_workers(receive: Receive) -> None:
    """Raise ConfigError in a worker of a host that was told to run several.

    uvicorn and hypercorn are asked, and gunicorn with uvicorn's worker. Under others the second
    worker finds that the job store is in use, if that is a file.

    Args:
        receive: of the lifespan; it belongs to an object that has the host's options.

    Raises:
        ConfigError: this process is one of several workers.
    """
    config = _config(receive)
    reloads = getattr(config, "should_reload", False)  # uvicorn's; it then has one worker
    # a method of gunicorn's worker, which has gunicorn's options
    gunicorn = getattr(getattr(config, "callback_notify", None), "__self__", None)
    told = getattr(getattr(gunicorn, "cfg", config), "workers", None) or 1
    if told < 2 or reloads:
        return
    if multiprocessing.parent_process() is not None:
        # uvicorn would start refused workers again for ever
        os.kill(os.getppid(), signal.SIGTERM)
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
    config = _config(receive)
    port = getattr(config, "port", None)
    elsewhere = getattr(config, "uds", None) or getattr(config, "fd", None) is not None
    return port if isinstance(port, int) and port and not elsewhere else None


def _config(receive: Receive) -> Any:
    """The options of the host; None if they are not found."""
    return getattr(getattr(receive, "__self__", None), "config", None)
