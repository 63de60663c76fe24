"""How errors become answers: one error object for every path."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from dllmserve._values import SparseConfig
from dllmserve.errors import (
    DeadlineError,
    DecisionError,
    DllmServeError,
    EngineDiedError,
    EngineStartError,
    JobStoreError,
    OutOfMemoryError,
    OverloadedError,
    TokenizerError,
)
from dllmserve.foreign import advice
from dllmserve.sampling_params import SamplingParams
from dllmserve.server.error_texts import explain
from dllmserve.server.http.escape import shown
from dllmserve.server.http.respond import SYSTEM_ONE, error_body, error_type

_log = logging.getLogger("dllmserve.server")

_DECODING = {f.name for kind in (SamplingParams, SparseConfig) for f in fields(kind)} - {"enabled"}
#: in place of texts that are for the log
_GENERAL: tuple[tuple[type[DllmServeError], str], ...] = (
    (
        EngineDiedError,
        "The engine failed while it answered this request, which was not run again: a part of "
        "the answer had been given out, or it had happened before.",
    ),
    (EngineStartError, "The engine could not be started again."),
    (
        OutOfMemoryError,
        "The engine ran out of memory for this request: send a shorter prompt, ask for a "
        "shorter answer, or try again later.",
    ),
    (JobStoreError, "The store of jobs failed; try again later."),
)


class ApiError(Exception):
    """A refusal, with all fields of the error object.

    Args:
        status: HTTP status.
        message: for the client.
        code: for programs.
        param: the request's field.
        headers: of the response.
        type: of the error object; by default what goes with the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        type: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.code, self.param, self.type = code, param, type
        self.headers = headers or {}


def as_api_error(error: Exception) -> ApiError:
    """The answer for any error. Errors of the server reveal nothing of its inside."""
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, DllmServeError):
        return ApiError(500, explained(error), code="server_error")
    message, status, headers = explained(error), error.http_status, {}
    if isinstance(error, DecisionError):  # whose clients know of no codes
        return ApiError(status, message, param=error.param and shown(error.param))
    if isinstance(error, TokenizerError):
        status = 400  # text for a checkpoint without tokenizer or template
    elif isinstance(error, OverloadedError):
        headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, EngineDiedError | DeadlineError):
        # the official client sends it again after every 5xx that does not say this
        headers["x-should-retry"] = "false"
    if status == 503:
        headers.setdefault("Retry-After", "1")
    return ApiError(status, message, code=error.code, headers=headers)


def explained(error: Exception) -> str:
    """The text of an error for clients.

    Errors of the engine and of the store hold texts of drivers and of the system, which are for the
    log only.
    """
    if not isinstance(error, DllmServeError):
        return "The server failed; its log has the reason."
    for kind, text in _GENERAL:
        if isinstance(error, kind):
            return text
    return str(error)


def log_failure(error: Exception) -> None:
    """Log what :func:`explained` leaves out."""
    if not isinstance(error, DllmServeError | ApiError):
        _log.error("a request failed", exc_info=error)
    elif isinstance(error, OverloadedError | DeadlineError):
        return  # nothing has failed; the request's own line has the status
    elif as_api_error(error).status >= 500:
        _log.warning("%s: %s", type(error).__name__, error)


def error_response(path: str, error: ApiError) -> Response:
    """The error object as a response."""
    content = error_body(
        error.message,
        type=error.type or error_type(error.status),
        code=error.code,
        param=error.param,
        path=path,
    )
    return Response(
        content, status_code=error.status, headers=error.headers, media_type="application/json"
    )


