"""The ASGI application: routes, guards and lifespan.

``dllmserve serve`` is the way to run it. Any other ASGI host can run what :func:`create_app` gives,
or ``dllmserve.server.app:app`` with ``MODEL_PATH`` and the ``DLLMSERVE_*`` variables. Other hosts
bring neither our limits on slow connections nor draining with an open port.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.middleware import Middleware
from fastapi.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dllmserve import __version__
from dllmserve._checks import user_path
from dllmserve.errors import ConfigError, EngineError
from dllmserve.server import (
    decisions,
    failures,
    infill,
    llama_cpp,
    native,
    openai,
    ops,
    responses,
    systemone,
    tokens,
)
from dllmserve.server.admission_guard import AdmissionGuard
from dllmserve.server.hosts import (
    LocalOnly,
    PlainStart,
    listening_port,
    refuse_several_workers,
    say_why,
)
from dllmserve.server.http.auth import AuthGuard, presented
from dllmserve.server.http.body import BodyGuard
from dllmserve.server.http.logs import configure_logging
from dllmserve.server.http.request_id import RequestLog
from dllmserve.server.http.respond import SYSTEM_ONE, Headers
from dllmserve.server.http.slots import Classify, Sender
from dllmserve.server.jobs import Jobs
from dllmserve.server.service import Service
from dllmserve.server.settings import Settings, load_settings, with_port
from dllmserve.server.sse import ClientGone
from dllmserve.server.store import JobStore, SqliteStore, StoreLimits

_log = logging.getLogger("dllmserve.server")

__all__ = ["app", "create_app"]

#: of all endpoints
ROUTERS = (
    native.router,
    infill.router,
    openai.router,
    responses.router,
    decisions.router,
    systemone.router,
    llama_cpp.router,
    tokens.router,
    ops.router,
)


def create_app(settings: Settings, began: float | None = None) -> FastAPI:
    """The application, for any ASGI host.

    Its lifespan opens the job store and loads the model before the first request, and drains and
    stops after the last. ``app.state.service`` and ``app.state.jobs`` are what it serves.

    Args:
        settings: all options.
        began: monotonic seconds at which the server began; None for when it opens its store.

    Example:
        >>> from dllmserve.server.settings import load_settings
        >>> app = create_app(load_settings({"model": "tiny", "job_store": "memory"}, {}))
        >>> async def main():
        ...     async with app.router.lifespan_context(app):
        ...         return app.state.service.status
        >>> asyncio.run(main())  # doctest: +SKIP
        'ok'
    """
    service = Service(settings)
    store, durable = _store(settings, began)
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
        lifespan=_lifespan,
        middleware=_guards(service),
    )
    made.state.service = service
    made.state.jobs = Jobs(service, store, sequential=settings.sequential_ids, durable=durable)
    for router in ROUTERS:
        made.include_router(router)
    ops.add_documentation(made)
    failures.install(made)
    made.add_exception_handler(ClientGone, _nobody)
    _describe(made, settings)
    return made


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[asyncio.Task[None]]:
    """The open job store, and the task that loads the model; both are ended at the end."""
    service: Service = app.state.service
    jobs: Jobs = app.state.jobs

    async def load() -> None:
        await service.start()
        await jobs.resume()

    await jobs.open()
    loading = asyncio.create_task(load())
    try:
        yield loading
    finally:
        service.refuse_new()
        loading.cancel()
        await asyncio.wait({loading})
        await jobs.close()
        await service.stop()


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Start everything before the first request, drain and stop after the last."""
    service: Service = app.state.service
    async with running(app) as loading:
        await loading
        yield
        await service.drain(service.settings.server.shutdown_timeout)


def _open_paths(settings: Settings) -> frozenset[str]:
    """Paths that need no key where others do."""
    return ops.OPEN_PATHS | ({"/metrics"} if settings.server.open_metrics else frozenset())


