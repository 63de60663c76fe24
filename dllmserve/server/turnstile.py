"""Refuses requests that have no room before anything is done with them.

A refusal inside the application costs several times as much, and when hundreds of clients are
refused at once, that time is missing for health checks and for the requests that were taken.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from dllmserve.errors import OverloadedError
from dllmserve.server.failures import as_api_error, error_response
from dllmserve.server.service import Service


@dataclass(frozen=True)
class Route:
    """Stands for a route of the app in logs and metrics."""

    path: str


def generating(app: FastAPI) -> list[tuple[Route, re.Pattern[str]]]:
    """The routes that ask for something of the engine: whatever is sent by POST."""
    paths: dict[str, dict[str, object]] = app.openapi()["paths"]
    return [(Route(p), compile_path(p)[0]) for p, methods in paths.items() if "post" in methods]


class Turnstile:
    """ASGI middleware behind the key and body guards: 503 while nothing can be taken.

    A key that has its share gets 429. The application checks again, as it alone knows how much a
    request needs.

    Args:
        app: the application, with all of its routes.
        service: knows whether there is room.
    """

    def __init__(self, app: FastAPI, service: Service) -> None:
        self.app: ASGIApp = app
        self.service = service
        self._routes = generating(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        route = self._route(scope)
        if route is not None:
            try:
                self.service.require_engine(scope.get("state", {}).get("owner", ""))
            except OverloadedError as error:
                scope["route"] = route
                refusal = error_response(scope["path"], as_api_error(error))
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _route(self, scope: Scope) -> Route | None:
        """The route that will take a request, if it needs room."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return None
        found = (r for r, pattern in self._routes if pattern.match(scope["path"]))
        return next(found, None)
