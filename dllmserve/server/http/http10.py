"""Answers for HTTP/1.0 clients, which know no chunks (RFC 9112, section 6.1)."""

from __future__ import annotations

from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


def speak_http_1_0(cycle: RequestResponseCycle) -> None:
    """Send an answer of unknown length without chunks; the end of the connection ends it.

    uvicorn closes the connection of every HTTP/1.0 client after its answer.
    """
    send = cycle.send
    cycle.waiting_for_100_continue = False  # an HTTP/1.0 client does not know 100 Continue
    unmeasured = False

    async def plainly(message: Message) -> None:
        nonlocal unmeasured
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            if b"content-length" not in names:
                unmeasured = True
                cycle.chunked_encoding = False
        elif unmeasured:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)  # type: ignore[arg-type]

    cycle.send = plainly  # type: ignore[method-assign,assignment]
