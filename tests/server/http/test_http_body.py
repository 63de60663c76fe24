"""Size, time and type of request bodies, and what the app gets of them."""

import asyncio
import http.client
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from dllmserve.errors import ConfigError
from dllmserve.server.http.body import BodyGuard
from tests.server.http.live import (
    Echo,
    Waiter,
    ask,
    chunked,
    connected,
    get,
    post,
    reply,
    serving,
    until,
)

LIMIT = 1000


def head(*lines: str, method: str = "POST", path: str = "/") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: h", *lines, "", ""]).encode()


def test_content_length_over_the_limit_is_refused_without_reading() -> None:
    async def one(port: int, length: int) -> None:
        async with connected(port) as client:
            answer = await client.ask(head(f"Content-Length: {length}"))
            assert answer.status == 413
            assert answer.headers["connection"] == "close"
            error = answer.error
            assert error["code"] == "body_too_large"
            assert f"{LIMIT} bytes" in error["message"]
            assert str(length) in error["message"]
            assert await client.closed() < 3

    async def main() -> None:
        echo = Echo()
        async with serving(BodyGuard(echo, max_bytes=LIMIT)) as live:
            await asyncio.gather(*(one(live.port, n) for n in (LIMIT + 1, 10**15, 2**64 - 1)))
            assert not echo.seen

    asyncio.run(main())


def test_expectation_is_not_met_for_a_body_over_the_limit() -> None:
    async def main() -> None:
        async with serving(BodyGuard(Echo(), max_bytes=LIMIT)) as live:
            expect = ("Expect: 100-continue", "Content-Type: application/json")
            answer = await ask(live.port, head("Content-Length: 5000", *expect))
            assert answer.status == 413
            async with connected(live.port) as client:
                assert (await client.ask(head("Content-Length: 2", *expect))).status == 100
                assert (await client.ask(b"{}")).body == b"POST / {}"

    asyncio.run(main())


@pytest.mark.parametrize("endless", [True, False])
def test_chunked_body_over_the_limit(endless: bool) -> None:
    async def main() -> None:
        echo = Echo()
        async with serving(BodyGuard(echo, max_bytes=LIMIT)) as live:
            async with connected(live.port) as client:
                data = chunked(*[b"x" * 100] * 11)
                await client.send(data[:-5] if endless else data)
                answer = await client.answer()
                assert (answer.status, answer.error["code"]) == (413, "body_too_large")
                if endless:
                    for _ in range(3):
                        await client.send(b"64\r\n" + b"x" * 100 + b"\r\n")
                # a body that is complete leaves nothing to wait for
                assert await client.closed() < (3 if endless else 0.95)
            assert not echo.seen

    asyncio.run(main())


