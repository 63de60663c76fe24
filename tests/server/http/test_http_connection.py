"""What a connection may hold and for how long."""

import asyncio
import contextlib
import socket
import struct
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from dllmserve.errors import ConfigError
from dllmserve.server.http.body import BodyGuard
from dllmserve.server.http.respond import ABORT, LINGER_S
from dllmserve.server.http.slots import ConnectionLimits
from tests.server.http.live import (
    Client,
    Echo,
    Waiter,
    ask,
    connected,
    get,
    pending_timers,
    post,
    read_body,
    reply,
    serving,
    until,
)
from tests.steady import run

SHORT = 0.3  # seconds
SLACK = 2.0


async def half_headers(client: Client) -> float:
    """Send a header now and then until the server has had enough; the seconds it took."""
    return await drip(client, b"POST / HTTP/1.1\r\nHost: h\r\n", b"X-A: b\r\n", "header_timeout")


async def slow_body(client: Client) -> float:
    """The same with the bytes of a body."""
    head = post(b"")[:-2].replace(b"Length: 0", b"Length: 1000") + b"\r\n"
    return await drip(client, head, b"x", "body_timeout")


async def drip(client: Client, head: bytes, drop: bytes, code: str) -> float:
    loop = asyncio.get_running_loop()
    start = loop.time()
    await client.send(head)
    answer = asyncio.ensure_future(client.answer())
    while not answer.done():
        await client.send(drop)
        await asyncio.wait({answer}, timeout=0.1)
    taken = loop.time() - start
    if isinstance(answer.exception(), asyncio.IncompleteReadError | ConnectionError):
        # on a busy machine a client may be so late that it sends to a closed connection
        assert taken > SHORT + LINGER_S
        return taken
    assert answer.result().status == 408
    assert answer.result().error["code"] == code
    await client.closed()
    return loop.time() - start


def test_slow_senders_are_closed_while_others_are_served() -> None:
    async def main() -> None:
        echo = Echo()
        # time enough for those that do send, on a busy machine and in the same loop
        patience = 4 * SHORT
        app = BodyGuard(echo, timeout_s=patience)
        async with serving(app, header_timeout_s=patience) as live:

            async def one(number: int) -> float:
                # its clock runs from here on
                async with connected(live.port) as client:
                    return await (half_headers if number < 100 else slow_body)(client)

            slow = asyncio.gather(*map(one, range(150)))
            served = 0
            while not slow.done():
                assert (await ask(live.port, get("/fine"))).body == b"GET /fine "
                served += 1
            taken = await slow
            assert served > 2
            assert max(taken) < patience + SLACK
            assert len(echo.seen) == served, "the app must not see half a request"
            await until(lambda: live.stats.open == 0, "connections are left")

    run(main())


def test_silent_connection_is_closed_without_an_answer() -> None:
    async def main() -> None:
        async with serving(Echo(), header_timeout_s=SHORT) as live:
            start = asyncio.get_running_loop().time()
            async with connected(live.port) as client:
                await client.closed()
            taken = asyncio.get_running_loop().time() - start
            assert SHORT - 0.01 <= taken < SHORT + SLACK
            assert not live.stats.refused

    run(main())


def test_header_clock_starts_again_with_each_request() -> None:
    """Idle time between requests is the keep-alive timeout's, the next request's its own."""

    async def main() -> None:
        async with serving(Echo(), header_timeout_s=SHORT, keep_alive=5) as live:
            async with connected(live.port) as client:
                assert (await client.ask(get())).status == 200
                await asyncio.sleep(2 * SHORT)
                assert (await client.ask(get("/two"))).body == b"GET /two "
                assert await half_headers(client) < SHORT + SLACK
            async with connected(live.port) as client:
                await client.ask(get())
                await client.send(b"G")
                assert (await client.answer()).status == 408
                await client.closed()

    run(main())


