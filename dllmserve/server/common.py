"""Shared by all routers: the service and the owner of a request, documented answers, log facts."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest

from dllmserve.server.jobs import Jobs
from dllmserve.server.service import Run, Service
from dllmserve.server.strict_json import parse


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every refused request."""

    error: ErrorObject
    detail: str | None = None


#: characters of prompts in the log
_MAX_SHOWN = 200
_TEXTS = {
    400: "The request is wrong; the message says where.",
    401: "No key, or an unknown one.",
    404: "Not there, or not yours.",
    408: "The body took too long.",
    410: "It was there; the message says why it is not any more.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The key's limit is reached; see Retry-After.",
    500: "The server or its engine failed.",
    503: "Full, loading or shutting down; see Retry-After.",
    504: "The request did not finish in its time.",
}
#: statuses that any request with a body may get
_BODY = (400, 401, 408, 413, 415, 429, 500, 503)


def errors(*more: int, body: bool = True) -> dict[int | str, dict[str, Any]]:
    """Documented refusals of a route."""
    statuses = sorted({*more, *(_BODY if body else (401, 408, 413, 415, 429, 500))})
    return {s: {"model": ErrorAnswer, "description": _TEXTS[s]} for s in statuses}


def events(text: str, *names: str) -> dict[str, Any]:
    """Documentation of a stream of events.

    Args:
        text: what their data is.
        names: of the events; none for a stream of unnamed ones.
    """
    fields: dict[str, Any] = {"data": {"type": "string", "description": text}}
    if names:
        fields["event"] = {"type": "string", "enum": list(names)}
    item = {"type": "object", "properties": fields, "required": list(fields)}
    # "schema" would be of the whole body
    return {"text/event-stream": {"itemSchema": item}}


# async, because FastAPI runs other dependencies in a thread
async def service_of(http: HttpRequest) -> Service:
    """The service behind the app."""
    found: Service = http.app.state.service
    return found


async def jobs_of(http: HttpRequest) -> Jobs:
    """The jobs behind the app."""
    found: Jobs = http.app.state.jobs
    return found


async def owner_of(http: HttpRequest) -> str:
    """Digest of the key that the request came with; "" without keys."""
    return str(http.scope.get("state", {}).get("owner", ""))


ServiceOf = Annotated[Service, Depends(service_of)]
JobsOf = Annotated[Jobs, Depends(jobs_of)]
OwnerOf = Annotated[str, Depends(owner_of)]


class JsonRoute(APIRoute):
    """A route that refuses unknown query parameters, if it has any: a misspelt one would be lost.

    Clients put things of their own into other queries (``api-version``). Its body is read by
    :func:`~dllmserve.server.strict_json.parse`.
    """

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        """What FastAPI calls with the request."""
        handle = super().get_route_handler()
        known = {parameter.alias for parameter in self.dependant.query_params}

        async def read(http: HttpRequest) -> Response:
            if known and (unknown := http.query_params.keys() - known):
                found = [{"type": "extra_forbidden", "loc": ("query", n)} for n in sorted(unknown)]
                raise RequestValidationError(found)
            if self.body_field is None:
                return await handle(http)
            strict = _StrictRequest(http.scope, http.receive)
            if await strict.body():
                await strict.json()  # here, because FastAPI would wrap the error
            return await handle(strict)

        return read


class _StrictRequest(HttpRequest):
    async def json(self) -> Any:
        """The body's value, which is parsed once. Raises ApiError."""
        if not hasattr(self, "_json"):
            service: Service = self.app.state.service
            self._json = parse(await self.body(), service.most_ids)
            self._body = b" "  # free it; FastAPI asks for the value of a body that is not empty
        return self._json


def free_body(http: HttpRequest) -> None:
    """Free the parsed body, once it has been validated.

    FastAPI keeps it until the answer ends, and many requests may be waiting for their answers.
    """
    parsed = getattr(http, "_json", None)
    if isinstance(parsed, dict):
        parsed.clear()


def note(http: HttpRequest, **facts: Any) -> None:
    """Add facts to the request's line in the log."""
    http.scope.setdefault("state", {}).setdefault("log", {}).update(facts)


def note_prompts(http: HttpRequest, service: Service, prompts: object) -> None:
    """Add the prompts to the request's line, if the operator wants that."""
    if service.settings.server.log_prompts:
        text = ""
        for piece in json.JSONEncoder(ensure_ascii=False, default=str).iterencode(prompts):
            text += piece[:_MAX_SHOWN]
            if len(text) >= _MAX_SHOWN:  # a million token ids take a second to write
                break
        note(http, prompts=text[:_MAX_SHOWN])


def note_runs(http: HttpRequest, runs: list[Run], completion_tokens: int) -> None:
    """Add what a request cost to its line."""
    waits = [run.queue_time for run in runs if run.queue_time is not None]
    note(
        http,
        prompt_tokens=sum(run.request.prompt_len for run in runs),
        completion_tokens=completion_tokens,
        queue_ms=round(1000 * max(waits, default=0.0), 1),
    )
