"""For the application under other ASGI hosts than ``dllmserve serve``.

They listen where they like, show what a start raised as a traceback, and may be told to run several
workers. These cannot serve one model: each would load its own, with its own jobs.
"""

from __future__ import annotations

import ipaddress
import logging
import multiprocessing
import os
import signal
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dllmserve.errors import ConfigError, DllmServeError
from dllmserve.server.http.respond import send_error

_log = logging.getLogger("dllmserve.server")

_NO_KEYS = (
    "This server has no API keys and answers its own machine only; its operator has to set "
    "DLLMSERVE_API_KEYS, or DLLMSERVE_INSECURE_NO_AUTH=true to let everybody in."
)
_REASON = (
    "dllmserve runs in one server process: another worker would load the model once more and "
    "not know the jobs of the first. Use one worker here; to grow, give --data-parallel-size, or "
    "run several servers behind a gateway (docs/server_deployment.md)"
)


def refuse_several_workers(receive: Receive) -> None:
    """Raise ConfigError in a worker of a host that was told to run several.

    The options of uvicorn, hypercorn, and gunicorn with uvicorn's worker are known. Under another
    host, the second worker finds that the job store is in use, if that is a file.

    Args:
        receive: the lifespan's; it is a method of an object that has the host's options.

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
    """The port that uvicorn listens on, or is about to; None if it is not known.

    The job file is named after the port, so that two servers on one machine use different files.
    ASGI does not tell the port to the application, and gunicorn's worker does not know it either.

    Args:
        receive: the lifespan's; it is a method of an object that has uvicorn's options.
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


class PlainStart:
    """ASGI middleware that tells the host, in one sentence, why the application cannot start."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, except the traceback that the framework would send."""
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        failed = False

        async def tell(message: Message) -> None:
            nonlocal failed
            failed = message["type"] == "lifespan.startup.failed"
            if not failed:
                await send(message)

        try:
            await self.app(scope, receive, tell)
        except Exception as error:
            if failed:
                await say_why(send, error)
            raise


async def say_why(send: Send, error: Exception) -> None:
    """Tell the host why the start failed; the traceback of a bug is logged."""
    if not isinstance(error, DllmServeError):
        _log.exception("dllmserve cannot start")
    text = f"dllmserve cannot start: {error}"
    await send({"type": "lifespan.startup.failed", "message": text})


class LocalOnly:
    """ASGI middleware: 401 for requests on an address that other machines can reach.

    ``dllmserve serve`` refuses such an address without keys; other hosts may listen on any.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on."""
        if scope["type"] == "http" and not _is_local(scope):
            await send_error(scope, send, 401, _NO_KEYS, code="missing_api_key", receive=receive)
        else:
            await self.app(scope, receive, send)


def _is_local(scope: Scope) -> bool:
    """Whether a connection came in on an address that only this machine can reach."""
    host, port = scope.get("server") or ("", 0)
    if port is None:  # a UNIX socket
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