def test_stray_line_ends_do_not_keep_a_connection_open() -> None:
    async def main() -> None:
        async with serving(Echo(), header_timeout_s=SHORT, keep_alive=0.5) as live:
            async with connected(live.port) as first, connected(live.port) as later:
                await first.send(b"\r\n\r\n")
                await later.ask(get())
                await later.send(b"\r\n")
                assert await first.closed() < SHORT + SLACK
                assert await later.closed() < 1 + SLACK

    run(main())


@pytest.mark.parametrize("keep_sending", [False, True])
def test_unread_body_of_an_answered_request_cannot_hold_the_connection(keep_sending: bool) -> None:
    """uvicorn alone forgets its keep-alive timer when a body comes after the answer."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await reply(send, b"no", 401)

    async def main() -> None:
        async with serving(refuse, header_timeout_s=2 * SHORT) as live:
            async with connected(live.port) as client:
                whole = post(b"x" * 1000)
                assert (await client.ask(whole[:-900])).status == 401
                if not keep_sending:
                    assert await client.closed() < 2 * SHORT + SLACK
                    return
                closed = asyncio.ensure_future(client.closed())
                while not closed.done():
                    await client.send(b"x")
                    await asyncio.wait({closed}, timeout=0.05)
                assert closed.result() < 2 * SHORT + SLACK

    run(main())


def test_rest_of_an_answered_request_leaves_the_connection_usable() -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await reply(send, b"no", 401)

    async def main() -> None:
        async with serving(refuse, header_timeout_s=SHORT, keep_alive=1.5) as live:
            async with connected(live.port) as client:
                whole = post(b"x" * 1000)
                assert (await client.ask(whole[:-900])).status == 401
                await client.send(whole[-900:])
                await asyncio.sleep(2 * SHORT)
                assert (await client.ask(get())).status == 401
                assert await client.closed() < 1.5 + SLACK

    run(main())


BOMBS = {
    "one endless header": (b"GET / HTTP/1.1\r\nA: ", b"x" * 40000, 431, "headers_too_large"),
    "one endless name": (b"GET / HTTP/1.1\r\nA", b"x" * 40000, 431, "headers_too_large"),
    "large headers": (
        b"GET / HTTP/1.1\r\n",
        b"A: %b\r\n" % (b"x" * 4000),
        431,
        "headers_too_large",
    ),
    "many headers": (b"GET / HTTP/1.1\r\n", b"A: b\r\n" * 20, 431, "too_many_headers"),
    "long target": (b"GET /", b"x" * 4000, 414, "target_too_long"),
    "long query": (b"GET /?", b"x" * 4000, 414, "target_too_long"),
    "endless line ends": (b"", b"\r\n" * 20000, 431, "headers_too_large"),
    "endless trailer": (
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: ",
        b"x" * 40000,
        431,
        "headers_too_large",
    ),
    "many trailers": (
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        b"A: b\r\n" * 20,
        431,
        "too_many_headers",
    ),
    "endless chunk extension": (
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1;a=",
        b"x" * 40000,
        431,
        "headers_too_large",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_header_bombs(name: str) -> None:
    first, more, status, code = BOMBS[name]

    async def main() -> None:
        echo = Echo()
        async with serving(BodyGuard(echo)) as live, connected(live.port) as client:
            await client.send(first)
            answer = asyncio.ensure_future(client.answer())
            sent = 0
            while not answer.done():
                await client.send(more)
                sent += len(more)
                await asyncio.sleep(0.001)
            assert sent < 2_000_000
            assert answer.result().status == status
            assert answer.result().headers["connection"] == "close"
            assert answer.result().error["code"] == code
            assert answer.result().error["type"] == "invalid_request_error"
            assert await client.closed() < SLACK
            assert not echo.bodies
            assert live.stats.refused == {status: 1}

    run(main())


def test_headers_just_within_the_limits_pass() -> None:
    async def main() -> None:
        limits = {"max_headers": 3, "max_header_bytes": 200, "max_target_bytes": 20}
        async with serving(Echo(), **limits) as live:
            assert (await ask(live.port, get("/" + "x" * 19, "A: b", "C: d"))).status == 200
            assert (await ask(live.port, get("/" + "x" * 20))).status == 414
            assert (await ask(live.port, get("/", "A: b", "C: d", "E: f"))).status == 431
            # the target counts as well: 9 for Host, 5 for A
            fits = get("/" + "x" * 18, "A: " + "x" * (200 - 19 - 9 - 5))
            assert (await ask(live.port, fits)).status == 200
            assert (await ask(live.port, fits.replace(b"A: x", b"A: xx"))).status == 431

    run(main())


def test_app_can_abort_its_connection() -> None:
    async def main() -> None:
        async def stuck(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            scope["extensions"][ABORT]()
            scope["extensions"][ABORT]()  # harmless
            assert (await read_body(receive)) == b""

        async with serving(stuck) as live, connected(live.port) as client:
            await client.send(get())
            with contextlib.suppress(asyncio.IncompleteReadError):
                await client.answer()
            await client.closed()
            await until(lambda: live.stats.open == 0, "still open")

    run(main())


@pytest.mark.parametrize("split", [False, True])
def test_upgrade_offers_are_ignored(split: bool) -> None:
    """Java's HTTP client sends them; uvicorn alone drops the body, or takes it for a request."""
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")

    async def main() -> None:
        echo = Echo()
        async with serving(BodyGuard(echo)) as live, connected(live.port) as client:
            request = post(b'{"a": 1}', *offer, path="/v1/x")
            at = request.index(b"\r\n\r\n") + 4 if split else 1
            await client.send(request[:at])
            await asyncio.sleep(0.05)
            await client.send(request[at:])
            assert (await client.answer()).body == b'POST /v1/x {"a": 1}'
            # and the connection goes on
            assert (await client.ask(get("/2", *offer))).body == b"GET /2 "
            await client.send(get("/3", *offer) + get("/4"))
            assert [(await client.answer()).body for _ in range(2)] == [b"GET /3 ", b"GET /4 "]
            websocket = get("/5", "Connection: upgrade", "Upgrade: websocket")
            assert (await client.ask(websocket)).body == b"GET /5 "
            assert [scope["type"] for scope in echo.seen] == ["http"] * 5

    run(main())


