"""The ASGI application.

``dllmserve serve`` is the way to run it. ``uvicorn dllmserve.server.app:app`` works, too, with
``MODEL_PATH`` and the ``DLLMSERVE_*`` variables; uvicorn then brings neither our limits on
slow connections nor draining with an open port.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from dllmserve import __version__
from dllmserve.server import failures, native, openai, ops
from dllmserve.server.http.auth import AuthGuard
from dllmserve.server.http.body import BodyGuard
from dllmserve.server.http.logs import configure_logging
from dllmserve.server.http.request_id import RequestLog
from dllmserve.server.jobs import Jobs
from dllmserve.server.service import Service
from dllmserve.server.settings import Settings, load_settings
from dllmserve.server.sse import ClientGone
from dllmserve.server.store import JobStore, MemoryStore, SqliteStore, StoreLimits
from dllmserve.server.workers import refuse_several_workers

_log = logging.getLogger("dllmserve.server")

__all__ = ["app", "create_app"]


def create_app(settings: Settings) -> FastAPI:
    """The application, with its routes and without the guards around it.

    ``app.state.service`` and ``app.state.jobs`` are what it serves; whoever runs it starts
    and stops them, see :func:`lifespan`.

    Args:
        settings: all options.
    """
    made = FastAPI(
        title="dllmserve",
        version=__version__,
        description="Diffusion language models, served.",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    service = Service(settings)
    store, durable = _store(settings)
    made.state.service = service
    made.state.jobs = Jobs(service, store, sequential=settings.sequential_ids, durable=durable)
    for router in (native.router, openai.router, ops.router):
        made.include_router(router)
    ops.add_documentation(made)
    failures.install(made)
    made.add_exception_handler(ClientGone, _nobody)
    _describe(made, secured=settings.keys is not None)
    return made


def guarded(app: FastAPI) -> ASGIApp:
    """The application behind its guards: log, CORS, keys, body limits."""
    service: Service = app.state.service
    settings, server = service.settings, service.settings.server
    inner: ASGIApp = BodyGuard(app, max_bytes=server.max_body_bytes, timeout_s=server.body_timeout)
    open_paths = ops.OPEN_PATHS | ({"/metrics"} if server.open_metrics else set())
    inner = AuthGuard(
        inner,
        keys=settings.keys,
        open_paths=open_paths,
        requests_per_minute=server.requests_per_minute,
        max_parallel_per_key=server.max_parallel_per_key,
    )
    if server.origins:
        inner = CORSMiddleware(
            inner,
            allow_origins=server.origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Api-Key", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After", "Location"],
        )
    return RequestLog(inner, metrics_hook=service.metrics.http)


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


def _store(settings: Settings) -> tuple[JobStore, bool]:
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
        return SqliteStore(Path(server.job_store).expanduser(), limits), True
    base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return SqliteStore(base / "dllmserve" / f"jobs-{server.port}.sqlite3", limits), True


async def _nobody(request: HttpRequest, error: Exception) -> Response:
    """The client has gone; the log says 499."""
    del request, error
    return Response(status_code=499)


def _describe(app: FastAPI, *, secured: bool) -> None:
    """Make /openapi.json say what is true: our own errors, and keys where they are needed."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        schema = plain()
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if secured and path not in ops.OPEN_PATHS:
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
    """The application for ``uvicorn dllmserve.server.app:app``, made when it is started."""

    def __init__(self) -> None:
        self._inner: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve; the first scope is the lifespan's."""
        if self._inner is None:
            refuse_several_workers()
            configure_logging("text")
            settings = load_settings({}, os.environ)
            made = create_app(settings)
            made.router.lifespan_context = lifespan
            self._inner = guarded(made)
        await self._inner(scope, receive, send)


app = _FromEnvironment()
