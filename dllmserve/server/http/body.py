"""BodyGuard: reads request bodies before the app does, within limits of size, time and memory."""

from __future__ import annotations

import asyncio
from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dllmserve._checks import check_float, check_int
from dllmserve.errors import ConfigError
from dllmserve.server.http.coding import CODINGS, CodingError, DecodedTooLarge, decode
from dllmserve.server.http.respond import CLOSE, Headers, send_error, shown

#: methods whose body is ignored, so that its type does not matter
_BODILESS = frozenset({"GET", "HEAD", "DELETE", "OPTIONS"})
#: memory for all incomplete bodies together: so many bodies of the largest size, and at least so
#: many bytes
_AT_ONCE, _AT_LEAST = 64, 128 * 1024 * 1024
_SOON = ((b"retry-after", b"1"),)


class _TooLarge(Exception):
    """More bytes came than allowed; ``complete`` if they were the last."""

    def __init__(self, complete: bool) -> None:
        super().__init__()
        self.complete = complete


class _NoRoom(Exception):
    """Incomplete bodies of the owner, or of all owners, take too much memory."""


class _Gone(Exception):
    """The client went away before its body was complete."""


class BodyGuard:
    """ASGI middleware that reads the whole body, then calls the app with it.

    The app gets the body as one ``http.request`` message. Every later ``receive()`` goes to the
    server, so that the app still notices a client that goes away. The guard itself answers:

    - 413 for more than ``max_bytes``: at once if Content-Length says so, else when they arrive
    - 413 for any body on a path of ``bodiless``, at once
    - 503 when incomplete bodies take too much memory: more than 64 times ``max_bytes``, and more
      than 128 MiB. An owner (``scope["state"]["owner"]``) may take no more than it leaves free
      for others. So a single owner (and all senders together, if there are no keys) may take
      half, and another owner always finds some
    - 408 for a body that is not complete after ``timeout_s`` seconds
    - 415 for a body that is not JSON, or compressed in another way than by gzip or zstd; not for
      GET, HEAD, DELETE and OPTIONS
    - 413 for a compressed body that is more than ``max_bytes`` when it is decoded, and 400 for one
      that cannot be. The app gets it decoded
    - 400 for a Content-Length that is no number

    413 for what comes, 408 and 503 close the connection. A client that goes away while it sends
    is not answered and the app is not called.

    Args:
        app: the app behind.
        max_bytes: largest body in bytes.
        timeout_s: seconds for the whole body, however steadily it trickles.
        bodiless: paths whose requests have no body. These are the paths that need no key, where
            anybody could take memory.

    Raises:
        ConfigError: a limit is not positive.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_bytes: int = 2 * 1024 * 1024,
        timeout_s: float = 30,
        bodiless: frozenset[str] = frozenset(),
    ) -> None:
        check_int(ConfigError, "max_bytes", max_bytes, 1)
        check_float(ConfigError, "timeout_s", timeout_s, 0, low_open=True)
        self.app = app
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s
        self.bodiless = bodiless
        self.max_memory = max(_AT_ONCE * max_bytes, _AT_LEAST)
        # bytes in memory of incomplete bodies
        self._held: Counter[str] = Counter()
        self._all_held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Guard one request; other kinds of scope pass."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            declared = _declared_length(scope)
        except ValueError as error:
            await send_error(scope, send, 400, str(error), headers=[CLOSE], receive=receive)
            return
        if scope["path"] in self.bodiless and (declared or _headers(scope, b"transfer-encoding")):
            text = "A request to this path has no body; send none."
            await self._refuse(scope, send, receive, 413, "body_too_large", text)
            return
        if declared > self.max_bytes:
            await self._refuse_size(scope, send, receive, f"{declared} bytes")
            return
        try:
            async with asyncio.timeout(self.timeout_s):
                owner = scope.get("state", {}).get("owner", "")
                body = [await self._read(receive, owner)]
        except TimeoutError:
            text = (
                f"The request body was not complete after {self.timeout_s:g} seconds;"
                " send it faster or make it smaller."
            )
            await send_error(scope, send, 408, text, code="body_timeout", headers=[CLOSE])
            return
        except _TooLarge as error:
            unread = None if error.complete else receive
            await self._refuse_size(scope, send, unread, "more")
            return
        except _NoRoom:
            text = "Too many request bodies are being received at once; try again later."
            await self._refuse(scope, send, receive, 503, "overloaded", text, _SOON)
            return
        except _Gone:
            return
        wrong = _wrong_type(scope) if body[0] and scope["method"] not in _BODILESS else None
        if wrong:
            await send_error(scope, send, 415, wrong, code="unsupported_media_type")
            return
        if body[0] and scope["method"] not in _BODILESS and (coding := _coding(scope)):
            try:
                body[0] = decode(body[0], coding, self.max_bytes)
            except CodingError as error:
                await send_error(scope, send, 400, str(error), code="malformed_request")
                return
            except DecodedTooLarge:
                text = (
                    f"The request body is limited to {self.max_bytes} bytes, also after it has "
                    "been decoded; split the request into smaller ones."
                )
                await send_error(scope, send, 413, text, code="body_too_large")
                return
        await self.app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive, owner: str) -> bytes:
        """The whole body; raises _TooLarge, _NoRoom or _Gone."""
        # not a list of parts: a part takes 40 bytes more, and may hold a single byte
        body = bytearray()
        more = True
        try:
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    raise _Gone
                part = message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) + len(part) > self.max_bytes:
                    raise _TooLarge(complete=not more)
                body += part
                self._hold(owner, len(part))
                del message, part  # not kept while the next one is waited for
                if more and self._held[owner] > self.max_memory - self._all_held:
                    raise _NoRoom
        finally:
            self._hold(owner, -len(body))
        return bytes(body)

    def _hold(self, owner: str, size: int) -> None:
        """Count bytes of an owner's bodies that came into memory, or left it."""
        self._all_held += size
        self._held[owner] += size
        if not self._held[owner]:
            del self._held[owner]

    async def _refuse_size(
        self, scope: Scope, send: Send, receive: Receive | None, given: str
    ) -> None:
        text = (
            f"The request body is limited to {self.max_bytes} bytes and has {given};"
            " split the request into smaller ones."
        )
        await self._refuse(scope, send, receive, 413, "body_too_large", text)

    @staticmethod
    async def _refuse(
        scope: Scope,
        send: Send,
        receive: Receive | None,
        status: int,
        code: str,
        text: str,
        headers: Headers = (),
    ) -> None:
        await send_error(
            scope, send, status, text, code=code, headers=[CLOSE, *headers], receive=receive
        )