def test_refused_client_can_send_all_and_read_the_answer() -> None:
    """http.client is one that gives up when its connection is reset while it sends."""

    def send_all(port: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("POST", "/", b"x" * 4_000_000)
        with connection.getresponse() as answer:
            status = answer.status
        connection.close()
        return status

    async def main() -> None:
        async with serving(BodyGuard(Echo())) as live:
            assert await asyncio.to_thread(send_all, live.port) == 413

    asyncio.run(main())


def test_body_of_exactly_the_limit_passes() -> None:
    async def main() -> None:
        async with serving(BodyGuard(Echo(), max_bytes=LIMIT)) as live:
            body = b"x" * LIMIT
            assert (await ask(live.port, post(body))).body == b"POST / " + body
            assert (await ask(live.port, chunked(body[:1], body[1:]))).body == b"POST / " + body
            assert (await ask(live.port, post(body + b"x"))).status == 413
            assert (await ask(live.port, chunked(body, b"x"))).status == 413

    asyncio.run(main())


def test_incomplete_body_times_out() -> None:
    async def main() -> None:
        echo = Echo()
        async with serving(BodyGuard(echo, timeout_s=0.3)) as live:
            for data in (
                head("Content-Length: 5", "Content-Type: application/json") + b"{",
                chunked(b"{")[:-5],
                head("Content-Length: 5", method="GET"),
                head("Content-Length: 5", method="DELETE"),
            ):
                async with connected(live.port) as client:
                    answer = await client.ask(data)
                    assert answer.status == 408
                    assert answer.error["code"] == "body_timeout"
                    assert answer.headers["connection"] == "close"
                    assert await client.closed() < 2
            assert not echo.seen

    asyncio.run(main())


def test_client_that_leaves_while_it_sends_is_not_served() -> None:
    async def main() -> None:
        echo = Echo()
        async with serving(BodyGuard(echo)) as live:
            async with connected(live.port) as client:
                await client.send(post(b"x" * 100)[:-1])
                await until(lambda: len(live.state.tasks) == 1, "not started")
            await until(lambda: not live.state.tasks, "still waiting")
            assert not echo.seen

    asyncio.run(main())


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS"])
def test_other_methods_may_have_a_body_but_no_large_one(method: str) -> None:
    async def main() -> None:
        echo = Echo()
        async with serving(BodyGuard(echo, max_bytes=LIMIT)) as live:
            for data, status in (
                (head(method=method), 200),
                (head("Content-Length: 2", "Content-Type: text/css", method=method) + b"ab", 200),
                (head("Content-Length: 1001", method=method), 413),
                (chunked(b"x" * 1001).replace(b"POST", method.encode(), 1), 413),
            ):
                async with connected(live.port) as client:
                    await client.send(data)
                    assert (await client.answer(head=method == "HEAD")).status == status
            assert echo.bodies == [b"", b"ab"]

    asyncio.run(main())


JSON_TYPES = [
    "application/json",
    "APPLICATION/JSON",
    "application/json; charset=utf-8",
    "application/json;charset=UTF-8",
    "application/problem+json",
    "application/vnd.api+json ; v=1",
]
OTHER_TYPES = [
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/jsonx",
    "text/json",
    "text/plain; application/json",
    "x+json",
    "application/json, text/plain",
    "",
    "\xff\x80",
    "text/plain; " + "x" * 3000,
]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_content_types(method: str) -> None:
    async def main() -> None:
        async with serving(BodyGuard(Echo())) as live, connected(live.port) as client:
            for given in JSON_TYPES:
                data = post(b"{}", f"Content-Type: {given}").replace(b"POST", method.encode(), 1)
                assert (await client.ask(data)).status == 200, given
            for given in OTHER_TYPES:
                data = post(b"{}", f"Content-Type: {given}").replace(b"POST", method.encode(), 1)
                answer = await client.ask(data)
                assert answer.status == 415, given
                assert answer.error["code"] == "unsupported_media_type"
                assert len(answer.error["message"]) < 300
            for lines in (["Content-Length: 2"], ["Content-Length: 2", *TWO_TYPES]):
                assert (await client.ask(head(*lines, method=method) + b"{}")).status == 415
            # without a body there is nothing to be of a type
            assert (await client.ask(head("Content-Length: 0", method=method))).status == 200
            assert (await client.ask(head("Content-Type: a/b", method=method))).status == 200

    asyncio.run(main())


TWO_TYPES = ["Content-Type: application/json", "Content-Type: text/plain"]


def test_compressed_bodies_are_refused() -> None:
    async def main() -> None:
        async with serving(BodyGuard(Echo())) as live, connected(live.port) as client:
            answer = await client.ask(post(b"{}", "Content-Encoding: gzip"))
            assert answer.status == 415
            assert "'gzip'" in answer.error["message"]
            assert (await client.ask(post(b"{}", "Content-Encoding: identity"))).status == 200

    asyncio.run(main())


def test_native_paths_have_detail_too() -> None:
    async def main() -> None:
        async with serving(BodyGuard(Echo(), max_bytes=LIMIT)) as live:
            for path in ("/v1/generate", "/v1/generate_batch", "/v1/result/7"):
                answer = await ask(live.port, head("Content-Length: 1001", path=path))
                assert json.loads(answer.body)["detail"] == answer.error["message"]
            for path in ("/", "/v1/completions", "/x/v1/generate"):
                answer = await ask(live.port, head("Content-Length: 1001", path=path))
                assert set(json.loads(answer.body)) == {"error"}

    asyncio.run(main())


def test_app_gets_the_body_once_and_then_hears_of_the_disconnect() -> None:
    messages: list[Message] = []
    done = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        messages.append(await receive())
        messages.append(await receive())
        done.set()

    async def main() -> None:
        async with serving(BodyGuard(app)) as live:
            async with connected(live.port) as client:
                await client.send(chunked(b'{"a"', b": ", b"1}"))
                await until(lambda: len(messages) == 1, "no body")
                await asyncio.sleep(0.05)
                assert len(messages) == 1, "nothing may come while the client waits"
            async with asyncio.timeout(5):
                await done.wait()
        assert messages == [
            {"type": "http.request", "body": b'{"a": 1}', "more_body": False},
            {"type": "http.disconnect"},
        ]

    asyncio.run(main())


def test_disconnect_reaches_a_waiting_app() -> None:
    async def main() -> None:
        waiter = Waiter()
        async with serving(BodyGuard(waiter)) as live:
            async with connected(live.port) as client:
                await client.send(post(b"{}"))
                await until(lambda: waiter.started == 1, "not started")
            await until(lambda: waiter.left == 1, "not noticed")

    asyncio.run(main())


def test_timeout_is_for_the_body_and_not_for_the_app() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await asyncio.sleep(0.25)
        await reply(send, b"late")

    async def main() -> None:
        async with serving(BodyGuard(slow, timeout_s=0.15)) as live:
            assert (await ask(live.port, post(b"{}"))).body == b"late"
            assert (await ask(live.port, get())).body == b"late"

    asyncio.run(main())


@pytest.mark.parametrize("value", [b"", b"x", b"1_0", b"-1", b"1" * 21, "٣".encode()])
def test_length_that_is_no_number(value: bytes) -> None:
    """Our parser refuses these first; other servers may not."""
    sent: list[Message] = []

    async def main() -> None:
        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"Content-Length", value)]
        scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
        await BodyGuard(Echo())(scope, receive, send)

    asyncio.run(main())
    assert sent[0]["status"] == 400


def test_other_scopes_pass() -> None:
    async def main() -> list[str]:
        seen: list[str] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(scope["type"])

        nothing: Any = None
        for kind in ("lifespan", "websocket"):
            await BodyGuard(app)({"type": kind}, nothing, nothing)
        return seen

    assert asyncio.run(main()) == ["lifespan", "websocket"]


@pytest.mark.parametrize("option", [{"max_bytes": 0}, {"max_bytes": True}, {"timeout_s": 0}])
def test_limits_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        BodyGuard(Echo(), **option)
