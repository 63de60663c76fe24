"""The ASGI application.

``dllmserve serve`` is the way to run it. ``uvicorn dllmserve.server.app:app`` works, too, with
``MODEL_PATH`` and the ``DLLMSERVE_*`` variables; uvicorn then brings neither our limits on
slow connections nor draining with an open port.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from dllmserve import __version__
from dllmserve._checks import user_path
from dllmserve.errors import ConfigError, DllmServeError, EngineError
from dllmserve.server import failures, native, openai, ops
from dllmserve.server.http.auth import AuthGuard, presented
from dllmserve.server.http.body import BodyGuard
from dllmserve.server.http.logs import configure_logging
from dllmserve.server.http.places import Judge, Standing
from dllmserve.server.http.request_id import RequestLog
from dllmserve.server.http.respond import Headers, send_error
from dllmserve.server.jobs import Jobs
from dllmserve.server.service import Service
from dllmserve.server.settings import Settings, load_settings, with_port
from dllmserve.server.sse import ClientGone
from dllmserve.server.store import JobStore, MemoryStore, SqliteStore, StoreLimits
from dllmserve.server.turnstile import Turnstile
from dllmserve.server.workers import listening_port, refuse_several_workers

_log = logging.getLogger("dllmserve.server")

__all__ = ["app", "create_app"]

_NO_KEYS = (
    "This server has no API keys and answers its own machine only; its operator has to set "
    "DLLMSERVE_API_KEYS, or DLLMSERVE_INSECURE_NO_AUTH=true to let everybody in."
)


def create_app(settings: Settings, began: float | None = None) -> FastAPI:
    """The application, with its routes and without the guards around it.

    ``app.state.service`` and ``app.state.jobs`` are what it serves; whoever runs it starts
    and stops them, see :func:`lifespan`.

    Args:
        settings: all options.
        began: monotonic seconds at which the server began; None for when it opens its store.
    """
    made = FastAPI(
        title="dllmserve",
        version=__version__,
        description="Diffusion language models, served. Chats and completions that say nothing of "
        f"how they are decoded have quality={settings.server.default_quality!r}; jobs have the "
        "documented defaults of SamplingParams.",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    service = Service(settings)
    store, durable = _store(settings, began)
    made.state.service = service
    made.state.jobs = Jobs(service, store, sequential=settings.sequential_ids, durable=durable)
    for router in (native.router, openai.router, ops.router):
        made.include_router(router)
    ops.add_documentation(made)
    failures.install(made)
    made.add_exception_handler(ClientGone, _nobody)
    _describe(made, settings)
    return made


def _open_paths(settings: Settings) -> frozenset[str]:
    """Paths that need no key where others do."""
    return ops.OPEN_PATHS | ({"/metrics"} if settings.server.open_metrics else frozenset())


def judge(settings: Settings) -> Judge:
    """Tells probes, holders of keys and strangers apart, for their connections."""
    open_paths, keys = _open_paths(settings), settings.keys

    def standing(path: str, headers: Headers) -> Standing:
        if path in open_paths:
            return "probe"
        if keys is None:
            return "client"
        secrets = presented(headers)
        return "key" if len(secrets) == 1 and keys.match(secrets.pop()) else "stranger"

    return standing


def _most_calls(settings: Settings) -> int | None:
    """Calls of one key that may be in progress: others need connections, too."""
    most = max(1, 3 * settings.server.max_connections // 4)
    return most if settings.several_keys else None


#: headers of answers that the official clients, and those of the native API, read
EXPOSED = "X-Request-Id Retry-After X-Should-Retry Location Allow WWW-Authenticate".split()


def guarded(app: FastAPI, *, local_only: bool = False) -> ASGIApp:
    """The application behind its guards: CORS, log, keys, body limits.

    Args:
        app: from :func:`create_app`, with all of its routes.
        local_only: answer connections from this machine only.
    """
    service: Service = app.state.service
    settings, server = service.settings, service.settings.server
    inner: ASGIApp = Turnstile(app, service)
    inner = BodyGuard(
        inner,
        max_bytes=server.max_body_bytes,
        timeout_s=server.body_timeout,
        bodiless=_open_paths(settings),
    )
    inner = AuthGuard(
        inner,
        keys=settings.keys,
        open_paths=_open_paths(settings),
        rate=service.rate,
        max_calls_per_key=_most_calls(settings),
    )
    if local_only:
        inner = _LocalOnly(inner)
    inner = RequestLog(inner, metrics_hook=service.metrics.http, quiet=ops.PROBED)
    if not server.origins:
        return inner
    # outermost, so that a page can read the refusals of all guards; preflights end here
    return CORSMiddleware(
        inner,
        allow_origins=server.origins,
        allow_methods=["GET", "HEAD", "POST", "DELETE"],
        allow_headers=["*"],  # clients name their own; what is in them is judged with the request
        allow_private_network=True,
        expose_headers=EXPOSED,
        max_age=7200,  # no browser remembers for longer
    )


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Start everything before the first request, drain and stop after the last."""
    service: Service = app.state.service
    jobs: Jobs = app.state.jobs
    await jobs.open()
    try:
        await service.start()
        await jobs.resume()
        yield
        await service.drain(service.settings.server.shutdown_timeout)
    finally:
        await jobs.close()
        await service.stop()