def _headers(scope: Scope, name: bytes) -> list[bytes]:
    """Every value of a header, in lower case and without surrounding blanks."""
    return [value.strip().lower() for key, value in scope["headers"] if key.lower() == name]


def _coding(scope: Scope) -> bytes:
    """How the body is compressed; b"" if it is not."""
    given = _headers(scope, b"content-encoding")
    return b", ".join(value for value in given if value not in (b"", b"identity"))


def _declared_length(scope: Scope) -> int:
    """Content-Length, or 0; raises ValueError, with a message for the client."""
    values = set(_headers(scope, b"content-length"))
    if not values:
        return 0
    value = values.pop()
    if values or not value.isdigit() or len(value) > 20:
        raise ValueError(f"Content-Length must be one number of bytes, not '{shown(value, 40)}'.")
    return int(value)


def _wrong_type(scope: Scope) -> str | None:
    """What is wrong with the body's type, as a message for the client; None if it is JSON."""
    coding = _coding(scope)
    if coding and coding not in CODINGS:
        known = " or ".join(sorted(name.decode() for name in CODINGS))
        return (
            f"Content-Encoding '{shown(coding, 40)}' is not supported;"
            f" send the JSON uncompressed, or compressed by {known}, once."
        )
    types = _headers(scope, b"content-type")
    if types and all(_is_json(value) for value in types):
        return None
    given = f"not '{shown(types[0], 100)}'" if types else "and there is none"
    return f"The Content-Type of a request body must be application/json, {given}."


def _is_json(value: bytes) -> bool:
    """Whether a content type is JSON; its parameters do not matter."""
    kind = value.partition(b";")[0].strip()
    return kind == b"application/json" or (
        kind.startswith(b"application/") and kind.endswith(b"+json")
    )


def _replay(body: list[bytes], receive: Receive) -> Receive:
    """A ``receive`` that gives the only entry away and then what the server has to say."""

    async def replayed() -> Message:
        if not body:
            return await receive()
        return {"type": "http.request", "body": body.pop(), "more_body": False}

    return replayed
