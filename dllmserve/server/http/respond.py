"""The error object: the answer to every refused request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable

from starlette.types import Receive, Scope, Send

from dllmserve.server.http.escape import shown

__all__ = [
    "CLOSE",
    "drain",
    "error_body",
    "error_object",
    "error_type",
    "send_error",
    "shown",
    "wants_detail",
]

Headers = Iterable[tuple[bytes, bytes]]

#: key in scope["extensions"] of a function that drops the request's connection at once
ABORT = "dllmserve.abort"
#: key in scope["extensions"] of a function that tells that the answer is complete: only the rest of
#: the body is awaited, and the connection may be dropped for a new one
ANSWERED = "dllmserve.answered"
#: header of a response after which the connection is closed
CLOSE = (b"connection", b"close")
#: longest error message, in characters
MAX_MESSAGE = 2000
#: seconds for which an answered client may go on sending before its connection is closed
LINGER_S = 1.0
#: bytes that it may send in that time; some clients send a large body to its end before they read
LINGER_BYTES = 16 * 1024 * 1024

_TYPES = {
    401: "authentication_error",
    404: "not_found",
    410: "result_expired",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout",
}


def error_type(status: int) -> str:
    """The ``type`` of an error object that goes with an HTTP status.

    Example:
        >>> error_type(413), error_type(500)
        ('invalid_request_error', 'server_error')
    """
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


#: its errors have the shape that its own clients read
SYSTEM_ONE = "/v1/systemone"


def wants_detail(path: str) -> bool:
    """Whether errors of this path repeat their message as ``detail``, as the native API does."""
    return path.startswith(("/v1/generate", "/v1/result"))


def error_object(
    message: str, *, type: str, code: str | None = None, param: str | None = None
) -> dict[str, object]:
    """The error object of OpenAI's API, before it is JSON."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def error_body(
    message: str,
    *,
    type: str,
    code: str | None = None,
    param: str | None = None,
    path: str = "",
) -> bytes:
    """The error object as JSON, in the shape of a path.

    Control characters of the message are escaped and it is cut after 2000 characters; use
    :func:`shown` for each part of it that a user wrote.

    Example:
        >>> error_body("no", type="not_found")
        b'{"error":{"message":"no","type":"not_found","param":null,"code":null}}'
    """
    message = shown(message, MAX_MESSAGE)
    body = error_object(message, type=type, code=code, param=param)
    if path == SYSTEM_ONE:
        body = {"detail": {"error_type": code or type, "message": message}}
    elif wants_detail(path):
        body["detail"] = message
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


async def send_error(
    scope: Scope,
    send: Send,
    status: int,
    message: str,
    *,
    type: str | None = None,
    code: str | None = None,
    param: str | None = None,
    headers: Headers = (),
    receive: Receive | None = None,
) -> None:
    """Answer a request with the error object.

    Args:
        scope: the request; its path decides about the shape.
        send: the ASGI callable.
        status: HTTP status.
        message: for people; names the limit, the value given and the way out.
        type: by default what :func:`error_type` says.
        code: for machines.
        param: the request's field that is wrong.
        headers: besides content type and length.
        receive: given when the request's body may not have been read. Further input is then read
            and dropped for up to a second, or 16 MiB: closing a connection with unread data
            resets it, and many clients would never see the answer.
    """
    body = error_body(
        message,
        type=type or error_type(status),
        code=code,
        param=param,
        path=scope.get("path", ""),
    )
    fixed = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    if receive is not None:
        await send({"type": "http.response.body", "body": body, "more_body": True})
        answered = scope.get("extensions", {}).get(ANSWERED)
        if callable(answered):
            answered()
        await drain(receive, LINGER_S, LINGER_BYTES)
        body = b""
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def drain(receive: Receive, seconds: float, most: int) -> None:
    """Read and drop the rest of a request's body, for at most so many seconds and bytes."""
    try:
        async with asyncio.timeout(seconds):
            while most >= 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                most -= len(message.get("body", b""))
                del message  # not kept while the next one is waited for
    except TimeoutError:
        return
