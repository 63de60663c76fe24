"""AuthGuard: finds the key and the owner of a request, and limits what each owner may ask for."""

from __future__ import annotations

import math

from starlette.types import ASGIApp, Receive, Scope, Send

from dllmserve._checks import check_int
from dllmserve.errors import ConfigError
from dllmserve.server.http.keys import ApiKeys, Key
from dllmserve.server.http.rate import RateLimit
from dllmserve.server.http.respond import Headers, send_error

__all__ = ["ApiKeys", "AuthGuard", "Key"]

#: the key of every request when no keys are configured
ANYONE = Key(name="", owner="")


class AuthGuard:
    """ASGI middleware that refuses requests without a key, except on the paths listed as open.

    The key comes as ``Authorization: Bearer <key>`` or ``X-Api-Key: <key>``. The path that
    counts is ``scope["path"]``, which is the one the app routes by, compared exactly: neither
    Host nor the query nor another spelling of a path can make it an open one. Sets
    ``scope["state"]["owner"]`` (:attr:`Key.owner`, "" without keys and on open paths) and
    ``["key_name"]``. WebSockets are closed.

    Answers that it gives itself: 401 without a known key, or with two different ones; 429 with
    Retry-After over a limit. All limits are per key; without keys everybody shares one.

    Args:
        app: the app behind.
        keys: None lets everybody in.
        open_paths: paths that need no key and count for no limit, for example health probes.
        rate: requests a minute for each key. Every request counts as one here; the app counts
            the further answers that it asks for. None is no limit.
        max_calls_per_key: calls of one key that may be in progress, so that clients that wait for
            results cannot take all connections. None is no limit.
        unmetered_gets: paths where GET, there and below, does not count for the rate, because
            clients poll there for results.

    Raises:
        ConfigError: a limit is not positive.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys | None,
        open_paths: frozenset[str],
        rate: RateLimit | None = None,
        max_calls_per_key: int | None = None,
        unmetered_gets: tuple[str, ...] = (),
    ) -> None:
        if max_calls_per_key is not None:
            check_int(ConfigError, "max_calls_per_key", max_calls_per_key, 1)
        self.app = app
        self.keys = keys
        self.open_paths = open_paths
        self.rate = rate or RateLimit(None)
        self.max_calls_per_key = max_calls_per_key
        self.unmetered_gets = unmetered_gets
        # at most one entry for each key
        self._running: dict[str, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Guard one request. Only lifespan events pass unguarded."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        state = scope.setdefault("state", {})
        state["owner"] = state["key_name"] = ""
        if scope["path"] in self.open_paths:
            await self.app(scope, receive, send)
            return
        key = await self._authenticate(scope, receive, send)
        if key is None or not await self._admit(key, scope, receive, send):
            return
        state["owner"], state["key_name"] = key.owner, key.name
        self._running[key.owner] = self._running.get(key.owner, 0) + 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._running[key.owner] -= 1

    async def _authenticate(self, scope: Scope, receive: Receive, send: Send) -> Key | None:
        """The request's key; None if the request has been answered with 401."""
        if self.keys is None:
            return ANYONE
        secrets = presented(scope["headers"])
        if not secrets:
            code = "missing_api_key"
            text = "No API key; send it as 'Authorization: Bearer <key>' or 'X-Api-Key: <key>'."
        elif len(secrets) > 1:
            code = "ambiguous_api_key"
            text = "The request has several different API keys; send one."
        else:
            key = self.keys.match(secrets.pop())
            if key is not None:
                return key
            code = "invalid_api_key"
            text = "The API key is not known to this server."
        headers = [(b"www-authenticate", b"Bearer")]
        await send_error(scope, send, 401, text, code=code, headers=headers, receive=receive)
        return None

    async def _admit(self, key: Key, scope: Scope, receive: Receive, send: Send) -> bool:
        """Whether the key may have one more request; if not, it has been answered with 429."""
        most = self.max_calls_per_key
        if most is not None and self._running.get(key.owner, 0) >= most:
            wait, code = 1.0, "too_many_calls"
            text = f"This key has {most} calls in progress and may have no more; end one first."
        else:
            wait, code = self._take(key, scope), "rate_limit_exceeded"
            text = (
                f"This key is limited to {self.rate.per_minute} requests a minute;"
                " try again when Retry-After has passed."
            )
        if wait <= 0:
            return True
        headers = [(b"retry-after", str(max(1, math.ceil(wait))).encode())]
        await send_error(scope, send, 429, text, code=code, headers=headers, receive=receive)
        return False

    def _take(self, key: Key, scope: Scope) -> float:
        """Count a request. Returns 0, or the seconds until one may be counted again."""
        if scope["method"] in ("GET", "HEAD") and self._unmetered(scope["path"]):
            return 0.0
        return self.rate.take(key.owner)

    def _unmetered(self, path: str) -> bool:
        return any(path == base or path.startswith(f"{base}/") for base in self.unmetered_gets)


def presented(headers: Headers) -> set[bytes]:
    """The different keys in a request's headers. Schemes other than Bearer carry no key."""
    found = set()
    for name, value in headers:
        kind = name.lower()
        if kind == b"authorization":
            scheme, _, value = value.strip().partition(b" ")
            if scheme.lower() != b"bearer":
                continue
        elif kind != b"x-api-key":
            continue
        if value.strip():
            found.add(value.strip())
    return found
