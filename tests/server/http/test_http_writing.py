"""Clients that do not read: cut after a while, and told from those that read slowly."""

import asyncio
import socket

import pytest
from starlette.types import Receive, Scope, Send

from dllmserve.server.http.respond import ABORT
from dllmserve.server.http.slots import SIDE_BY_SIDE, Classify, Sender
from tests.server.http.live import Live, ask, connected, get, reply, serving, until
from tests.steady import run

SHORT = 0.3  # seconds
SLACK = 2.0


async def lazy_reader(live: Live, request: bytes) -> socket.socket:
    """A connection with a small receive window that has sent its request."""
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await loop.sock_connect(sock, ("127.0.0.1", live.port))
    await loop.sock_sendall(sock, request)
    return sock


class Flood:
    """An app that sends events for as long as it can."""

    def __init__(self) -> None:
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.running += 1
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            gone = asyncio.ensure_future(self.wait_for_end(receive))
            while not gone.done():
                await send({"type": "http.response.body", "body": b"x" * 8192, "more_body": True})
                await asyncio.sleep(0)
        finally:
            self.running -= 1

    @staticmethod
    async def wait_for_end(receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            await asyncio.sleep(0)


def test_client_that_does_not_read_is_cut() -> None:
    async def main() -> None:
        flood = Flood()
        async with serving(flood, write_timeout_s=SHORT, sndbuf=8192) as live:
            socks = [await lazy_reader(live, get()) for _ in range(20)]
            await until(lambda: flood.running == 20, "not started")
            assert (await ask(live.port, b"bad\r\n\r\n")).status == 400
            taken = await until(lambda: flood.running == 0, "still writing")
            assert taken < SHORT + SLACK
            assert live.stats.open == 0
            assert live.stats.dropped["slow_reader"] == 20
            for sock in socks:
                sock.close()

    run(main())


@pytest.mark.parametrize("sender", ["probe", "stranger", "client", "key"])
def test_who_does_not_read_gives_way_unless_it_is_a_client(sender: Sender) -> None:
    async def main() -> None:
        flood = Flood()
        limits = {"max_connections": 4, "reserve": 0, "write_timeout_s": 60.0}
        classify: Classify = lambda path, headers: sender  # noqa: E731
        async with serving(flood, classify=classify, sndbuf=8192, **limits) as live:
            socks = [await lazy_reader(live, get()) for _ in range(4)]
            await until(lambda: flood.running == 4, "not started")
            if sender in ("client", "key"):
                async with connected(live.port) as client:
                    await client.closed()
                assert flood.running == 4 and live.stats.dropped == {"full": 1}
            else:
                assert (await ask(live.port, b"bad\r\n\r\n")).status == 400
                await until(lambda: flood.running == 3, "nobody was told")
                assert live.stats.dropped == {"idle": 1}
            for sock in socks:
                sock.close()

    run(main())


def test_those_that_do_not_read_take_nobodys_turn() -> None:
    async def main() -> None:
        flood = Flood()
        classify: Classify = lambda path, headers: "probe"  # noqa: E731
        async with serving(flood, classify=classify, sndbuf=8192, write_timeout_s=60.0) as live:
            socks = [await lazy_reader(live, get()) for _ in range(3 * SIDE_BY_SIDE)]
            await until(lambda: flood.running == 3 * SIDE_BY_SIDE, "some wait for others")
            for sock in socks:
                sock.close()
            await until(lambda: live.connections._turns == 0, "a turn was lost")

    run(main())


def test_slow_reader_of_a_large_answer_is_not_cut() -> None:
    size, timeout = 1_500_000, 0.5

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await reply(send, b"x" * size, 200, (b"connection", b"close"))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with serving(large, write_timeout_s=timeout, sndbuf=8192) as live:
            sock = await lazy_reader(live, get())
            start, got = loop.time(), 0
            while data := await loop.sock_recv(sock, 65536):
                got += len(data)
                # in each timeout several times MIN_PROGRESS_BYTES, and never all that is left
                due = start + 3 * timeout * got / size
                await asyncio.sleep(due - loop.time())
            assert loop.time() - start > 2 * timeout
            assert got > size
            assert live.stats.dropped["slow_reader"] == 0
            sock.close()

    run(main())


def test_closing_does_not_wait_for_ever_for_a_client_that_does_not_read() -> None:
    """A small rest in the buffer pauses nobody, yet it holds a connection that is closing."""

    async def fill(scope: Scope, receive: Receive, send: Send) -> None:
        # just more than the kernel takes, below the high-water mark of 64 KiB
        await send({"type": "http.response.start", "status": 200, "headers": []})
        transport = getattr(scope["extensions"][ABORT], "__self__").transport  # noqa: B009
        while transport.get_write_buffer_size() == 0:
            await send({"type": "http.response.body", "body": b"x" * 4000, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def main() -> None:
        async with serving(fill, write_timeout_s=SHORT, sndbuf=8192) as live:
            sock = await lazy_reader(live, get("/", "Connection: close"))
            await until(lambda: live.stats.dropped["slow_reader"] == 1, "not cut")
            await until(lambda: live.stats.open == 0, "still open")
            sock.close()

    run(main())


def test_reader_that_has_caught_up_is_not_cut() -> None:
    part, timeout = 500_000, 0.5

    async def pausing(scope: Scope, receive: Receive, send: Send) -> None:
        length = [(b"content-length", str(2 * part).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": b"x" * part, "more_body": True})
        await asyncio.sleep(2.5 * timeout)
        await send({"type": "http.response.body", "body": b"x" * part})

    async def main() -> None:
        async with serving(pausing, write_timeout_s=timeout, sndbuf=8192) as live:
            assert len((await ask(live.port, get())).body) == 2 * part
            assert live.stats.dropped["slow_reader"] == 0

    run(main())
