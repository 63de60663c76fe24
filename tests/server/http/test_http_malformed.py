"""Requests that are not quite HTTP: a clean 400 and a closed connection, and no desync."""

import asyncio
import random
import socket

import pytest
from starlette.types import Receive, Scope, Send

from dllmserve.server.http.body import BodyGuard
from tests.server.http.live import (
    Echo,
    Waiter,
    ask,
    chunked,
    connected,
    get,
    pending_timers,
    post,
    read_body,
    serving,
    until,
)
from tests.steady import run

GET = b"GET / HTTP/1.1\r\nHost: h\r\n"
POST = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n"

MALFORMED = {
    "not http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 tls\r\n\r\n",
    "text": b"hello\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "version 0.9": b"GET / HTTP/0.9\r\n\r\n",
    "version 1.2": b"GET / HTTP/1.2\r\nHost: h\r\n\r\n",
    "version 2.0": b"GET / HTTP/2.0\r\nHost: h\r\n\r\n",
    "http/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "unknown method": b"FOO / HTTP/1.1\r\nHost: h\r\n\r\n",
    "method in lower case": b"get / HTTP/1.1\r\nHost: h\r\n\r\n",
    "connect": b"CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n",
    "space in target": b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n",
    "tabs": b"GET\t/\tHTTP/1.1\r\nHost: h\r\n\r\n",
    "relative target": b"GET v1/x HTTP/1.1\r\nHost: h\r\n\r\n",
    "absolute target without path": b"GET http://h HTTP/1.1\r\nHost: h\r\n\r\n",
    "only a query": b"GET ?a=/health HTTP/1.1\r\nHost: h\r\n\r\n",
    "NUL in target": b"GET /\x00 HTTP/1.1\r\nHost: h\r\n\r\n",
    "NUL in name": GET + b"A\x00: b\r\n\r\n",
    "NUL in value": GET + b"A: b\x00c\r\n\r\n",
    "control in value": GET + b"A: b\x01\r\n\r\n",
    "byte over 127 in target": b"GET /\xff HTTP/1.1\r\nHost: h\r\n\r\n",
    "bare LF": b"GET / HTTP/1.1\nHost: h\n\n",
    "bare CR": GET + b"A: b\rC: d\r\n\r\n",
    "folded header": GET + b"A: b\r\n c\r\n\r\n",
    "folded first header": b"GET / HTTP/1.1\r\n A: b\r\n\r\n",
    "space before colon": GET + b"A : b\r\n\r\n",
    "no colon": GET + b"abc\r\n\r\n",
    "empty name": GET + b": b\r\n\r\n",
    "length and chunked": POST
    + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    + SMUGGLED,
    "chunked and length": POST
    + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"
    + SMUGGLED,
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 2\r\n\r\n{}" + SMUGGLED,
    "length twice": POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}" + SMUGGLED,
    "list of lengths": POST + b"Content-Length: 2, 2\r\n\r\n{}" + SMUGGLED,
    "signed length": POST + b"Content-Length: +2\r\n\r\n{}" + SMUGGLED,
    "negative length": POST + b"Content-Length: -2\r\n\r\n{}" + SMUGGLED,
    "hex length": POST + b"Content-Length: 0x2\r\n\r\n{}" + SMUGGLED,
    "empty length": POST + b"Content-Length:\r\n\r\n{}" + SMUGGLED,
    "length beyond 64 bits": POST + b"Content-Length: 99999999999999999999\r\n\r\n{}" + SMUGGLED,
    "gzip coding": POST + b"Transfer-Encoding: gzip\r\n\r\n{}" + SMUGGLED,
    "gzip and chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked and gzip": POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked and identity": CHUNKED + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "unknown coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunk size is no number": CHUNKED + b"\r\nzz\r\n" + SMUGGLED,
    "chunk size with 0x": CHUNKED + b"\r\n0x2\r\n{}\r\n0\r\n\r\n" + SMUGGLED,
    "chunk size overflow": CHUNKED + b"\r\nffffffffffffffffff\r\n" + SMUGGLED,
    "chunk size and blank": CHUNKED + b"\r\n2 \r\n{}\r\n0\r\n\r\n" + SMUGGLED,
    "chunk with LF": CHUNKED + b"\r\n2\n{}\n0\n\n" + SMUGGLED,
    "chunk extension with LF": CHUNKED + b"\r\n2;a\nb\r\n{}\r\n0\r\n\r\n" + SMUGGLED,
    "chunk longer than its size": CHUNKED + b"\r\n1\r\n{}\r\n0\r\n\r\n" + SMUGGLED,
    "length as trailer": CHUNKED + b"\r\n0\r\nContent-Length: 5\r\n\r\n" + SMUGGLED,
    "coding as trailer": CHUNKED + b"\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n" + SMUGGLED,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests(name: str) -> None:
    async def main() -> None:
        echo = Echo()
        async with serving(BodyGuard(echo)) as live, connected(live.port) as client:
            answer = await client.ask(MALFORMED[name])
            assert answer.status == 400
            assert answer.headers["connection"] == "close"
            assert answer.error["type"] == "invalid_request_error"
            await until(lambda: not live.state.tasks, "tasks are left")
            assert live.stats.open == 1, "told at once, not only when the connection was gone"
            assert await client.closed() < 2
            assert not echo.seen, "the app must not be called"

    run(main())