def test_shutdown_closes_idle_connections_and_lets_requests_finish() -> None:
    async def main() -> None:
        waiter = Waiter()
        async with serving(waiter) as live:
            async with connected(live.port) as idle, connected(live.port) as busy:
                await busy.send(get())
                await until(lambda: waiter.started == 1, "not started")
                await until(lambda: live.stats.open == 2, "not open")
                for connection in list(live.state.connections):
                    connection.shutdown()
                assert await idle.closed() < SLACK
                waiter.go.set()
                answer = await busy.answer()
                assert answer.body == b"told"
                await busy.closed()

    run(main())


def test_no_timer_outlives_its_connection() -> None:
    async def main() -> None:
        async with serving(BodyGuard(Echo()), header_timeout_s=60, write_timeout_s=60) as live:
            for data in (b"", b"GET / HT", get(), get() + b"GET", post(b"{}")[:-1], b"bad\r\n\r\n"):
                for reset in (False, True):
                    async with connected(live.port) as client:
                        await client.send(data)
                        await asyncio.sleep(0.02)
                        if reset:
                            sock = client.writer.get_extra_info("socket")
                            linger = struct.pack("ii", 1, 0)
                            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    await until(lambda: live.stats.open == 0, "still open")
                    assert not pending_timers(), data

    run(main())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("header_timeout_s", 0),
        ("write_timeout_s", -1.0),
        ("max_header_bytes", 0),
        ("max_headers", True),
        ("max_connections", 1.5),
    ],
)
def test_limits_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be .*got {value}"):
        ConnectionLimits(**{name: value})
