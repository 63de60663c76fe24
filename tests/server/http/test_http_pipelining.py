"""Requests that are sent before the answers to those before them have come."""

import asyncio
import contextlib
import random
import socket
import struct

import pytest
from starlette.types import Receive, Scope, Send

from dllmserve.server.http.body import BodyGuard
from dllmserve.server.http.connection import MAX_PIPELINED
from tests.server.http.live import (
    Echo,
    Waiter,
    connected,
    get,
    post,
    read_body,
    reply,
    serving,
    until,
)
from tests.steady import run


def test_pipelined_requests_are_answered_in_order() -> None:
    async def main() -> None:
        async with serving(BodyGuard(Echo())) as live, connected(live.port) as client:
            await client.send(get("/1") + post(b"{}", path="/2") + get("/3"))
            bodies = [(await client.answer()).body for _ in range(3)]
            assert bodies == [b"GET /1 ", b"POST /2 {}", b"GET /3 "]

    run(main())


SECOND = {
    "a head": get("/2"),
    "half a head": get("/2") + get("/3")[:-5],
    "a body": post(b"x" * 20_000, path="/2"),
    "half a body": post(b"x" * 20_000, path="/2")[:-5],
    "many": get("/2") * 16,
    "chunks": b"POST /2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
}


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("later", [False, True], ids=["together", "later"])
@pytest.mark.parametrize("name", SECOND)
def test_a_client_that_leaves_ends_all_its_requests(name: str, later: bool, reset: bool) -> None:
    """uvicorn alone tells only the latest of them, and reads no more while one waits."""

    async def main() -> None:
        waiter = Waiter()
        async with serving(BodyGuard(waiter)) as live:
            async with connected(live.port) as client:
                await client.send(get("/1") if later else get("/1") + SECOND[name])
                await until(lambda: waiter.started == 1, "not started")
                if later:
                    await client.send(SECOND[name])
                waiting = live.state.connections
                await until(lambda: any(one.pipeline for one in waiting), "not received")
                if reset:
                    sock = client.writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await until(lambda: waiter.left == 1, "the first request still waits")
            await until(lambda: not live.state.tasks, "tasks are left")
            assert waiter.started == 1

    run(main())


def request(number: int, body: bytes) -> bytes:
    """With a length or in chunks."""
    if number % 2:
        return post(body, path=f"/{number}")
    parts = [body[at : at + 1000] for at in range(0, len(body), 1000)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    head = b"POST /%d HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" % number
    return head + chunks + b"0\r\n\r\n"


@pytest.mark.parametrize("seed", range(6))
def test_whatever_pieces_requests_come_in_they_are_answered_in_order(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [0, 10, 3000, 30_000, 150_000, 0, 1, 70_000]
    rng.shuffle(sizes)
    bodies = [rng.randbytes(size) for size in sizes]
    sent = b"".join(request(number, body) for number, body in enumerate(bodies))

    async def slowly(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(rng.choice([0.0, 0.0, 0.01]))

    async def main() -> None:
        async with serving(Echo(before=slowly)) as live, connected(live.port) as client:

            async def send_all() -> None:
                at = 0
                while at < len(sent):
                    size = rng.choice([1, 7, 2048, 5000, 100_000])
                    await client.send(sent[at : at + size])
                    await asyncio.sleep(0)
                    at += size

            sending = asyncio.ensure_future(send_all())
            for number, body in enumerate(bodies):
                assert (await client.answer()).body == b"POST /%d " % number + body
            await sending

    run(main())


@pytest.mark.parametrize("name", ["never answers", "answers", "answers, nobody reads", "asks on"])
def test_what_waits_is_bounded(name: str) -> None:
    """A client may send as much as it likes: it is not read."""

    async def main() -> None:
        go = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await read_body(receive)
            if name == "never answers":
                await go.wait()
            for _ in range(200 if name == "asks on" else 1):
                # as an app does that looks whether its client is still there
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(receive(), 0.001)
            await reply(send)

        async with serving(app) as live, connected(live.port) as client:
            request = get("/k", "X: " + "y" * 150)

            async def flood() -> None:
                while True:
                    await client.send(request * 2000)

            async def read() -> None:
                while name == "answers" and await client.reader.read(65536):
                    pass

            tasks = [asyncio.ensure_future(flood()), asyncio.ensure_future(read())]
            await until(lambda: bool(live.state.connections), "not there")
            (server,) = live.state.connections
            most = 0
            for _ in range(100):
                await asyncio.sleep(0.005)
                most = max(most, len(server._held))
            assert 65536 <= most <= 2 * 65536
            if name == "answers":
                assert live.state.total_requests > 20
            client.writer.transport.abort()
            go.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await until(lambda: not live.state.tasks, "tasks are left")

    run(main())


def test_number_of_pipelined_requests_is_bounded() -> None:
    async def main() -> None:
        waiter = Waiter()
        async with serving(waiter) as live, connected(live.port) as client:
            for _ in range(20):
                await client.send(get() * 50)
            await until(lambda: live.stats.refused[400] == 1, "not refused")
            waiter.go.set()
            for _ in range(MAX_PIPELINED + 1):
                assert (await client.answer()).body == b"told"
            last = await client.answer()
            assert (last.status, last.error["code"]) == (400, "too_many_pipelined")
            await client.closed()
            assert waiter.started == MAX_PIPELINED + 1

    run(main())
