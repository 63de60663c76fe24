"""Where requests of a fleet go, and where they move to, decided without a process."""

import asyncio
import logging
import math

import pytest

from dllmserve.errors import (
    ConfigError,
    EngineDiedError,
    EngineError,
    EngineStartError,
    RequestAbortedError,
)
from dllmserve.process.fleet import Fleet
from dllmserve.process.messages import Counters, Report
from dllmserve.process.supervisor import State, SupervisorOptions
from dllmserve.process.worker import Cause
from tests.process.played import OUTPUT, PlayedFleet


def test_the_least_work_wins_then_the_fewest_requests_then_turns() -> None:
    bench = PlayedFleet(3)
    places = [bench.index_of(bench.ask(work)) for work in (50, 20, 20)]
    assert places == [0, 1, 2] and bench.works == [50, 20, 20]
    assert bench.index_of(bench.ask(5)) == 1  # equal: whose turn it is
    assert bench.index_of(bench.ask(4)) == 2
    assert bench.index_of(bench.ask(30)) == 2
    bench = PlayedFleet(2)
    assert [bench.index_of(bench.ask(w)) for w in (4, 2, 2)] == [0, 1, 1]
    assert bench.index_of(bench.ask(1)) == 0  # as much work, fewer requests


def test_a_quiet_fleet_takes_turns() -> None:
    bench = PlayedFleet(3)
    seen = []
    for _ in range(6):
        call = bench.ask(7)
        seen.append(bench.index_of(call))
        bench.finish(call)
    assert seen == [0, 1, 2, 0, 1, 2] and bench.works == [0, 0, 0]


def test_the_books_are_exact_however_a_request_ends() -> None:
    async def main() -> None:
        bench = PlayedFleet(2)
        finished, failed, aborted, queued = (bench.ask(w) for w in (1, 2, 4, 8))
        assert sum(bench.works) == 15 and bench.fleet.requests == 4
        bench.finish(finished)
        assert sum(bench.works) == 14
        bench.fail(failed)
        assert sum(bench.works) == 12
        index = bench.index_of(aborted)
        bench.fleet.abort(aborted, EngineError("its client left"))
        bench.fleet.abort(aborted)  # again
        bench.fleet.abort(finished)
        assert bench.played[index].aborted == [aborted.id] and sum(bench.works) == 8
        await bench.fleet.close()
        assert bench.works == [0, 0] and bench.fleet.requests == 0
        assert bench.fleet.state is State.CLOSED
        with pytest.raises(EngineError, match="closed"):
            await queued.output()
        with pytest.raises(EngineError, match="client"):
            await aborted.output()
        with pytest.raises(EngineError, match="closed"):
            bench.ask()

    asyncio.run(main())


def test_after_a_kill_requests_go_on_elsewhere_at_once() -> None:
    async def main() -> None:
        bench = PlayedFleet(3)
        calls = [bench.ask(10) for _ in range(3)]
        queued = bench.ask(10, admit=False)
        assert [bench.index_of(c) for c in (*calls, queued)] == [0, 1, 2, 0]
        bench.die(0, Cause.KILLED)
        # the least loaded first, and in the order of their arrival
        assert bench.works == [0, 20, 20] and calls[0].in_engine and queued.in_engine
        assert bench.fleet.state is State.READY and bench.fleet.serving == 2
        assert calls[0].id < queued.id
        bench.admit(calls[0], queued)
        for call in (*calls, queued):
            bench.finish(call)
            assert await call.output() == OUTPUT
        # the new engine has nothing to do with them
        assert bench.up(0).submitted == [] and bench.works == [0, 0, 0]

    asyncio.run(main())


def test_suspects_stay_and_others_keep_away_until_they_are_through() -> None:
    async def main() -> None:
        bench = PlayedFleet(2)
        bad, other, good = bench.ask(10), bench.ask(10), bench.ask(10)
        assert [bench.index_of(c) for c in (bad, other, good)] == [0, 1, 0]
        bench.die(0, Cause.CRASHED)
        assert bench.index_of(bad) == bench.index_of(good) == 0
        engine = bench.up(0)
        assert engine.submitted == [bad.id]
        for _ in range(5):  # although there is more work at the other one
            assert bench.index_of(bench.ask(100)) == 1
        bench.admit(bad)
        bench.die(0, Cause.CRASHED)
        with pytest.raises(EngineDiedError):
            await bad.output()
        engine = bench.up(0)
        assert engine.submitted == [good.id]
        bench.admit(good)
        bench.finish(good)
        assert bench.index_of(bench.ask(1)) == 0
        assert bench.works == [1, 510] and bench[1].restarts == 0

    asyncio.run(main())


def test_an_abort_of_the_last_suspect_opens_its_engine() -> None:
    async def main() -> None:
        bench = PlayedFleet(2)
        suspect = bench.ask(1)
        bench.die(0, Cause.CRASHED)
        bench.up(0)
        bench.admit(suspect)
        bench.die(1, Cause.KILLED)
        held = [bench.ask(1) for _ in range(2)]  # nobody runs it at once
        assert not any(call.in_engine for call in held)
        bench.fleet.abort(suspect)
        assert all(call.in_engine and bench.index_of(call) == 0 for call in held)
        with pytest.raises(RequestAbortedError):
            await suspect.output()

    asyncio.run(main())


