"""Connections from the moment that they are accepted, with TLS and without, few and many."""

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from dllmserve.server.http.auth import ApiKeys, AuthGuard, presented
from dllmserve.server.http.body import BodyGuard
from dllmserve.server.http.listener import Listener
from dllmserve.server.http.logs import OncePerSecond
from dllmserve.server.http.respond import LINGER_S
from dllmserve.server.http.slots import SIDE_BY_SIDE, ConnectionLimits, Connections, Sender
from tests.server.http.live import (
    PATIENCE,
    Echo,
    Live,
    Waiter,
    ask,
    connected,
    get,
    post,
    reply,
    serving,
    until,
)
from tests.steady import run

SHORT = 0.5  # seconds
SLACK = 2.0
KEY = "0123456789abcdef"
MINE = f"X-Api-Key: {KEY}"
KEYS = ApiKeys.from_list([KEY])
OPEN = frozenset({"/health"})
#: how many clients do nothing where a few are served
CROWD = 60

Pair = tuple[ssl.SSLContext, ssl.SSLContext]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The server's context and a client's."""
    if shutil.which("openssl") is None:
        pytest.skip("makes a certificate with openssl")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    client = ssl.create_default_context(cafile=str(certificate))
    client.check_hostname = False
    return server, client


def classify(path: str, headers: Any) -> Sender:
    if path in OPEN:
        return "probe"
    secrets = presented(headers)
    return "key" if len(secrets) == 1 and KEYS.match(secrets.pop()) else "stranger"


def guarded(app: ASGIApp) -> ASGIApp:
    return AuthGuard(BodyGuard(app, bodiless=OPEN), keys=KEYS, open_paths=OPEN)


async def hold(live: Live, data: bytes = b"") -> None:
    """Keep a connection open, and open another one whenever it is closed; until cancelled."""
    while True:
        with contextlib.suppress(OSError):
            async with connected(live.port) as client:
                await client.send(data)
                while await client.reader.read(65536):
                    pass


@contextlib.asynccontextmanager
async def crowd(live: Live, data: bytes = b"", count: int = CROWD) -> Any:
    """Clients that hold connections, and have taken all that there are."""
    tasks = [asyncio.ensure_future(hold(live, data)) for _ in range(count)]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


NOTHING = {
    "silent": b"",
    "half a head": get("/health")[:-10],
    "a stranger's body": post(b"x" * 1000, path="/v1/x")[:-10],
    "a probe's body": post(b"x" * 1000, path="/health")[:-10],
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_crowd_keeps_neither_probes_nor_keys_out(name: str) -> None:
    async def main() -> None:
        limits = {"max_connections": 10, "reserve": 10, "header_timeout_s": 60.0}
        app = guarded(Echo())
        async with serving(app, classify=classify, **limits) as live, crowd(live, NOTHING[name]):
            await until(lambda: live.stats.dropped["idle"] > CROWD, "not crowded")
            for _ in range(8):
                assert (await ask(live.port, get("/health"))).status == 200
                assert (await ask(live.port, get("/v1/x", MINE))).status == 200
            assert live.stats.open <= 20

    run(main())


def test_a_crowd_keeps_no_tls_client_out(tls: Pair) -> None:
    """Connections that never finish their handshake give way as others do."""
    server, client = tls

    async def main() -> None:
        limits = {"max_connections": 20, "reserve": 20, "header_timeout_s": 60.0}
        async with serving(Echo(), context=server, **limits) as live, crowd(live):
            await until(lambda: live.stats.dropped["idle"] > CROWD, "not crowded")
            for _ in range(10):
                async with connected(live.port, client) as asking:
                    assert (await asking.ask(get("/health"))).status == 200
            assert live.stats.open <= 40

    run(main())


def test_requests_under_way_are_never_dropped() -> None:
    async def main() -> None:
        waiter = Waiter()
        async with (
            serving(waiter, max_connections=4, reserve=2) as live,
            contextlib.AsyncExitStack() as stack,
        ):
            busy = [await stack.enter_async_context(connected(live.port)) for _ in range(4)]
            for client in busy:
                await client.send(post(b"x"))
            await until(lambda: waiter.started == 4, "not started")
            async with crowd(live):
                await until(lambda: live.stats.dropped["idle"] > CROWD, "not crowded")
            waiter.go.set()
            assert [(await client.answer()).body for client in busy] == [b"told"] * 4
            assert waiter.left == 0

    run(main())


PIPELINED = {
    "probes": get("/health") * 8,
    "strangers": get("/v1/x") * 8,
    "wrong keys": get("/v1/x", "X-Api-Key: wrong") * 8,
}


@pytest.mark.parametrize("name", PIPELINED)
def test_a_crowd_that_asks_without_pause_keeps_nobody_out(name: str) -> None:
    """Each connection always has a request under way, and reads the answers."""

    async def ask_on(live: Live) -> None:
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                async with connected(live.port) as client:
                    await client.send(PIPELINED[name])
                    while True:
                        await client.send(PIPELINED[name][: len(PIPELINED[name]) // 8])
                        await client.answer()

    async def slowly(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.001)

    async def main() -> None:
        limits = {"max_connections": 10, "reserve": 10}
        app = guarded(Echo(before=slowly))
        async with serving(app, classify=classify, **limits) as live:
            tasks = [asyncio.ensure_future(ask_on(live)) for _ in range(30)]
            await until(lambda: live.stats.dropped["idle"] > 30, "not crowded")
            for _ in range(8):
                assert (await ask(live.port, get("/health"))).status == 200
                assert (await ask(live.port, get("/v1/x", MINE))).status == 200
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    run(main())


@pytest.mark.parametrize("leaves", [False, True])
def test_a_few_requests_without_a_key_are_answered_at_a_time(leaves: bool) -> None:
    """Those with one do not wait for them, and whoever leaves or does not read is passed over."""

    async def main() -> None:
        waiter = Waiter()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await (reply(send) if scope["path"] == "/v1/x" else waiter(scope, receive, send))

        async with serving(app, classify=classify) as live, contextlib.AsyncExitStack() as stack:
            clients = []
            for _ in range(2 * SIDE_BY_SIDE):
                clients.append(await stack.enter_async_context(connected(live.port)))
                await clients[-1].send(get("/health"))
            await until(lambda: waiter.started == SIDE_BY_SIDE, "not started")
            assert (await ask(live.port, get("/v1/x", MINE))).status == 200
            assert waiter.started == SIDE_BY_SIDE and live.stats.busy == 0
            if leaves:
                for client in clients[::2]:
                    client.writer.transport.abort()
                await until(lambda: waiter.left == SIDE_BY_SIDE // 2, "they are still answered")
                assert waiter.started == SIDE_BY_SIDE + SIDE_BY_SIDE // 2
            waiter.go.set()
            for client in clients[1 :: 2 if leaves else 1]:
                assert (await client.answer()).body == b"told"
            assert live.connections._turns == 0 and not live.connections._waiting

    run(main())


@pytest.mark.parametrize("keyed", [False, True], ids=["no keys", "keys"])
def test_when_all_are_busy_clients_are_told_so_and_probes_answered(keyed: bool) -> None:
    async def main() -> None:
        waiter = Waiter()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/wait":
                await waiter(scope, receive, send)
            else:
                await reply(send)

        def everybody(path: str, headers: Any) -> Sender:
            return "probe" if path in OPEN else "client"

        header = (MINE,) if keyed else ()
        limits = {"max_connections": 2, "reserve": 4}
        async with (
            serving(app, classify=classify if keyed else everybody, **limits) as live,
            contextlib.AsyncExitStack() as stack,
        ):
            # a key may have half of the reserve besides
            for _ in range(4 if keyed else 2):
                client = await stack.enter_async_context(connected(live.port))
                await client.send(get("/wait", *header))
            await until(lambda: live.stats.busy == (4 if keyed else 2), "not started")
            refused = await ask(live.port, get("/x", *header))
            assert (refused.status, refused.error["code"]) == (503, "too_many_connections")
            assert refused.error["type"] == "overloaded_error"
            assert refused.headers["retry-after"] == "1"
            assert (await ask(live.port, get("/health"))).status == 200
            assert live.stats.refused[503] == 1
            waiter.go.set()
            await until(lambda: live.stats.busy == 0, "still busy")
            assert (await ask(live.port, get("/x", *header))).status == 200

    run(main())


def test_an_address_has_a_limit() -> None:
    async def main() -> None:
        async with serving(Echo(), max_per_address=2) as live:
            async with connected(live.port), connected(live.port) as second:
                await until(lambda: live.stats.open == 2, "not open")
                async with connected(live.port) as third:
                    answer = await third.answer()
                    assert (answer.status, answer.error["code"]) == (429, "too_many_connections")
                    assert answer.headers["retry-after"] == "1"
                    await third.closed()
                assert live.stats.refused == {429: 1}
                assert (await second.ask(get())).status == 200
            await until(lambda: live.stats.open == 0, "still open")
            assert (await ask(live.port, get())).status == 200

    run(main())


def test_an_address_has_a_limit_with_tls_and_ipv6(tls: Pair) -> None:
    server, client = tls

    async def main() -> None:
        async with serving(Echo(), context=server, max_per_address=1, host="::1") as live:
            async with connected(live.port, client, "::1") as first:
                async with connected(live.port, host="::1") as second:
                    await second.closed()  # an answer would take a handshake
                assert live.stats.refused == {429: 1}
                assert (await first.ask(get())).status == 200

    run(main())


#: how a client begins that will not finish its handshake
HANDSHAKES = {
    "silent": b"",
    "half a ClientHello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 20,
}


@pytest.mark.parametrize("name", HANDSHAKES)
def test_a_handshake_has_the_time_of_a_head(name: str, tls: Pair) -> None:
    async def main() -> None:
        async with serving(Echo(), context=tls[0], header_timeout_s=SHORT) as live:
            async with connected(live.port) as client:
                await client.send(HANDSHAKES[name])
                await until(lambda: live.stats.open == 1, "not counted before its handshake")
                assert await client.closed() < SHORT + SLACK
            await until(lambda: live.stats.open == 0, "still open")
            assert live.stats.dropped == {"handshake": 1}

    run(main())


def test_one_clock_runs_from_accept_to_the_end_of_the_head(tls: Pair) -> None:
    """Neither a slow handshake nor silence behind it gives more time."""
    server, context = tls

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with serving(Echo(), context=server, header_timeout_s=3 * SHORT) as live:
            start = loop.time()  # before it is accepted
            reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
            await until(lambda: live.stats.open == 1, "not accepted")
            await asyncio.sleep(2 * SHORT)
            await writer.start_tls(context)
            assert await reader.read() == b""
            assert loop.time() - start < 3 * SHORT + LINGER_S + SLACK
            assert loop.time() - start >= 3 * SHORT
            writer.close()

    run(main())


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", b"\x15\x03\x01\x00\x02\x02\x28", b"x" * 9000]
)
def test_what_is_no_handshake_is_one_line_a_second(
    data: bytes, tls: Pair, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dllmserve"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("asyncio"), "propagate", True)
    caplog.set_level(logging.DEBUG, "dllmserve")

    async def main() -> None:
        async with serving(Echo(), context=tls[0]) as live:
            for _ in range(20):
                async with connected(live.port) as client:
                    await client.send(data)
                    with contextlib.suppress(ConnectionError):
                        await client.reader.read()
            await until(lambda: live.stats.dropped["handshake"] == 20, "not noticed")
            assert live.stats.open == 0

    run(main())
    ours = [r for r in caplog.records if r.name.startswith("dllmserve")]
    assert 1 <= len(ours) < 10 and {r.levelname for r in ours} == {"INFO"}
    assert all(r.exc_info is None for r in caplog.records)


class NoFiles(socket.socket):
    """A listening socket with an error for so many attempts."""

    left = 0
    error = errno.EMFILE
    tries = 0

    def accept(self) -> Any:
        self.tries += 1
        if self.left:
            self.left -= 1
            raise OSError(self.error, os.strerror(self.error))
        return super().accept()


@contextlib.contextmanager
def listening() -> Iterator[NoFiles]:
    with NoFiles() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        sock.setblocking(False)
        yield sock


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EPROTO])
def test_without_files_idle_connections_go_and_nothing_spins(
    number: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dllmserve"), "propagate", True)

    async def main() -> None:
        connections = Connections(ConnectionLimits())
        made: list[asyncio.Protocol] = []

        def make(place: Any) -> asyncio.Protocol:
            made.append(asyncio.Protocol())
            return made[-1]

        with listening() as sock:
            listener = Listener(sock, connections, make)
            port = sock.getsockname()[1]
            async with contextlib.AsyncExitStack() as stack:
                held = [await stack.enter_async_context(connected(port)) for _ in range(20)]
                await until(lambda: len(made) == 20, "not accepted")
                sock.tries, sock.left, sock.error = 0, 5, number
                async with connected(port):
                    await until(lambda: len(made) == 21, "not accepted")
                    # five in vain, one that is right, and one that finds nobody; no spinning
                    assert sock.tries <= 7
                gone = connections.stats.dropped["files"]
                assert (gone > 0) is (number != errno.EPROTO)
                for client in held[:gone]:
                    await client.closed()
            listener.close()
            await listener.wait_closed()

    run(main())
    lines = [r for r in caplog.records if r.getMessage() == "no connection can be accepted"]
    assert 1 <= len(lines) < 5  # one a second, and five attempts
    assert vars(lines[0])["reason"] == os.strerror(number)


def test_closing_ends_handshakes_and_accepts_no_more(tls: Pair) -> None:
    async def main() -> None:
        async with serving(Echo(), context=tls[0], header_timeout_s=60) as live:
            async with connected(live.port) as client:
                await until(lambda: live.stats.open == 1, "not open")
                closing = asyncio.ensure_future(client.closed())
                await asyncio.sleep(0)
        # the end of the block waits for what is in its handshake
        assert await asyncio.wait_for(closing, PATIENCE) < SLACK

    run(main())


def test_seldom_counts_what_it_does_not_say() -> None:
    now = [0.0]
    log = logging.getLogger("dllmserve.test_seldom")
    records: list[logging.LogRecord] = []
    log.addFilter(lambda record: records.append(record) or False)  # type: ignore[func-returns-value]
    seldom = OncePerSecond(log, logging.WARNING, lambda: now[0])
    for tenth in range(25):
        now[0] = tenth / 10
        seldom("again", number=tenth)
    assert [(vars(r)["number"], vars(r)["times"]) for r in records] == [(0, 1), (10, 10), (20, 10)]
