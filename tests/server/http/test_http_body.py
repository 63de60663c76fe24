"""Size, time and type of request bodies, and what the app gets of them."""

import asyncio
import contextlib
import http.client
import json
import tracemalloc
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from dllmserve.errors import ConfigError
from dllmserve.server.http.body import BodyGuard
from tests.server.http.live import (
    Client,
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
from tests.steady import run

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

    run(main())


def test_expectation_is_not_met_for_a_body_over_the_limit() -> None:
    async def main() -> None:
        async with serving(BodyGuard(Echo(), max_bytes=LIMIT)) as live:
            expect = ("Expect: 100-continue", "Content-Type: application/json")
            answer = await ask(live.port, head("Content-Length: 5000", *expect))
            assert answer.status == 413
            async with connected(live.port) as client:
                assert (await client.ask(head("Content-Length: 2", *expect))).status == 100
                assert (await client.ask(b"{}")).body == b"POST / {}"

    run(main())


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

    run(main())


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

    run(main())


def test_body_of_exactly_the_limit_passes() -> None:
    async def main() -> None:
        async with serving(BodyGuard(Echo(), max_bytes=LIMIT)) as live:
            body = b"x" * LIMIT
            assert (await ask(live.port, post(body))).body == b"POST / " + body
            assert (await ask(live.port, chunked(body[:1], body[1:]))).body == b"POST / " + body
            assert (await ask(live.port, post(body + b"x"))).status == 413
            assert (await ask(live.port, chunked(body, b"x"))).status == 413

    run(main())


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

    run(main())


def test_client_that_leaves_while_it_sends_is_not_served() -> None:
    async def main() -> None:
        echo = Echo()
        async with serving(BodyGuard(echo)) as live:
            async with connected(live.port) as client:
                await client.send(post(b"x" * 100)[:-1])
                await until(lambda: len(live.state.tasks) == 1, "not started")
            await until(lambda: not live.state.tasks, "still waiting")
            assert not echo.seen

    run(main())


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

    run(main())


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

    run(main())


TWO_TYPES = ["Content-Type: application/json", "Content-Type: text/plain"]


def test_native_paths_have_detail_too() -> None:
    async def main() -> None:
        async with serving(BodyGuard(Echo(), max_bytes=LIMIT)) as live:
            for path in ("/v1/generate", "/v1/generate_batch", "/v1/result/7"):
                answer = await ask(live.port, head("Content-Length: 1001", path=path))
                assert json.loads(answer.body)["detail"] == answer.error["message"]
            for path in ("/", "/v1/completions", "/x/v1/generate"):
                answer = await ask(live.port, head("Content-Length: 1001", path=path))
                assert set(json.loads(answer.body)) == {"error"}

    run(main())


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

    run(main())


def test_disconnect_reaches_a_waiting_app() -> None:
    async def main() -> None:
        waiter = Waiter()
        async with serving(BodyGuard(waiter)) as live:
            async with connected(live.port) as client:
                await client.send(post(b"{}"))
                await until(lambda: waiter.started == 1, "not started")
            await until(lambda: waiter.left == 1, "not noticed")

    run(main())


def test_timeout_is_for_the_body_and_not_for_the_app() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await asyncio.sleep(0.25)
        await reply(send, b"late")

    async def main() -> None:
        async with serving(BodyGuard(slow, timeout_s=0.15)) as live:
            assert (await ask(live.port, post(b"{}"))).body == b"late"
            assert (await ask(live.port, get())).body == b"late"

    run(main())


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

    run(main())
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

    assert run(main()) == ["lifespan", "websocket"]


@pytest.mark.parametrize("option", [{"max_bytes": 0}, {"max_bytes": True}, {"timeout_s": 0}])
def test_limits_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        BodyGuard(Echo(), **option)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
def test_paths_without_bodies_refuse_them_at_once(method: str) -> None:
    """They need no key, so that nothing that comes for them may be kept."""

    async def refuse(port: int, data: bytes) -> None:
        async with connected(port) as client:
            await client.send(data)
            answer = await client.answer(head=method == "HEAD")
            assert answer.status == 413, data
            assert answer.headers["connection"] == "close"
            await client.closed()

    async def main() -> None:
        echo = Echo()
        guard = BodyGuard(echo, bodiless=frozenset({"/health"}), timeout_s=60)
        async with serving(guard) as live:
            refused = [
                head("Content-Length: 1", method=method, path="/health"),
                head("Content-Length: 1", method=method, path="/health?x=1") + b"x",
                head("Content-Length: 2000000", method=method, path="/health") + b"x" * 1000,
                head("Transfer-Encoding: chunked", method=method, path="/health"),
                head("Transfer-Encoding: chunked", method=method, path="/health") + b"0\r\n\r\n",
                head("Content-Length: 1", "Expect: 100-continue", method=method, path="/%68ealth"),
            ]
            await asyncio.gather(*(refuse(live.port, data) for data in refused))
            assert not echo.seen
            for data in (
                head(method=method, path="/health"),
                head("Content-Length: 0", method=method, path="/health"),
                head("Content-Length: 1", method=method, path="/health/") + b"1",
            ):
                async with connected(live.port) as client:
                    await client.send(data.replace(b"Host: h", b"Host: h\r\nContent-Type: a/json"))
                    status = (await client.answer(head=method == "HEAD")).status
                    assert status in (200, 415), data

    run(main())


def test_what_is_left_of_a_refused_body_is_not_read_without_end() -> None:
    async def main() -> None:
        guard = BodyGuard(Echo(), bodiless=frozenset({"/"}))
        async with serving(guard) as live, connected(live.port) as client:
            answer = await client.ask(head("Content-Length: 1000000000"))
            assert answer.status == 413
            sent = 0
            with pytest.raises(ConnectionError):
                while True:
                    client.writer.write(b"x" * 65536)
                    await client.writer.drain()
                    sent += 65536
            # 16 MiB, and what the system holds at both ends
            assert sent < 40_000_000

    run(main())


def test_bodies_that_are_not_complete_share_the_memory_by_owner() -> None:
    """One owner has half of it at most, whatever others do, and never all of it is taken."""

    async def main() -> None:
        guard = BodyGuard(Echo(), max_bytes=1000)
        guard.max_memory = 4000

        async def owned(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"] = {"owner": scope["path"]}
            await guard(scope, receive, send)

        async with serving(owned) as live, contextlib.AsyncExitStack() as stack:

            async def begin(owner: str, size: int) -> Client:
                client = await stack.enter_async_context(connected(live.port))
                await client.send(post(b"1" * 1000, path=owner)[: size - 1000])
                return client

            first = [await begin("/a", 900) for _ in range(2)]
            await until(lambda: guard._held == {"/a": 1800}, "not read")
            # 2,700 of 4,000 would leave others less than that
            refused = await begin("/a", 900)
            answer = await refused.answer()
            assert (answer.status, answer.error["code"]) == (503, "overloaded")
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["connection"] == "close"
            # another owner has room, and what was begun is not disturbed
            other = await begin("/b", 900)
            await until(lambda: guard._held == {"/a": 1800, "/b": 900}, "not read")
            for client in (*first, other):
                await client.send(b"1" * 100)
                assert (await client.answer()).status == 200
            assert not guard._held and guard._all_held == 0
            # those that are complete when they come wait for nobody
            await begin("/a", 900)
            assert (await ask(live.port, post(b"1" * 1000, path="/a"))).status == 200
        await until(lambda: not guard._held, "still counted when the clients have left")
        assert guard._all_held == 0

    run(main())


def test_a_body_in_single_bytes_takes_no_more_memory_than_in_one() -> None:
    """A list of its parts would take 40 times as much."""
    size, seen = 300_000, []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(len((await receive())["body"]))

    async def main() -> None:
        left = size

        async def receive() -> Message:
            nonlocal left
            left -= 1
            return {"type": "http.request", "body": b"1", "more_body": left > 0}

        async def send(message: Message) -> None:
            raise AssertionError(message)

        scope = {"type": "http", "method": "POST", "path": "/"}
        scope["headers"] = [(b"content-type", b"application/json")]  # type: ignore[assignment]
        tracemalloc.start()
        try:
            await BodyGuard(app)(scope, receive, send)
            assert tracemalloc.get_traced_memory()[1] < 4 * size
        finally:
            tracemalloc.stop()

    run(main())
    assert seen == [size]