def test_what_waits_goes_to_whichever_engine_is_back_first() -> None:
    bench = PlayedFleet(2)
    first, second = bench.ask(1), bench.ask(1)
    bench.die(0, Cause.KILLED)
    assert bench.index_of(first) == 1
    bench.die(1, Cause.KILLED)
    assert bench.fleet.state is State.RESTARTING and not first.in_engine
    late = bench.ask(1)
    assert bench.fleet.counters.waiting == 3
    engine = bench.up(0)
    # the late one waited there; the others come over, in the order in which they were held
    assert engine.submitted == [late.id, second.id, first.id]
    assert bench.works == [3, 0] and bench.fleet.requests == 3


def test_one_that_is_moved_may_be_dropped() -> None:
    async def main() -> None:
        bench = PlayedFleet(2)
        call = bench.ask(3)
        bench.die(0, Cause.KILLED)
        bench.fleet.abort(call)
        assert bench.played[1].aborted == [call.id] and bench.works == [0, 0]
        with pytest.raises(RequestAbortedError):
            await call.output()

    asyncio.run(main())


def test_an_engine_that_is_given_up_leaves_its_requests() -> None:
    async def main() -> None:
        bench = PlayedFleet(3)
        calls = [bench.ask(10) for _ in range(6)]
        suspects = [call for call in calls if bench.index_of(call) == 0]
        bench.die(0, Cause.CRASHED)
        assert [bench.index_of(call) for call in suspects] == [0, 0]
        bench.give_up(0)
        # both to the same one, which ends what it has and then runs them, one by one
        (refuge,) = {bench.index_of(call) for call in suspects}
        (other,) = {1, 2} - {refuge}
        assert bench.fleet.state is State.READY and bench.works[0] == 0
        assert bench.index_of(bench.ask(100)) == other
        assert not any(call.in_engine for call in suspects)
        bench.finish(*[call for call in calls if call.running and bench.index_of(call) == refuge])
        first, second = suspects
        assert first.in_engine and not second.in_engine
        bench.admit(first)
        bench.finish(first)
        assert second.in_engine and bench.works[refuge] == 10

        bench.die(refuge, Cause.KILLED)
        bench.give_up(refuge)
        bench.die(other, Cause.KILLED)
        waiting = bench.ask(1)
        assert bench.index_of(waiting) == other
        bench.give_up(other, EngineStartError("the last one"))
        assert bench.fleet.state is State.FAILED and bench.works == [0, 0, 0]
        with pytest.raises(EngineStartError, match="the last one"):
            await waiting.output()
        with pytest.raises(EngineStartError):
            bench.ask()

    asyncio.run(main())


def test_without_restarts_suspects_do_not_end_the_next_engine() -> None:
    async def main() -> None:
        bench = PlayedFleet(2, restart=False)
        suspect, other, queued = bench.ask(1), bench.ask(1), bench.ask(1, admit=False)
        assert bench.index_of(queued) == 0
        bench.die(0, Cause.CRASHED)
        bench.give_up(0, EngineDiedError("restarts are off"))
        with pytest.raises(EngineDiedError, match="off"):
            await suspect.output()
        assert bench.index_of(queued) == bench.index_of(other) == 1

    asyncio.run(main())


def test_silent_engines_are_avoided() -> None:
    bench = PlayedFleet(2)
    bench.silent(0, 60)
    assert [bench.index_of(bench.ask(5)) for _ in range(3)] == [1, 1, 1]
    assert bench.fleet.silence == -math.inf  # one of them speaks
    bench.silent(1, 60)
    assert bench.index_of(bench.ask(5)) == 0  # no one is better than another
    assert bench.fleet.silence == math.inf and bench.fleet.state is State.READY
    # what is held does not go where it may not run, and goes as soon as it would
    bench.die(0, Cause.KILLED)
    held = bench.ask(1, admit=False)
    assert bench.index_of(held) == 1
    (moving,) = bench[0]._held
    assert bench.works[0] == 5
    bench.silent(1, 0)
    bench[1]._handle(Report(Counters()))
    assert bench.index_of(moving) == 1


def test_numbers_are_of_all_engines() -> None:
    bench = PlayedFleet(2)
    counted = {"steps": 1, "spans": 2, "positions": 3, "committed": 4, "busy": 0.5}
    for index, used in enumerate((0.2, 0.6)):
        bench[index]._handle(Report(Counters(running=1, waiting=2, pages_used=used, **counted)))
    now = bench.fleet.counters
    assert (now.running, now.waiting, now.steps, now.spans) == (2, 4, 2, 4)
    assert (now.positions, now.committed, now.busy) == (6, 8, 1.0)
    assert now.pages_used == pytest.approx(0.4)
    bench.die(0, Cause.KILLED)
    bench[0].restarts += 1
    assert bench.fleet.counters.steps == 2 and bench.fleet.restarts == 1
    assert bench.fleet.counters.pages_used == pytest.approx(0.6)
    assert bench.fleet.engine_pids == [1]
    bench.die(1, Cause.KILLED)
    assert bench.fleet.counters.pages_used == 0 and bench.fleet.silence == 0


def test_the_log_says_how_many_serve(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dllmserve.engine")
    bench = PlayedFleet(2)
    bench.fleet._started = True
    bench.die(1, Cause.KILLED)
    assert "1 of 2 engines serve" in caplog.text
    assert "dllmserve.engine.1" in {record.name for record in caplog.records}
    bench.up(1)
    assert "2 of 2 engines serve" in caplog.text


@pytest.mark.parametrize("size", [0, -1, True, 2.0, "2"])
def test_wrong_sizes(size: int) -> None:
    with pytest.raises(ConfigError, match="data_parallel_size must be an integer >= 1"):
        Fleet({}, SupervisorOptions(), size)
