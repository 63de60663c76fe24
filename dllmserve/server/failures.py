"""How errors become answers: one error object for every path."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from dllmserve.errors import (
    DllmServeError,
    EngineDiedError,
    OverloadedError,
    TokenizerError,
)
from dllmserve.sampling_params import SamplingParams
from dllmserve.server.http.escape import shown
from dllmserve.server.http.respond import error_body, error_type, wants_detail
from dllmserve.sparse.state import SparseConfig

_log = logging.getLogger("dllmserve.server")

_PARAMS = {f.name for kind in (SamplingParams, SparseConfig) for f in fields(kind)}
#: errors of a request body that are named
_MAX_ERRORS = 5


class ApiError(Exception):
    """A refusal with everything that the error object says.

    Args:
        status: HTTP status.
        message: for the client.
        code: for programs.
        param: the request's field.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.code, self.param = code, param
        self.headers = headers or {}


def as_api_error(error: Exception) -> ApiError:
    """Any error as an answer. What is not the client's fault says nothing of the inside."""
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, DllmServeError):
        return ApiError(500, "The server failed; its log has the reason.", code="server_error")
    message, status, headers = str(error), error.http_status, {}
    param = None
    if isinstance(error, TokenizerError):
        status = 400  # text for a checkpoint without tokenizer or template
    elif isinstance(error, OverloadedError):
        headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, EngineDiedError):
        # the official client retries every 5xx that does not say this
        headers["x-should-retry"] = "false"
    if status == 503:
        headers.setdefault("Retry-After", "1")
    if status == 400:
        first = message.split(" ", 1)[0].split("=", 1)[0]
        param = first if first in _PARAMS else None
    return ApiError(status, message, code=error.code, param=param, headers=headers)


def error_response(path: str, error: ApiError) -> Response:
    """The error object as a response."""
    content = error_body(
        error.message,
        type=error_type(error.status),
        code=error.code,
        param=error.param,
        detail=wants_detail(path),
    )
    return Response(
        content, status_code=error.status, headers=error.headers, media_type="application/json"
    )


def install(app: FastAPI) -> None:
    """Give an app the handlers."""

    async def known(request: Request, error: Exception) -> Response:
        found = as_api_error(error)
        if found.status >= 500 and not isinstance(error, OverloadedError):
            _log.warning("%s: %s", type(error).__name__, error)
        return error_response(request.scope["path"], found)

    async def invalid(request: Request, error: Exception) -> Response:
        details: list[Any] = []
        if isinstance(error, RequestValidationError):
            details = list(error.errors())
        return error_response(request.scope["path"], _invalid(details))

    async def routing(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        headers = dict(getattr(error, "headers", None) or {})
        texts = {
            404: ("There is nothing under this path.", "not_found"),
            405: ("This path does not take this method.", "method_not_allowed"),
        }
        text, code = texts.get(status, ("The request cannot be read.", "invalid_request"))
        return error_response(
            request.scope["path"], ApiError(status, text, code=code, headers=headers)
        )

    async def unknown(request: Request, error: Exception) -> Response:
        # the log of requests has the traceback
        return error_response(request.scope["path"], as_api_error(error))

    app.add_exception_handler(Exception, unknown)
    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(DllmServeError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, routing)


def _invalid(details: list[Any]) -> ApiError:
    """What pydantic found, in words; the client's own values are cut and escaped."""
    if any(d.get("type") == "json_invalid" for d in details):
        return ApiError(400, "The body is not valid JSON.", code="invalid_json")
    parts, param = [], None
    for detail in details[:_MAX_ERRORS]:
        place = [str(p) for p in detail.get("loc", ())[1:]]
        name = ".".join(place)
        if param is None:
            param = shown(place[0], 100) if place else None
        what = detail.get("msg", "is wrong").removeprefix("Value error, ")
        if detail.get("type") == "extra_forbidden":
            what = "is not a parameter of this server"
        parts.append(f"{shown(name, 100) or 'body'}: {shown(what, 300)}")
    more = len(details) - _MAX_ERRORS
    if more > 0:
        parts.append(f"and {more} more")
    return ApiError(
        400, "; ".join(parts) or "The body is wrong.", code="invalid_parameter", param=param
    )