def test_malformed_request_after_a_good_one_waits_for_its_answer() -> None:
    async def main() -> None:
        waiter = Waiter()
        async with serving(waiter) as live, connected(live.port) as client:
            await client.send(get() + b"garbage\r\n\r\n" + SMUGGLED)
            await until(lambda: live.stats.refused[400] == 1, "not refused")
            await client.send(SMUGGLED)
            waiter.go.set()
            assert (await client.answer()).body == b"told"
            assert (await client.answer()).status == 400
            await client.closed()
            assert waiter.started == 1

    run(main())


def test_malformed_body_of_a_waiting_request_leaves_the_one_before_alone() -> None:
    async def main() -> None:
        waiter = Waiter()
        async with serving(waiter) as live, connected(live.port) as client:
            await client.send(get() + CHUNKED + b"\r\nzz\r\n")
            await until(lambda: live.stats.refused[400] == 1, "not refused")
            waiter.go.set()
            assert (await client.answer()).body == b"told"
            assert (await client.answer()).status == 400
            await client.closed()
            assert waiter.started == 1

    run(main())


def test_malformed_body_after_the_answer_began_just_closes() -> None:
    async def early(scope: Scope, receive: Receive, send: Send) -> None:
        length = [(b"content-length", b"6")]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": b"abc", "more_body": True})
        await read_body(receive)

    async def main() -> None:
        async with serving(early) as live, connected(live.port) as client:
            await client.send(CHUNKED + b"\r\n")
            head = await client.reader.readuntil(b"\r\n\r\nabc")
            await client.send(b"zz\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            await client.closed()
            await until(lambda: not live.state.tasks, "tasks are left")

    run(main())


def test_client_that_goes_on_sending_is_not_reset() -> None:
    """Closing with unread data resets the connection; some clients lose the answer then."""

    def send_all(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
            sock.sendall(b"garbage\r\n\r\n")
            answer = sock.recv(1000)
            for _ in range(20):  # raises on a reset
                sock.sendall(b"x" * 100_000)
            return answer

    async def main() -> None:
        async with serving(Echo()) as live:
            assert b" 400 " in await asyncio.to_thread(send_all, live.port)

    run(main())


def test_trailers_do_not_become_headers() -> None:
    async def main() -> None:
        echo = Echo()
        async with serving(BodyGuard(echo)) as live, connected(live.port) as client:
            end = b"0\r\nX-Api-Key: secret\r\nContent-Type: text/html\r\n\r\n"
            assert (await client.ask(chunked(b"{}", end=end))).body == b"POST / {}"
            assert (await client.ask(get())).status == 200
            for scope in echo.seen:
                assert b"x-api-key" not in dict(scope["headers"])
            assert dict(echo.seen[0]["headers"])[b"content-type"] == b"application/json"

    run(main())


@pytest.mark.parametrize("size", [1, 2, 7])
def test_requests_in_small_pieces(size: int) -> None:
    async def main() -> None:
        async with serving(BodyGuard(Echo())) as live, connected(live.port) as client:
            data = chunked(b"{", b"}", path="/1") + post(b'"two"', path="/2") + get("/3")
            for at in range(0, len(data), size):
                await client.send(data[at : at + size])
                await asyncio.sleep(0)
            bodies = [(await client.answer()).body for _ in range(3)]
            assert bodies == [b"POST /1 {}", b'POST /2 "two"', b"GET /3 "]

    run(main())


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The same bytes with a few of them changed, doubled, moved or missing."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(5):
            case 0:
                out[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                out[at : at + rng.randint(1, 9)] = b""
            case 2:
                out[at:at] = out[at : at + rng.randint(1, 40)]
            case 3:
                out[at:at] = rng.choice([b"\r\n", b"\n", b"\0", b"\r\n\r\n", b" ", b":", b"%0a"])
            case _:
                del out[at + rng.randint(0, 40) :]
    return bytes(out)


def test_mutated_requests_leave_a_live_server() -> None:
    """Whatever comes: answers below 500 or a close, every connection timed, nothing left."""
    rng = random.Random(4)
    seeds = [
        get("/v1/x?a=b", "Accept: */*"),
        post(b'{"prompt": "hi"}', path="/v1/generate"),
        chunked(b'{"a"', b": 1}"),
        get("/", "Connection: Upgrade", "Upgrade: h2c") + get("/2"),
        chunked(b"{}", end=b"0\r\nA: b\r\n\r\n") + post(b"[]") + get("/", "Connection: close"),
    ]

    async def one(port: int, data: bytes) -> None:
        async with connected(port) as client:
            cut = rng.randrange(len(data) + 1)
            await client.send(data[:cut])
            await asyncio.sleep(0)
            await client.send(data[cut:])
            try:
                while True:
                    answer = await client.answer()
                    assert answer.status < 500, data
            except (EOFError, ConnectionError):
                return

    async def main() -> None:
        app = BodyGuard(Echo(), timeout_s=0.3)
        clock = asyncio.get_running_loop().time
        async with serving(app, header_timeout_s=0.3, keep_alive=0) as live:
            for _ in range(8):
                batch = [mutated(rng, rng.choice(seeds)) for _ in range(60)]
                start = clock()
                await asyncio.gather(*(one(live.port, data) for data in batch))
                assert clock() - start < 4
                await until(lambda: live.stats.open == 0, "connections are left")
                assert not live.state.tasks
                assert not pending_timers()
            assert (await ask(live.port, get())).status == 200

    run(main())
