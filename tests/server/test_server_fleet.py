"""A server with several engines: what it says of them while one is missing."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dllmserve.config import EngineConfig
from dllmserve.errors import ConfigError
from dllmserve.process import supervisor as supervision
from dllmserve.process.fleet import Fleet
from dllmserve.process.messages import Counters, Submit
from dllmserve.process.supervisor import State
from dllmserve.sampling_params import SamplingParams
from dllmserve.server.app import create_app
from dllmserve.server.config import ServerConfig
from dllmserve.server.service import Service
from dllmserve.server.settings import Settings, load_settings
from tests.process.helpers import kill, light
from tests.process.left import nothing_left
from tests.server.stand_in import Server, run, until


def made(directory: Path, size: int) -> tuple[Any, Server, Fleet]:
    """A server whose engines, which have no model, say the prompt's first ids."""
    config = ServerConfig(job_store="memory", shutdown_timeout=0.0, data_parallel_size=size)
    app = create_app(Settings(config, EngineConfig(model=str(directory), device="cpu")))
    service: Service = app.state.service
    fleet = Fleet({"device": "cpu"}, light("none", directory), size)
    assert len(service.llm.fleet.supervisors) == size
    service.llm.fleet = fleet
    return app, Server(app, service, app.state.jobs, fleet), fleet  # type: ignore[arg-type]


@asynccontextmanager
async def serving(directory: Path, size: int) -> AsyncIterator[tuple[Server, Fleet]]:
    app, server, fleet = made(directory, size)
    with nothing_left():
        async with app.router.lifespan_context(app):
            yield server, fleet
    await until(server.idle)


async def statuses(server: Server) -> dict[str, tuple[int, str]]:
    paths = ("/health", "/ready", "/live")
    replies = {path: await server.get(path) for path in paths}
    return {path: (reply.status, reply.json()["status"]) for path, reply in replies.items()}


def test_one_engine_of_two_is_enough(
    byte_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervision, "_FIRST_PAUSE_S", 60)  # longer than the test
    monkeypatch.setattr(supervision, "_LAST_PAUSE_S", 60)
    # configured logging does not propagate to where caplog listens
    monkeypatch.setattr(logging.getLogger("dllmserve"), "propagate", True)
    caplog.set_level(logging.INFO, "dllmserve")
    well = {"/health": (200, "ok"), "/ready": (200, "ok"), "/live": (200, "ok")}
    ask = {"prompt": [65, 66], "max_tokens": 2}

    async def main() -> None:
        async with serving(byte_checkpoint, 2) as (server, fleet):
            for line in ("2 engines, float32", "engine 0: cpu; none", "engine 1: cpu; none"):
                assert line in caplog.text
            assert server.service.admission.at_once == 16
            assert await statuses(server) == well
            assert [server.metric("engine_up", engine=e) for e in "01"] == [1, 1]

            kill(fleet, 0)
            await until(lambda: fleet.serving == 1)
            assert await statuses(server) == well
            assert server.metric("ready") == 1 and "1 of 2 engines serve" in caplog.text
            assert [server.metric("engine_up", engine=e) for e in "01"] == [0, 1]
            for _ in range(3):
                assert (await server.post("/v1/completions", ask)).status == 200

            kill(fleet, 1)
            await until(lambda: fleet.serving == 0)
            found = await statuses(server)
            assert found["/health"] == (503, "restarting") and found["/live"][0] == 200

    run(main())


def test_gauges_of_each_engine(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, 2) as (server, fleet):
            page = (await server.get("/metrics")).body.decode().splitlines()
            labels = 'engine="1",model_name="byte-llada"'
            for line in (
                f"dllmserve:engine_up{{{labels}}} 1.0",
                f"dllmserve:engine_requests_running{{{labels}}} 0.0",
                f"dllmserve:engine_outstanding_work{{{labels}}} 0.0",
                f"dllmserve:engine_replaced_total{{{labels}}} 0.0",
                'dllmserve:engine_restarts_total{model_name="byte-llada"} 0.0',
            ):
                assert line in page, line
            call = fleet.submit(Submit([1], SamplingParams()), work=70)
            assert server.metric("engine_outstanding_work", engine="0") == 70
            await call.output()
            assert server.metric("engine_outstanding_work", engine="0") == 0

    run(main())


def test_only_a_restart_of_the_server_helps_when_no_engine_comes_back(
    byte_checkpoint: Path,
) -> None:
    """/live fails if all are gone or silent for good, and for no less."""

    async def main() -> None:
        _, server, fleet = made(byte_checkpoint, 2)
        service = server.service
        service._started = True
        states = (State.READY, State.RESTARTING, State.FAILED)
        for first in states:
            for second in states:
                fleet.supervisors[0].state, fleet.supervisors[1].state = first, second
                both = {first, second}
                assert service.lost == (both == {State.FAILED})
                expected = "ok" if State.READY in both else "restarting"
                assert service.status == ("failed" if both == {State.FAILED} else expected)

        quiet = [_Quiet(State.READY, 31.0), _Quiet(State.READY, 0.0)]
        fleet.supervisors[:] = quiet  # type: ignore[assignment]
        assert service.status == "ok" and not service.lost
        quiet[1].silence = 31.0
        assert service.status == "stalled" and not service.lost
        quiet[0].silence = quiet[1].silence = 400.0
        assert service.status == "stalled" and service.lost
        quiet[1].state, quiet[1].silence = State.RESTARTING, 0.0  # it may come back
        assert service.status == "stalled" and not service.lost
        quiet[1].state = State.FAILED
        assert service.lost

    run(main())


class _Quiet:
    """What health reads of a supervisor."""

    def __init__(self, state: State, silence: float) -> None:
        self.state, self.silence = state, silence


def test_the_speed_is_that_of_all_engines(byte_checkpoint: Path) -> None:
    """Two engines count two busy seconds in one second."""

    async def main() -> None:
        _, server, fleet = made(byte_checkpoint, 2)
        heard: list[tuple[float, int]] = []
        server.service.admission.measure = lambda *given: heard.append(given)  # type: ignore[method-assign]
        for engine in fleet.supervisors:
            engine.state, engine._now = State.READY, Counters(busy=30.0, spans=100)
        server.service.admission.closed_because = None
        server.service.take_slots([])
        fleet.supervisors[0].state = State.FAILED
        server.service.take_slots([])
        assert heard == [(30.0, 200), (60.0, 200)]

    run(main())


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings({}, {}).server.data_parallel_size == 1
    given = {"DLLMSERVE_DATA_PARALLEL_SIZE": "3", "DLLMSERVE_JOB_STORE": "memory"}
    settings = load_settings({}, given)
    assert len(create_app(settings).state.service.llm.fleet.supervisors) == 3
    for value in ("0", "-1"):
        with pytest.raises(ConfigError, match="data_parallel_size must be an integer >= 1"):
            load_settings({}, {"DLLMSERVE_DATA_PARALLEL_SIZE": value})
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        create_app(settings)
