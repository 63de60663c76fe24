"""CORS: which web pages may call, and what they may read of the answers.

Starlette's middleware answers preflights before a request has an id and a line in the log, refuses
them in plain text, and does not see the answers of the guards around it and of the connection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dllmserve.server.http.request_id import Route
from dllmserve.server.http.respond import Headers, send_error, shown

#: headers of answers that the official clients, and those of the native API, read
EXPOSED = b"X-Request-Id, Retry-After, X-Should-Retry, Location, Allow, WWW-Authenticate"
METHODS = b"GET, HEAD, POST, DELETE"
#: seconds that a browser may remember a preflight; none remembers it for longer than two hours
MAX_AGE = b"7200"
#: header names that a preflight may ask for: as many as a request may have, and no longer ones
#: than any that are in use
MAX_NAMES, MAX_NAME = 100, 128

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VARY = (b"vary", b"Origin")


def given(headers: Headers, name: bytes) -> list[bytes]:
    """Every value of a header."""
    return [value.strip() for key, value in headers if key.lower() == name]


class Origins:
    """The web pages that may call.

    Args:
        allowed: ``scheme://host[:port]`` of each, in lower case, as browsers send it.
    """

    def __init__(self, allowed: Iterable[str]) -> None:
        self._allowed = frozenset(origin.encode() for origin in allowed)

    def of(self, headers: Headers) -> bytes | None:
        """The origin that a request names; None unless it may call."""
        found = given(headers, b"origin")
        return found[0] if len(found) == 1 and found[0] in self._allowed else None

    def readable(self, headers: Headers, *, complete: bool = True) -> list[tuple[bytes, bytes]]:
        """Headers that let the page behind a request read its answer.

        Args:
            headers: of the request.
            complete: False if they have not all come. An only origin is then named all the same:
                it is of no use to any other page.
        """
        origin = self.of(headers)
        if origin is None and not complete and len(self._allowed) == 1:
            (origin,) = self._allowed
        if origin is None:
            return [_VARY]
        return [
            _VARY,
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", EXPOSED),
        ]


class Readable:
    """ASGI middleware, the outermost: each answer says which page may read it.

    Args:
        app: the app behind, with all of its guards.
        origins: the pages.
    """

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        self.app, self.origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add the headers."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = self.origins.readable(scope["headers"])
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        await self.app(scope, receive, marked)


class Preflights:
    """ASGI middleware outside the key guard: answers what browsers ask before they call.

    Whatever headers a page wants to send are allowed, since clients name their own: what is in
    them is judged when the request comes. 403 for a page that may not call.

    Args:
        app: the app behind.
        origins: the pages.
    """

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        self.app, self.origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a preflight; everything else passes."""
        if (
            scope["type"] != "http"
            or scope["method"] != "OPTIONS"
            or not given(scope["headers"], b"origin")
            or not given(scope["headers"], b"access-control-request-method")
        ):
            await self.app(scope, receive, send)
            return
        scope["route"] = Route("preflight")
        headers = scope["headers"]
        if self.origins.of(headers) is None:
            origin = shown(b", ".join(given(headers, b"origin")), 100)
            text = f"Pages of '{origin}' may not call this server; --cors-origins names who may."
            await send_error(scope, send, 403, text, code="origin_not_allowed", receive=receive)
            return
        try:
            allowed = _permission(headers)
        except ValueError as error:
            await send_error(scope, send, 400, str(error), code="malformed_request")
            return
        await send({"type": "http.response.start", "status": 204, "headers": allowed})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _permission(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Headers of the answer to a preflight; raises ValueError for names that are none."""
    listed = b",".join(given(headers, b"access-control-request-headers"))
    names = [name for part in listed.split(b",") if (name := part.strip())]
    if len(names) > MAX_NAMES:
        raise ValueError(f"A request has at most {MAX_NAMES} headers, not {len(names)}.")
    for name in names:
        if len(name) > MAX_NAME or not _NAME.fullmatch(name):
            raise ValueError(
                f"'{shown(name, 40)}' is no name of a header, which has 1 to {MAX_NAME} letters, "
                "digits and signs."
            )
    allowed = [
        (b"access-control-allow-methods", METHODS),
        (b"access-control-max-age", MAX_AGE),
        (b"vary", b"Access-Control-Request-Headers, Access-Control-Request-Private-Network"),
    ]
    if names:
        allowed.append((b"access-control-allow-headers", b", ".join(names)))
    if given(headers, b"access-control-request-private-network") == [b"true"]:
        # a page from the internet, and a server in a network that is not
        allowed.append((b"access-control-allow-private-network", b"true"))
    return allowed
