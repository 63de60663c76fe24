"""HTTP/1.0 clients: no chunks, and the end of the connection is the end of the answer."""

import asyncio

import pytest
from starlette.types import Receive, Scope, Send

from dllmserve.server.http.request_id import RequestLog
from dllmserve.server.sse import EventStream
from tests.server.http.live import Client, Echo, connected, read_body, reply, serving
from tests.steady import run

EVENTS = [b"data: 1\n\n", b"data: 22\n\n", b"data: [DONE]\n\n"]


async def streaming(scope: Scope, receive: Receive, send: Send) -> None:
    """A stream as the endpoints send it; an answer of known length and an empty one."""
    await read_body(receive)
    if scope["path"] == "/plain":
        await reply(send, b"plain")
        return
    if scope["path"] == "/empty":
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        return

    async def events():  # type: ignore[no-untyped-def]
        for event in EVENTS:
            await asyncio.sleep(0)
            yield event

    await EventStream(events(), 1.0)(scope, receive, send)


def request(method: str, path: str, version: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: h", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


async def whole(client: Client, data: bytes) -> tuple[bytes, bytes]:
    """Head and body of the answer; the server has to close the connection behind it."""
    await client.send(data)
    async with asyncio.timeout(20):
        head, _, body = (await client.reader.read()).partition(b"\r\n\r\n")
    return head.lower() + b"\r\n", body


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("header", ["Connection: close", "Connection: keep-alive", "A: b"])
def test_a_stream_is_sent_as_it_is(method: str, header: str) -> None:
    async def main() -> None:
        async with serving(RequestLog(streaming)) as live, connected(live.port) as client:
            body = b"x" * 5000 if method == "POST" else b""
            head, answer = await whole(client, request(method, "/", "1.0", header, body=body))
            assert b"transfer-encoding" not in head and b"content-length" not in head
            assert b"\r\nconnection: close\r\n" in head
            assert b"text/event-stream" in head
            assert answer == b"".join(EVENTS)

    run(main())


def test_answers_without_a_body_or_of_known_length() -> None:
    async def main() -> None:
        async with serving(RequestLog(streaming)) as live:
            for method, path, length, expected in (
                ("HEAD", "/", None, b""),
                ("GET", "/plain", b"content-length: 5", b"plain"),
                ("HEAD", "/plain", b"content-length: 5", b""),
                ("DELETE", "/empty", None, b""),
            ):
                async with connected(live.port) as client:
                    head, answer = await whole(client, request(method, path, "1.0"))
                assert answer == expected
                assert b"transfer-encoding" not in head
                assert (length in head) if length else (b"content-length" not in head)

    run(main())


def test_no_continue_is_sent_to_them() -> None:
    async def main() -> None:
        async with serving(Echo()) as live, connected(live.port) as client:
            data = request("POST", "/", "1.0", "Expect: 100-continue", body=b"abc")
            head, answer = await whole(client, data)
            assert b" 200 " in head.split(b"\r\n")[0] and answer == b"POST / abc"

    run(main())


def test_the_others_get_chunks_as_ever() -> None:
    async def main() -> None:
        async with serving(streaming) as live, connected(live.port) as client:
            for _ in range(2):
                answer = await client.ask(request("POST", "/", "1.1", body=b"x"))
                assert answer.headers["transfer-encoding"] == "chunked"
                assert answer.body == b"".join(EVENTS)

    run(main())
