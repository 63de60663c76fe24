"""Refuses requests that have no room before anything is done with them.

A refusal inside the application costs several times as much, and when hundreds of clients are
refused at once, that time is missing for health checks and for the requests that were taken.
"""

from __future__ import annotations

from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from dllmserve.errors import OverloadedError
from dllmserve.server.failures import as_api_error, error_response
from dllmserve.server.service import Service

#: what takes a place in the engine
PATHS = frozenset(
    {
        "/v1/generate",
        "/v1/generate_batch",
        "/v1/generate/stream",
        "/v1/completions",
        "/v1/chat/completions",
    }
)


@dataclass(frozen=True)
class _Route:
    """Stands for the application's route, in logs and metrics."""

    path: str


class Turnstile:
    """ASGI middleware behind the key and body guards: 503 while nothing can be taken.

    The application checks again, as it alone knows how much a request needs.

    Args:
        app: the application.
        service: knows whether there is room.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in PATHS:
            try:
                self.service.require_engine()
            except OverloadedError as error:
                scope["route"] = _Route(scope["path"])
                refusal = error_response(scope["path"], as_api_error(error))
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)
