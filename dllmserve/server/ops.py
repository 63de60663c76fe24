"""Routes for operators: health, readiness, liveness, metrics, documentation."""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Literal

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel

from dllmserve.server.common import ServiceOf, errors
from dllmserve.server.failures import ApiError

router = APIRouter(tags=["operation"])

_ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}


class Health(BaseModel):
    """The state of the server."""

    status: Literal["ok", "loading", "restarting", "draining", "stalled", "failed"]


def _answer(status: str, good: bool) -> Response:
    headers = {"Cache-Control": "no-store"} if good else {"Retry-After": "1"}
    return JSONResponse({"status": status}, status_code=200 if good else 503, headers=headers)


_UNWELL: dict[int | str, dict[str, Any]] = {
    503: {"model": Health, "description": "Not now; the status says why."},
    **{s: r for s, r in errors(body=False).items() if s not in (401, 429)},
}


async def health(service: ServiceOf) -> Response:
    """Whether requests are answered now, as far as the engine's heartbeats tell."""
    return _answer(service.status, service.status == "ok")


async def ready(service: ServiceOf) -> Response:
    """For load balancers: 503 while loading, restarting or shutting down."""
    return _answer(service.status, service.status == "ok")


async def live(service: ServiceOf) -> Response:
    """For supervisors: 503 if only a restart of the server would help."""
    return _answer(service.status, not service.lost)


_PROBES = {"/v1/health": health, "/health": health, "/ready": ready, "/live": live}
#: paths that need no key
OPEN_PATHS = frozenset(_PROBES)
#: paths that machines ask every few seconds
PROBED = OPEN_PATHS | {"/metrics"}

for _path, _handler in _PROBES.items():
    router.add_api_route(_path, _handler, response_model=Health, responses=_UNWELL)
    router.add_api_route(_path, _handler, methods=["HEAD"], include_in_schema=False)


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        **errors(body=False),
        200: {
            "description": "Prometheus text format.",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        },
    },
)
async def metrics(service: ServiceOf) -> Response:
    """Counters, gauges and histograms; docs/metrics.md explains them."""
    page = service.metrics.render(service.gauges())
    return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")


def add_documentation(app: FastAPI) -> None:
    """Serve /openapi.json and /docs, whose script and style come from this server."""

    @app.get("/openapi.json", include_in_schema=False)
    async def schema() -> Response:
        return JSONResponse(app.openapi())

    @app.get("/docs", include_in_schema=False)
    async def page() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url="/docs/swagger-ui-bundle.js",
            swagger_css_url="/docs/swagger-ui.css",
            swagger_favicon_url="data:,",
        )

    @app.get("/docs/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in _ASSETS:
            raise ApiError(404, "There is nothing under this path.", code="not_found")
        content = (files("fastapi_offline") / "static" / name).read_bytes()
        return Response(content, media_type=_ASSETS[name])
