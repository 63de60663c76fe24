"""Several engine processes: they start together, die apart, and leave nothing behind."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dllmserve.errors import EngineDiedError, EngineError, EngineStartError
from dllmserve.process import supervisor as supervision
from dllmserve.process.calls import Call
from dllmserve.process.fleet import Fleet
from dllmserve.process.messages import Submit
from dllmserve.process.supervisor import State
from dllmserve.sampling_params import SamplingParams
from tests.process.helpers import kill, light, until
from tests.process.left import children, nothing_left
from tests.process.light_child import POISON


@asynccontextmanager
async def fleet_of(size: int, how: str, directory: Path, **given: Any) -> AsyncIterator[Fleet]:
    fleet = Fleet({"device": "cpu"}, light(how, directory, **given), size)
    async with asyncio.timeout(100):
        await fleet.start()
        try:
            yield fleet
        finally:
            await fleet.close()


def ask(fleet: Fleet, *prompt: int) -> Call:
    return fleet.submit(Submit([*prompt], SamplingParams()), work=10)


def index_of(fleet: Fleet, call: Call) -> int:
    return [engine.holds(call) for engine in fleet.supervisors].index(True)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    with nothing_left():
        yield


def restart_after(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "_FIRST_PAUSE_S", seconds)
    monkeypatch.setattr(supervision, "_LAST_PAUSE_S", seconds)


def test_engines_share_the_work(tmp_path: Path) -> None:
    async def main() -> None:
        async with fleet_of(3, "none", tmp_path) as fleet:
            assert len(set(fleet.engine_pids)) == 3 and fleet.state is State.READY
            calls = [ask(fleet, n + 10, n) for n in range(30)]
            assert [engine.requests for engine in fleet.supervisors] == [10, 10, 10]
            # each its own answer, although the ids come from one counter
            for n, call in enumerate(calls):
                assert (await call.output()).token_ids == [n + 10, n]
            await until(lambda: fleet.counters.steps == 30)
            assert all(engine.counters.steps == 10 for engine in fleet.supervisors)
            assert fleet.requests == 0 and fleet.restarts == 0

    asyncio.run(main())


def test_a_killed_engine_hands_over_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restart_after(60, monkeypatch)  # longer than the test: nobody waits for that

    async def main() -> None:
        async with fleet_of(2, "waits", tmp_path) as fleet:
            running = ask(fleet, POISON)
            await until(lambda: running.running)
            assert index_of(fleet, running) == 0
            kill(fleet, 0)
            await until(lambda: index_of(fleet, running) == 1 and running.running)
            assert running.reruns == 1 and fleet.state is State.READY
            assert fleet.serving == 1 and fleet.supervisors[0].state is State.RESTARTING
            for n in (1, 2, 3):
                assert (await ask(fleet, n).output()).token_ids == [n]
            fleet.abort(running)
            assert [engine.work for engine in fleet.supervisors] == [0, 0]

    asyncio.run(main())


def test_both_engines_die_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restart_after(0.01, monkeypatch)

    async def main() -> None:
        async with fleet_of(2, "waits", tmp_path) as fleet:
            calls = [ask(fleet, POISON) for _ in range(4)]
            await until(lambda: all(call.running for call in calls))
            kill(fleet, 0)
            kill(fleet, 1)
            await until(lambda: fleet.restarts == 2 and fleet.serving == 2)
            await until(lambda: all(call.running for call in calls))
            assert sum(engine.work for engine in fleet.supervisors) == 40
            for call in calls:
                fleet.abort(call)
            assert (await ask(fleet, 1).output()).token_ids == [1]

    asyncio.run(main())


def test_a_request_that_crashes_its_engine_disturbs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restart_after(0.01, monkeypatch)

    async def main() -> None:
        async with fleet_of(2, "exit", tmp_path) as fleet:
            # the bad one last: what is written to an engine that has just died can cost its last
            # words, and with them which request it had admitted
            good = [ask(fleet, n) for n in (1, 2, 3)]
            bad = ask(fleet, POISON)
            index = index_of(fleet, bad)
            with pytest.raises(EngineDiedError):
                await bad.output()
            for n, call in enumerate(good):
                assert (await call.output()).token_ids == [n + 1]
            assert (
                fleet.supervisors[index].restarts >= 1
                and fleet.supervisors[1 - index].restarts == 0
            )

    asyncio.run(main())


def test_engines_that_are_given_up_one_after_the_other(tmp_path: Path) -> None:
    async def main() -> None:
        async with fleet_of(2, "waits", tmp_path, restart=False) as fleet:
            giving_up = asyncio.create_task(fleet.failed())
            call = ask(fleet, POISON)
            await until(lambda: call.running)
            kill(fleet, 0)
            await until(lambda: fleet.supervisors[0].state is State.FAILED)
            assert fleet.state is State.READY and not giving_up.done()
            await until(lambda: call.running)
            assert (await ask(fleet, 2).output()).token_ids == [2]
            kill(fleet, 1)
            with pytest.raises(EngineDiedError):
                await call.output()
            error = await giving_up
            assert "restarts are off" in str(error) and fleet.state is State.FAILED
            with pytest.raises(EngineError):
                ask(fleet, 1)

    asyncio.run(main())


def test_one_that_does_not_start_ends_the_others(tmp_path: Path) -> None:
    async def main() -> None:
        fleet = Fleet({"device": "cpu"}, light("dies-at-once", tmp_path), 3)
        with pytest.raises(EngineStartError, match="code 3"):
            await fleet.start()
        assert fleet.engine_pids == [] and fleet.info is None

    asyncio.run(main())


def test_a_start_that_is_called_off(tmp_path: Path) -> None:
    before = children()

    async def main() -> None:
        fleet = Fleet({"device": "cpu"}, light("slow-load", tmp_path), 2)
        starting = asyncio.create_task(fleet.start())
        await until(lambda: len(children() - before) >= 2)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert children() <= before

    asyncio.run(main())


def test_closing_while_one_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restart_after(60, monkeypatch)

    async def main() -> None:
        async with fleet_of(2, "waits", tmp_path) as fleet:
            calls = [ask(fleet, POISON) for _ in range(2)]
            await until(lambda: all(call.running for call in calls))
            kill(fleet, 0)
            await until(lambda: fleet.serving == 1)
            await fleet.close()
            for call in calls:
                with pytest.raises(EngineError, match="closed"):
                    await call.output()
            assert fleet.state is State.CLOSED and fleet.requests == 0
            with pytest.raises(EngineError, match="closed"):
                ask(fleet, 1)
            with pytest.raises(EngineError, match="closed"):
                await fleet.start()
            await fleet.close()  # again

    asyncio.run(main())
