"""The application under ASGI hosts that know nothing of it but its lifespan."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from starlette.types import Message

from dllmserve.errors import ModelNotFoundError
from tests.server.http.live import Answer, ask, get, post
from tests.server.stand_in import Server, make_server, run, until

ASKED = {"prompt": "ab", "max_tokens": 4}


def fails(server: Server) -> None:
    """Make the start of the engine fail."""

    async def start() -> Any:
        raise ModelNotFoundError("there is no such model")

    server.engine.start = start  # type: ignore[method-assign]


def test_a_host_in_the_same_loop(byte_checkpoint: Path) -> None:
    """What Ray Serve does with an application: its lifespan, and one scope for each request."""
    app, _server = make_server(byte_checkpoint)

    async def main() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            before = await client.get("/ready")
            assert (before.status_code, before.json()["status"]) == (503, "loading")
            assert (await client.get("/live")).status_code == 200
            async with app.router.lifespan_context(app):
                answer = await client.post("/v1/completions", json=ASKED)
                assert answer.json()["choices"][0]["text"] == "abab"
                assert answer.headers["x-request-id"]  # the guards are there
            after = await client.get("/ready")
            assert (after.status_code, after.json()["status"]) == (503, "draining")

    run(main())


def test_a_lifespan_tells_every_step(byte_checkpoint: Path) -> None:
    """The store first, then the engine; what is under way is answered before both end."""
    app, server = make_server(byte_checkpoint, shutdown_timeout=20.0)
    server.engine.loaded.clear()
    server.engine.hold = True
    steps: asyncio.Queue[Message] = asyncio.Queue()
    told: list[str] = []

    async def send(message: Message) -> None:
        told.append(message["type"])

    async def main() -> None:
        living = asyncio.create_task(app({"type": "lifespan"}, steps.get, send))
        steps.put_nowait({"type": "lifespan.startup"})
        await until(lambda: server.jobs._expiring is not None)
        assert (await server.get("/live")).status == 200
        assert (await server.post("/v1/completions", ASKED)).status == 503
        assert told == []
        server.engine.loaded.set()
        await until(lambda: told == ["lifespan.startup.complete"])
        answering = server.begin("POST", "/v1/completions", ASKED)
        await until(lambda: bool(server.engine.calls))
        steps.put_nowait({"type": "lifespan.shutdown"})
        await until(lambda: server.service.status == "draining")
        assert (await server.post("/v1/completions", ASKED)).status == 503
        assert told == ["lifespan.startup.complete"] and not living.done()
        server.engine.play(server.engine.calls[0])
        assert (await answering.reply()).status == 200
        await living
        assert told == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        assert server.engine.state.name == "CLOSED"

    run(main())


def test_starlettes_test_client(byte_checkpoint: Path) -> None:
    app, server = make_server(byte_checkpoint)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.get("/ready").status_code == 200
        assert client.post("/v1/completions", json=ASKED).json()["choices"][0]["text"] == "abab"
    assert server.service.status == "draining"
    # another machine might ask under a name, and there are no keys
    assert TestClient(app).get("/live").status_code == 401
    app, server = make_server(byte_checkpoint)
    fails(server)
    with pytest.raises(ModelNotFoundError), TestClient(app):
        raise AssertionError("it has started")


@asynccontextmanager
async def hypercorn(app: Any) -> AsyncIterator[int]:
    """Run an application under hypercorn in this loop; gives the port."""
    asyncio_hypercorn = pytest.importorskip("hypercorn.asyncio")
    config = pytest.importorskip("hypercorn.config").Config()
    bound = socket.create_server(("127.0.0.1", 0))
    config.bind, config.accesslog, config.errorlog = [f"fd://{bound.fileno()}"], None, None
    port, stop = bound.getsockname()[1], asyncio.Event()
    bound.detach()  # hypercorn closes it
    served = asyncio.create_task(asyncio_hypercorn.serve(app, config, shutdown_trigger=stop.wait))
    try:
        yield port
    finally:
        stop.set()
        await served


async def started(port: int, path: str = "/ready") -> Answer:
    """The first answer of a host that is being started."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await ask(port, get(path))
            except (ConnectionError, asyncio.IncompleteReadError):
                await asyncio.sleep(0.01)


def test_hypercorn(byte_checkpoint: Path) -> None:
    app, server = make_server(byte_checkpoint)

    async def main() -> None:
        async with hypercorn(app) as port:
            assert (await started(port)).status == 200
            body = json.dumps({**ASKED, "stream": True}).encode()
            streamed = await ask(port, post(body, path="/v1/completions"))
            assert streamed.body.endswith(b"data: [DONE]\n\n")
            asked = await ask(port, post(json.dumps(ASKED).encode(), path="/v1/completions"))
            assert json.loads(asked.body)["choices"][0]["text"] == "abab"
            wrong = await ask(port, post(b"{", path="/v1/completions"))
            assert (wrong.status, wrong.error["code"]) == (400, "invalid_json")
            assert (await ask(port, get("/v1/none"))).error["code"] == "not_found"
        assert server.engine.state.name == "CLOSED" and server.idle()

    run(main())


def test_hypercorn_is_told_why_the_start_fails(byte_checkpoint: Path) -> None:
    app, server = make_server(byte_checkpoint)
    fails(server)

    async def main() -> None:
        failure = pytest.importorskip("hypercorn.utils").LifespanFailureError
        with pytest.raises(failure, match="dllmserve cannot start: there is no such model"):
            async with hypercorn(app) as port:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await started(port)

    run(main())


@pytest.mark.parametrize("workers", [1, 2])
def test_hypercorn_from_the_environment(workers: int, tmp_path: Path) -> None:
    """The embedded model and a real engine; more than one worker is refused."""
    pytest.importorskip("hypercorn")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hypercorn", "dllmserve.server.app:app"]
    command += ["--bind", f"127.0.0.1:{port}", "--workers", str(workers)]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("DLLMSERVE_")}
    environ |= {"XDG_STATE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    try:
        if workers == 1:
            url, until_ = f"http://127.0.0.1:{port}", time.monotonic() + 120
            while time.monotonic() < until_ and process.poll() is None:
                try:
                    answer = httpx.post(f"{url}/v1/completions", json=ASKED, timeout=60)
                except httpx.TransportError:
                    time.sleep(0.1)
                    continue
                assert answer.json()["usage"]["completion_tokens"] == 4
                break
            assert process.poll() is None, (tmp_path / "log").read_text()
            process.send_signal(signal.SIGTERM)
        process.wait(120)
    finally:
        process.kill()
        process.wait()
    text = (tmp_path / "log").read_text()
    assert ("runs in one server process" in text) == (workers > 1), text
    assert "Traceback" not in text or workers > 1, text
