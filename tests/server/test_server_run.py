"""dllmserve serve from its open port to its exit code, with a stand-in for the engine."""

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dllmserve.config import EngineConfig
from dllmserve.errors import ConfigError, EngineError, EngineStartError, ModelNotFoundError
from dllmserve.server.config import ServerConfig
from dllmserve.server.serve import _bind, _Running
from dllmserve.server.settings import Settings, with_port
from tests.server.http.live import Answer, ask, connected, get, post
from tests.server.stand_in import StandIn, run, until


class Running:
    """A server, its port, its stand-in and its end."""

    def __init__(self, directory: Path, **options: Any) -> None:
        options = {"port": 0, "job_store": "memory", "shutdown_timeout": 10.0, **options}
        settings = Settings(ServerConfig(**options), EngineConfig(model=str(directory)))
        self.bound = _bind("127.0.0.1", 0)
        self.port = self.bound.getsockname()[1]
        self.server = _Running(with_port(settings, self.port), self.bound, None)
        self.service, self.jobs = self.server._service, self.server._jobs
        self.engine = StandIn(directory)
        self.service.llm.fleet = self.engine  # type: ignore[assignment]
        self.end = asyncio.create_task(self.server.run())

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.server._signals.put_nowait(number)

    async def get(self, path: str) -> Answer:
        return await ask(self.port, get(path))

    async def post(self, path: str, **body: Any) -> Answer:
        return await ask(self.port, post(json.dumps(body).encode(), path=path))


@asynccontextmanager
async def running(directory: Path, **options: Any) -> AsyncIterator[Running]:
    """A server whose model is loaded; it must have ended by itself at the end."""
    server = Running(directory, **options)
    await until(lambda: server.service.status == "ok")
    try:
        yield server
        async with asyncio.timeout(20):
            await server.end
    finally:
        server.end.cancel()
        await asyncio.wait({server.end})
        server.bound.close()


def test_a_drain_answers_what_is_under_way(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with running(byte_checkpoint) as server:
            server.engine.hold = True
            given = {"prompt": "ab", "max_tokens": 4}
            asked = [
                asyncio.create_task(server.post("/v1/completions", stream=stream, **given))
                for stream in (False, True)
            ]
            accepted = await server.post("/v1/generate", prompt="ab", gen_length=4)
            assert json.loads(accepted.body)["request_ids"] == [0]
            poll = asyncio.create_task(server.get("/v1/result/0?wait=30"))
            await until(lambda: len(server.engine.calls) == 3)
            async with connected(server.port) as kept:
                assert (await kept.ask(get("/ready"))).status == 200
                server.signal()
                await until(lambda: server.service.status == "draining")
                # the port stays open, so that load balancers are told
                assert (await kept.ask(get("/ready"))).status == 503
                refused = await server.post("/v1/completions", **given)
                assert (refused.status, refused.headers["retry-after"]) == (503, "1")
                assert not server.end.done()
                for call in server.engine.calls:
                    server.engine.play(call)
                whole, stream = [await one for one in asked]
                assert json.loads(whole.body)["choices"][0]["text"] == "abab"
                assert stream.body.endswith(b"data: [DONE]\n\n")
                assert json.loads((await poll).body)["text"] == "abab"
                assert await server.end == 0
                await kept.closed()
        with pytest.raises(ConnectionError):
            await server.get("/live")

    run(main())


def test_the_end_of_a_drain_is_answered_too(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with running(byte_checkpoint, shutdown_timeout=0.2) as server:
            server.engine.hold = True
            asked = asyncio.create_task(server.post("/v1/completions", prompt="ab"))
            stream = asyncio.create_task(server.post("/v1/completions", prompt="ab", stream=True))
            await server.post("/v1/generate", prompt="ab", gen_length=4)
            poll = asyncio.create_task(server.get("/v1/result/0?wait=30"))
            await until(lambda: len(server.engine.calls) == 3)
            await asyncio.sleep(0.05)
            server.signal()
            answer = await asked
            assert answer.status == 503 and "shut down" in answer.error["message"]
            assert b'"error"' in (await stream).body
            found = json.loads((await poll).body)
            assert found["status"] == "failed" and "shut down" in found["error"]
            assert await server.end == 0

    run(main())


def test_a_second_signal_does_not_wait(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with running(byte_checkpoint, shutdown_timeout=600) as server:
            server.engine.hold = True
            asked = asyncio.create_task(server.post("/v1/completions", prompt="ab"))
            await until(lambda: len(server.engine.calls) == 1)
            server.signal()
            await until(lambda: server.service.status == "draining")
            await asyncio.sleep(0.05)
            assert not server.end.done()
            server.signal(signal.SIGINT)
            assert (await asked).status == 503
            assert await server.end == 0

    run(main())


def test_an_engine_that_is_gone_ends_the_server(
    byte_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with running(byte_checkpoint) as server:
            server.engine.hold = True
            asked = asyncio.create_task(server.post("/v1/completions", prompt="ab"))
            await until(lambda: len(server.engine.calls) == 1)
            server.engine.fail(EngineStartError("it failed in /some/place"))
            answer = await asked
            assert answer.status == 500 and "place" not in answer.error["message"]
            assert await server.end == 1

    run(main())
    assert "the server ends: it failed in /some/place" in caplog.text


def test_while_the_model_is_loaded(byte_checkpoint: Path) -> None:
    async def main() -> None:
        server = Running(byte_checkpoint)
        server.engine.loaded.clear()
        assert (await server.get("/live")).status == 200
        refused = await server.post("/v1/completions", prompt="ab")
        assert refused.status == 503 and "loaded" in refused.error["message"]
        server.signal()
        assert await server.end == 0
        server.bound.close()

        server = Running(byte_checkpoint)

        async def fails() -> Any:
            raise ModelNotFoundError("there is no such model")

        server.engine.start = fails  # type: ignore[method-assign]
        with pytest.raises(ModelNotFoundError):
            await server.end
        server.bound.close()

    run(main())


def test_two_servers_cannot_share_a_port() -> None:
    """From the first moment on, not only when it is served."""
    bound = _bind("127.0.0.1", 0)
    port = bound.getsockname()[1]
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
        _bind("127.0.0.1", port)
    # clients of the first wait for it
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        bound.close()
    with pytest.raises(ConfigError, match=r"cannot listen on no\.such"):
        _bind("no.such.host.invalid", 0)


def test_a_client_that_leaves_a_real_connection(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with running(byte_checkpoint) as server:
            server.engine.hold = True
            for body in (
                {"prompt": "ab"},
                {"prompt": "ab", "stream": True},
                {"prompt": "a", "n": 3},
            ):
                async with connected(server.port) as client:
                    await client.send(post(json.dumps(body).encode(), path="/v1/completions"))
                    await until(lambda: bool(server.engine.open_calls))
                await until(lambda: not server.engine.open_calls)
                assert not server.service.runs and server.service.admission.requests == 0
            assert len(server.engine.aborted) == 5
            server.signal()

    run(main())


def test_an_error_in_the_engine_of_one_request(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with running(byte_checkpoint) as server:
            server.engine.hold = True
            asked = asyncio.create_task(server.post("/v1/completions", prompt="ab"))
            await until(lambda: len(server.engine.calls) == 1)
            server.engine.calls[0].end(EngineError("NaN"))
            answer = await asked
            assert answer.status == 500 and answer.headers["x-request-id"]
            assert server.service.status == "ok"
            server.signal()

    run(main())