def classifier(settings: Settings) -> Classify:
    """Tells probes, holders of keys and strangers apart, for their connections."""
    open_paths, keys = _open_paths(settings), settings.keys

    def classify(path: str, headers: Headers) -> Sender:
        if path in open_paths:
            return "probe"
        if keys is None:
            return "client"
        secrets = presented(headers)
        return "key" if len(secrets) == 1 and keys.match(secrets.pop()) else "stranger"

    return classify


def _most_calls(settings: Settings) -> int | None:
    """Calls of one key that may be in progress: others need connections, too."""
    most = max(1, 3 * settings.server.max_connections // 4)
    return most if settings.several_keys else None


#: headers of answers that the official clients, and those of the native API, read
EXPOSED = (
    *("X-Request-Id", "X-Typesafe-Request-Id", "Retry-After", "X-Should-Retry", "Location"),
    *("Allow", "WWW-Authenticate"),
)


#: paths whose clients read the request's id from a header of their own
_ID_HEADERS = dict.fromkeys((SYSTEM_ONE, "/v1/models"), b"x-typesafe-request-id")


def _guards(service: Service) -> list[Middleware]:
    """What a request passes before it comes to a route, from the outside in."""
    settings, server = service.settings, service.settings.server
    open_paths = _open_paths(settings)
    guards = [Middleware(PlainStart)]
    if server.origins:
        # around all that answer, so that a page can read their refusals; preflights end here
        guards.append(_cors(server.origins))
    log = Middleware(
        RequestLog, metrics_hook=service.metrics.http, quiet=ops.PROBED, also=_ID_HEADERS
    )
    guards.append(log)
    if settings.keys is None and not server.insecure_no_auth:
        guards.append(Middleware(LocalOnly))
    auth = Middleware(
        AuthGuard,
        keys=settings.keys,
        open_paths=open_paths,
        rate=service.rate,
        max_calls_per_key=_most_calls(settings),
        unmetered_gets=native.POLLED,
    )
    body = Middleware(
        BodyGuard,
        max_bytes=server.max_body_bytes,
        timeout_s=server.body_timeout,
        bodiless=open_paths,
    )
    return [*guards, auth, body, Middleware(AdmissionGuard, service)]


def _cors(origins: Sequence[str]) -> Middleware:
    """Lets pages of these origins ask, and read what they are told."""
    return Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "HEAD", "POST", "DELETE"],
        allow_headers=["*"],  # clients name their own; what is in them is judged with the request
        allow_private_network=True,
        expose_headers=EXPOSED,
        max_age=7200,  # no browser remembers for longer
    )


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
        return SqliteStore(None, limits), False
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
                if path != SYSTEM_ONE:  # whose clients want it; others get a 400
                    operation["responses"].pop("422", None)
                if secured and path not in open_paths:
                    operation["security"] = [{"bearer": []}, {"header": []}]
        parts = schema.setdefault("components", {})
        prompts = parts["schemas"]["BatchRequest"]["properties"]["prompts"]
        prompts["maxItems"] = min(native.MAX_PROMPTS, settings.server.max_prompts)
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
    """The application for ``uvicorn dllmserve.server.app:app``, made when the host starts."""

    def __init__(self) -> None:
        self._app: FastAPI | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Make the application with the lifespan, and pass everything on to it."""
        if scope["type"] == "lifespan":
            configure_logging("text")
            try:
                self._app = _from_environment(receive)
            except Exception as error:
                await say_why(send, error)
                raise
        if self._app is None:
            raise EngineError("the application was never started: do not give --lifespan off")
        await self._app(scope, receive, send)


def _from_environment(receive: Receive) -> FastAPI:
    """An application with the options of the environment; ``receive`` is of its lifespan."""
    refuse_several_workers(receive)
    settings = load_settings({}, os.environ)
    if port := listening_port(receive):
        settings = with_port(settings, port)
    start_logging(settings)
    return create_app(settings)


app = _FromEnvironment()
