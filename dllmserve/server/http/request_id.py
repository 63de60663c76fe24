"""Request ids, one log line per request, and the answer when a handler raised."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dllmserve.server.http.logs import RESERVED
from dllmserve.server.http.respond import ABORT, CLOSE, send_error

MetricsHook = Callable[[str, str, int, float], None]

#: route of a request that no route of the app matched
UNMATCHED = "unmatched"
#: status in logs and metrics of a request whose client left before it was answered
CLIENT_GONE = 499

_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_access_log = logging.getLogger("dllmserve.access")
_log = logging.getLogger("dllmserve.server")


class RequestLog:
    """The outermost ASGI middleware: gives every request an id, logs it and counts it.

    A client's ``X-Request-Id`` is kept if it is 1 to 64 of ``A-Z a-z 0-9 . _ -``, else there is
    a new one. It is in ``scope["state"]["request_id"]`` and on every response, those of the
    guards inside included.

    At its end a request is one INFO line with these fields: ``request_id``, ``method``,
    ``route`` (the template, never the path), ``status`` (499: the client left first),
    ``duration_ms``, ``key_name``, ``disconnected`` if the client left during the answer, and
    what the handler put into the dict ``scope["state"]["log"]``.

    An exception that the app raises is logged with its traceback at ERROR on "dllmserve.server".
    The client gets a 500 that tells nothing but the request id. If the answer had begun, the
    connection is cut, so that the client does not take the answer for complete.

    Args:
        app: the app behind.
        clock: seconds, monotonic.
        log: where the lines go.
        metrics_hook: called with method, route, status and seconds of each request.
        quiet: routes that are asked every few seconds, such as probes: their 200s are logged at
            DEBUG.
        also: by path, the name of another header that is to carry the id.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        clock: Callable[[], float] = time.monotonic,
        log: logging.Logger = _access_log,
        metrics_hook: MetricsHook | None = None,
        quiet: frozenset[str] = frozenset(),
        also: Mapping[str, bytes] | None = None,
    ) -> None:
        self.app = app
        self.clock = clock
        self.log = log
        self.metrics_hook = metrics_hook
        self.quiet = quiet
        self.also = also or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Log one request; other kinds of scope pass."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = self.clock()
        exchange = _Exchange(scope, receive, send, self.also.get(scope["path"]))
        scope.setdefault("state", {})["request_id"] = exchange.request_id
        try:
            await self._run(exchange)
        finally:
            self._finish(exchange, self.clock() - start)

    async def _run(self, exchange: _Exchange) -> None:
        """Call the app. Whatever it does, the client gets a complete answer or a cut connection."""
        try:
            await self.app(exchange.scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            # only the server's shutdown cancels a request
            if exchange.status is None and not exchange.gone:
                await exchange.fail(503, "The server is shutting down; send the request again.")
            raise
        except ClientDisconnect as error:
            if exchange.gone:
                return
            _log.error("request failed", exc_info=error, extra=exchange.names())
        except Exception as error:
            _log.error("request failed", exc_info=error, extra=exchange.names())
        else:
            if exchange.complete or exchange.gone:
                return
            _log.error("the handler ended without a complete response", extra=exchange.names())
        if exchange.gone or exchange.complete:
            return
        if exchange.status is None:
            text = "The server failed; its log has the reason, by the X-Request-Id."
            await exchange.fail(500, text, "server_error")
        else:
            await exchange.cut()

    def _finish(self, exchange: _Exchange, seconds: float) -> None:
        status = exchange.status
        if status is None:
            status = CLIENT_GONE if exchange.gone else 500
        state = exchange.scope["state"]
        fields: dict[str, object] = {
            **exchange.names(),
            "status": status,
            "duration_ms": round(seconds * 1000, 3),
            "key_name": state.get("key_name", ""),
        }
        if exchange.gone and exchange.status is not None:
            fields["disconnected"] = True
        own = state.get("log")
        if isinstance(own, dict):
            for key, value in own.items():
                taken = key in RESERVED or key in fields
                fields[f"log_{key}" if taken else str(key)] = value
        routine = status == 200 and fields["route"] in self.quiet
        self.log.log(logging.DEBUG if routine else logging.INFO, "request", extra=fields)
        if self.metrics_hook is not None:
            method, route = str(fields["method"]), str(fields["route"])
            self.metrics_hook(method, route, status, seconds)


class _Exchange:
    """One request, and the state of its answer."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, also: bytes | None = None
    ) -> None:
        self.scope = scope
        self._names = [b"x-request-id", *([also] if also else [])]
        self.request_id = _request_id(scope)
        #: of the response, once it has begun
        self.status: int | None = None
        self.complete = False
        #: the client left before its response was complete
        self.gone = False
        self._receive = receive
        self._send = send

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self.complete:
            self.gone = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = message.get("headers", ())
            headers = [pair for pair in given if pair[0] not in self._names]
            headers += [(name, self.request_id.encode()) for name in self._names]
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True
        await self._send(message)

    async def fail(self, status: int, text: str, code: str | None = None) -> None:
        """Answer in place of the handler."""
        await send_error(self.scope, self.send, status, text, code=code, headers=[CLOSE])

    async def cut(self) -> None:
        """Cut the connection of a response that cannot be completed."""
        abort = self.scope.get("extensions", {}).get(ABORT)
        if callable(abort):
            abort()
            # the server hears of the lost connection before it looks at the response
            await asyncio.sleep(0)

    def names(self) -> dict[str, Any]:
        """The fields that say which request this is."""
        method = self.scope["method"]
        return {
            "request_id": self.request_id,
            "method": method if method in _METHODS else "OTHER",
            "route": route_template(self.scope),
        }


def route_template(scope: Scope) -> str:
    """The path template of the route that took the request, or "unmatched".

    The app's router leaves it in the scope, so it is known only after the app ran. It is never the
    path itself, which a client can choose freely.
    """
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else UNMATCHED


def _request_id(scope: Scope) -> str:
    """The client's request id if it is one and harmless, else a new one."""
    given = [value for name, value in scope["headers"] if name.lower() == b"x-request-id"]
    if len(given) == 1 and _ID.fullmatch(given[0]):
        return bytes(given[0]).decode()
    return uuid.uuid4().hex