def start_logging(settings: Settings) -> None:
    """Log in the form and from the level that the options say, first what was ignored there."""
    server = settings.server
    form = server.log_format
    if form == "auto":
        form = "text" if sys.stderr.isatty() else "json"
    configure_logging("json" if form == "json" else "text", server.log_level.upper())
    for variable in settings.ignored:
        _log.warning("the environment variable %s is no option and is ignored", variable)


def _store(settings: Settings, began: float | None) -> tuple[JobStore, bool]:
    """The job store, and whether it outlives the process."""
    server = settings.server
    limits = StoreLimits(
        ttl_s=server.result_ttl,
        max_results=server.max_results,
        max_bytes=server.max_result_bytes,
    )
    if server.job_store == "memory":
        return MemoryStore(limits), False
    if server.job_store != "auto":
        return SqliteStore(user_path(server.job_store), limits, began=began), True
    path = _state_directory() / "dllmserve" / f"jobs-{server.port}.sqlite3"
    return SqliteStore(path, limits, began=began), True


def _state_directory() -> Path:
    """Where programs of this user keep what outlives them, by the XDG base directories."""
    if given := os.environ.get("XDG_STATE_HOME"):
        return Path(given)
    try:
        return Path.home() / ".local" / "state"
    except RuntimeError as error:  # a container may run as a user without a name
        raise ConfigError(
            "this user has no home directory for the job store: give a file with --job-store, or "
            "set XDG_STATE_HOME"
        ) from error


async def _nobody(request: HttpRequest, error: Exception) -> Response:
    """The client has gone; the log says 499."""
    del request, error
    return Response(status_code=499)


def _describe(app: FastAPI, settings: Settings) -> None:
    """Make /openapi.json say what is true: our own errors, and keys where they are needed."""
    plain, secured, open_paths = app.openapi, settings.keys is not None, _open_paths(settings)

    def openapi() -> dict[str, Any]:
        schema = plain()
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if secured and path not in open_paths:
                    operation["security"] = [{"bearer": []}, {"header": []}]
        parts = schema.setdefault("components", {})
        for name in ("HTTPValidationError", "ValidationError"):
            parts.get("schemas", {}).pop(name, None)
        if secured:
            parts["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            }
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


class _FromEnvironment:
    """The application for ``uvicorn dllmserve.server.app:app``, made when the server starts."""

    def __init__(self) -> None:
        self._inner: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Start and stop with the lifespan, and serve in between."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self._inner is None:
            raise EngineError("the application was never started: do not give --lifespan off")
        else:
            await self._inner(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        configure_logging("text")
        async with AsyncExitStack() as stack:
            try:
                refuse_several_workers()
                settings = load_settings({}, os.environ)
                if port := listening_port(receive):
                    settings = with_port(settings, port)
                start_logging(settings)
                made = create_app(settings)
                await stack.enter_async_context(lifespan(made))
            except Exception as error:
                # raised, it would be taken for an application that knows no lifespan
                if not isinstance(error, DllmServeError):
                    _log.exception("dllmserve cannot start")
                text = f"dllmserve cannot start: {error}"
                await send({"type": "lifespan.startup.failed", "message": text})
                return
            # here we are not asked before a port is opened
            local_only = settings.keys is None and not settings.server.insecure_no_auth
            self._inner = guarded(made, local_only=local_only)
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})


class _LocalOnly:
    """ASGI middleware: 401 for what comes in on an address that other machines can reach."""

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


app = _FromEnvironment()
