"""All guards in a real uvicorn server, in a thread of its own, asked by ordinary clients."""

import asyncio
import contextlib
import http.client
import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from dllmserve.server.http.auth import ApiKeys, AuthGuard
from dllmserve.server.http.body import BodyGuard
from dllmserve.server.http.listener import GuardedServer
from dllmserve.server.http.request_id import RequestLog
from dllmserve.server.http.slots import ConnectionLimits, Connections, ConnectionStats
from tests.server.http.live import Echo, reply

KEY = "0123456789abcdef"


def guarded(app: ASGIApp) -> ASGIApp:
    keys = ApiKeys.from_list([KEY])
    body = BodyGuard(app, timeout_s=0.5)
    return RequestLog(AuthGuard(body, keys=keys, open_paths=frozenset({"/health"})))


@contextlib.contextmanager
def server(app: ASGIApp, **limits: Any) -> Iterator[tuple[int, ConnectionStats, uvicorn.Server]]:
    connections = Connections(ConnectionLimits(**limits))
    config = uvicorn.Config(
        app, http="httptools", ws="none", log_config=None, access_log=False, server_header=False
    )
    running = GuardedServer(config, connections)
    # as a server does that takes its port before it loads the model
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not running.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield listener.getsockname()[1], connections.stats, running
    finally:
        running.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
        assert connections.stats.open == 0


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})
        return
    await Echo()(scope, receive, send)


def test_ordinary_clients() -> None:
    with server(guarded(app)) as (port, stats, _):
        headers = {"Authorization": f"Bearer {KEY}"}
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, headers=headers) as client:
            seconds = []
            for number in range(100):
                start = time.monotonic()
                answer = client.post("/v1/x", json={"n": number})
                assert answer.content == b'POST /v1/x {"n":%d}' % number
                seconds.append(time.monotonic() - start)
                assert "server" not in answer.headers and "date" in answer.headers
            # 40 ms for each, if Nagle's algorithm were left on; a busy machine delays a few
            assert statistics.median(seconds) < 0.03
            assert stats.open == 1
            assert client.post("/v1/x", content=b"x" * 3_000_000).status_code == 413
            assert client.post("/v1/x", data={"a": "b"}).status_code == 415
            assert client.get("/v1/x", headers={"Authorization": ""}).status_code == 401
            assert client.get("/v1/x", headers={"X-A": "x" * 70000}).status_code == 431
            assert client.get("/health", headers={"Authorization": ""}).status_code == 200
            assert client.get("/" + "x" * 9000).json()["error"]["code"] == "target_too_long"
        plain = http.client.HTTPConnection("127.0.0.1", port)
        plain.request("POST", "/v1/x", b"{}", headers | {"Content-Type": "application/json"})
        assert plain.getresponse().read() == b"POST /v1/x {}"
        plain.close()


def test_stops_soon_although_connections_are_half_open() -> None:
    """A limit of minutes must not hold the shutdown for minutes."""
    with server(guarded(app), header_timeout_s=600) as (port, stats, running):
        socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for sock in socks[:10]:
            sock.sendall(b"GET / HT")
        while stats.open < 20:
            time.sleep(0.01)
        start = time.monotonic()
        running.should_exit = True
        for sock in socks:
            assert sock.recv(10) == b""
            sock.close()
        assert time.monotonic() - start < 60


def test_stops_after_the_running_request() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
            return
        started.set()
        await asyncio.sleep(0.5)
        await reply(send, b"finished")

    started = threading.Event()
    with server(slow) as (port, _, running):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/")
        assert started.wait(10)
        running.should_exit = True
        answer = connection.getresponse()
        assert answer.read() == b"finished"
        assert answer.getheader("connection") == "close"
        connection.close()


def test_detail_of_a_refused_native_request() -> None:
    with server(guarded(app)) as (port, _, _running):
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/generate", json={})
        body = json.loads(answer.content)
        assert answer.status_code == 401
        assert body["detail"] == body["error"]["message"]


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_open_path_without_a_key(method: str) -> None:
    with server(guarded(app)) as (port, _, _running):
        answer = httpx.request(method, f"http://127.0.0.1:{port}/health")
        assert (answer.status_code, len(answer.headers["x-request-id"])) == (200, 32)