def install(app: FastAPI) -> None:
    """Add the error handlers to an app. RequestLog answers errors that no handler takes."""

    async def known(request: Request, error: Exception) -> Response:
        log_failure(error)
        answer = as_api_error(error)
        if answer.status == 400 and answer.param is None:
            answer.param = _named(request, answer.message)
        return error_response(request.scope["path"], answer)

    async def invalid(request: Request, error: Exception) -> Response:
        details: list[Any] = []
        if isinstance(error, RequestValidationError):
            details = list(error.errors())
        # its traceback is in a reference cycle with the body, which not every Starlette breaks
        error.__traceback__ = None
        if request.scope["path"] == SYSTEM_ONE:
            return _listed(details)
        return error_response(request.scope["path"], _invalid(request, details))

    async def routing(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        headers = dict(getattr(error, "headers", None) or {})
        if status == 405:
            headers["Allow"] = ", ".join(_methods(request))
        texts = {
            404: ("There is nothing under this path.", "not_found"),
            405: ("This path does not take this method.", "method_not_allowed"),
        }
        text, code = texts.get(status, ("The request cannot be read.", "invalid_request"))
        return error_response(
            request.scope["path"], ApiError(status, text, code=code, headers=headers)
        )

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(DllmServeError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, routing)


def _methods(request: Request) -> list[str]:
    """The methods of all routes of a path; Starlette names those of the first route only."""
    routes = request.app.router.routes
    return [
        method
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
        if any(r.matches({**request.scope, "method": method})[0] is Match.FULL for r in routes)
    ]


#: what is told of the bounds that a value breaks
_BOUNDS = ("min_length", "max_length", "ge", "gt", "le", "expected", "expected_tags")
#: most errors of a body that are told
_MAX_LISTED = 20


def _listed(details: Sequence[Mapping[str, Any]]) -> Response:
    """The errors that pydantic found, in the list that clients of pydantic's own APIs read.

    Values of the client are left out.
    """
    told = []
    for detail in details[:_MAX_LISTED]:
        place = [shown(step, 100) if isinstance(step, str) else step for step in detail["loc"]]
        one = {"loc": place, "msg": shown(detail["msg"], 500), "type": detail["type"]}
        bounds = {k: v for k, v in (detail.get("ctx") or {}).items() if k in _BOUNDS}
        told.append(one | ({"ctx": bounds} if bounds else {}))
    return JSONResponse({"detail": told}, status_code=422)


def _named(request: Request, message: str) -> str | None:
    """The field that a message is about, if it is one of a body or of SamplingParams.

    Messages begin with the field that is wrong: "prompt[3] is", "top_k=-1 must be".
    """
    first = re.split(r"[ =\[]", message, maxsplit=1)[0]
    schema, components = _schema_of(request, "body")
    schema = components.get(schema.get("$ref", "").rpartition("/")[2], schema)
    return first if first in _DECODING or first in schema.get("properties", ()) else None


def _invalid(request: Request, details: Sequence[Mapping[str, Any]]) -> ApiError:
    """The errors that pydantic found, in our words; values of the client are cut and escaped."""
    where = str(details[0]["loc"][0]) if details else "body"
    schema, components = _schema_of(request, where)

    def hint(name: str) -> str:
        if where == "query":
            taken = " and ".join(schema["properties"])
            return f"'s query; that takes {taken}"
        meant = advice(name, _DECODING, str, _belongs)
        places = _endpoints_with(request, name)
        # of a field that is there, too; why the native API has none is no help then
        told = meant if not places or meant.endswith("?") else ""
        return (places and f", but of {places}") + (told and f"; {told}")

    message, param = explain(details, schema, components, hint)
    return ApiError(400, message, code="invalid_parameter", param=param)


def _endpoints_with(request: Request, name: str) -> str:
    """Paths whose body has a field of this name that is more than tolerated."""
    described, found = request.app.openapi(), []
    for path, methods in described["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        reference = content.get("application/json", {}).get("schema", {}).get("$ref", "")
        body = described["components"]["schemas"].get(reference.rpartition("/")[2], {})
        taken = body.get("properties", {}).get(name)
        if taken is not None and "enum" not in taken:
            found.append(path)
    return ", ".join(found)


def _belongs(field: str, owner: str) -> str:
    """Where a field is given that no request has: the server's command line has the engine's."""
    option = f"--{field.replace('_', '-')}"
    return f"the server has it as {option}" if owner == "LLM" else f"{field} belongs to {owner}"


def _schema_of(request: Request, where: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What a request may have in its body, query or path, and the schemas that this names.

    Args:
        request: the request, once it has a route.
        where: "body", "query" or "path".
    """
    described = request.app.openapi()
    route = request.scope.get("route")
    methods = described["paths"].get(getattr(route, "path_format", ""), {})
    operation = methods.get(request.method.lower(), {})
    components = described.get("components", {}).get("schemas", {})
    if where == "body":
        content = operation.get("requestBody", {}).get("content", {})
        return content.get("application/json", {}).get("schema", {}), components
    asked = {p["name"]: p["schema"] for p in operation.get("parameters", ()) if p["in"] == where}
    return {"type": "object", "properties": asked}, components
