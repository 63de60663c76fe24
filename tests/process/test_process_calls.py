"""What becomes of requests whose engine died, decided without a process."""

import asyncio
from typing import Any

import pytest

from dllmserve.errors import EngineDiedError, EngineError, RequestAbortedError
from dllmserve.outputs import RequestOutput
from dllmserve.process.calls import MAX_KILLS_ALONE, Call, Delta, Fate, Started
from dllmserve.process.messages import (
    Abort,
    Admitted,
    Committed,
    Counters,
    Failed,
    Finished,
    Report,
    Submit,
    ToWorker,
)
from dllmserve.process.supervisor import State, Supervisor, SupervisorOptions
from dllmserve.process.worker import Cause, Death
from dllmserve.sampling_params import SamplingParams

OUTPUT = RequestOutput("", [1], "length", 1, 1, 1)
CRASH = Death(Cause.CRASHED, "it crashed")
KILL = Death(Cause.KILLED, "it was killed")


class FakeEngine:
    """The part of EngineProcess that a supervisor talks to."""

    pid = 1
    last_message = 0.0

    def __init__(self) -> None:
        self.sent: list[ToWorker] = []

    def send(self, message: ToWorker) -> None:
        self.sent.append(message)

    @property
    def submitted(self) -> list[int]:
        return [message.id for message in self.sent if isinstance(message, Submit)]


class Bench:
    """A supervisor whose engines are played by the test."""

    def __init__(self) -> None:
        self.supervisor = Supervisor({}, SupervisorOptions())
        self.start()

    def start(self) -> FakeEngine:
        engine = FakeEngine()
        self.supervisor._engine = self.engine = engine  # type: ignore[assignment]
        self.supervisor.state = State.READY
        self.supervisor._send_held()
        return engine

    def ask(self, *, stream: bool = False, running: bool = True) -> Call:
        call = self.supervisor.submit(Submit([1], SamplingParams(), stream=stream))
        if running and call.in_engine:
            self.admit(call)
        return call

    def admit(self, *calls: Call) -> None:
        self.supervisor._handle(Admitted([call.id for call in calls]))

    def finish(self, *calls: Call) -> None:
        finished = [Finished(call.id, OUTPUT) for call in calls]
        self.supervisor._handle(Report(Counters(), finished=finished))

    def die(self, death: Death) -> None:
        self.supervisor._judge(death)


def judged(*deaths: tuple[Cause, bool]) -> list[Fate]:
    """Fates of a call that was running whenever its engine died."""
    call = Call(Submit([1], SamplingParams()))
    fates = []
    for cause, alone in deaths:
        call.in_engine = True
        call.start()
        fates.append(call.judge(cause, alone))
    return fates


def test_who_is_run_again() -> None:
    crash, kill = Cause.CRASHED, Cause.KILLED

    async def main() -> None:
        # a crash makes everybody a suspect; the guilty one crashes alone once more
        assert judged((crash, False), (crash, True)) == [Fate.ALONE, Fate.FAIL]
        assert judged((Cause.HUNG, True), (Cause.HUNG, True)) == [Fate.ALONE, Fate.FAIL]
        assert judged((crash, False), (crash, False), (crash, True))[-1] is Fate.FAIL
        # a kill from outside has no reason among them, unless it comes again and again
        assert judged((kill, False), (kill, False)) == [Fate.RERUN, Fate.ALONE]
        assert judged((kill, True), (kill, True)) == [Fate.RERUN, Fate.FAIL]
        assert judged(*[(kill, False)] * 20)[-1] is Fate.ALONE
        with_others = [(kill, False)] * 2
        assert judged(*with_others, *[(kill, True)] * 2)[-1] is Fate.ALONE
        assert judged(*with_others, *[(kill, True)] * MAX_KILLS_ALONE)[-1] is Fate.FAIL
        assert judged((kill, True), (crash, True)) == [Fate.RERUN, Fate.FAIL]

    asyncio.run(main())


def test_one_that_never_ran_keeps_its_suspicion() -> None:
    async def main() -> None:
        call = Call(Submit([1], SamplingParams()))
        call.in_engine = True
        assert call.judge(Cause.CRASHED, alone=False) is Fate.RERUN  # it was in the queue
        call.in_engine = True
        call.start()
        assert call.judge(Cause.CRASHED, alone=False) is Fate.ALONE
        call.in_engine = True  # sent alone, and the engine is killed before it begins
        assert call.judge(Cause.KILLED, alone=False) is Fate.ALONE
        call.in_engine = True
        call.start()
        assert call.judge(Cause.CRASHED, alone=True) is Fate.FAIL

    asyncio.run(main())


def test_what_nobody_has_taken_is_given_again() -> None:
    async def main() -> None:
        call = Call(Submit([1], SamplingParams(), stream=True))
        call.in_engine = True
        call.start()
        first = call.started
        call.put(Delta([5]))
        assert call.judge(Cause.KILLED, alone=False) is Fate.RERUN
        call.in_engine = True
        call.start()
        for event in (Delta([5]), Delta([6])):
            call.put(event)
        call.end(OUTPUT)
        found = [await call.next() for _ in range(4)]
        # started once, at its first time
        assert found == [Started(first or 0.0), Delta([5]), Delta([6]), OUTPUT]

        taken = Call(Submit([1], SamplingParams(), stream=True))
        taken.in_engine = True
        taken.start()
        taken.put(Delta([5]))
        await taken.next()
        await taken.next()
        assert taken.judge(Cause.KILLED, alone=False) is Fate.FAIL

    asyncio.run(main())


def test_a_waiting_reader_gets_what_the_second_run_brings() -> None:
    async def main() -> None:
        call = Call(Submit([1], SamplingParams()))
        reading = asyncio.create_task(call.output())
        await asyncio.sleep(0)
        call.in_engine = True
        call.start()
        call.judge(Cause.KILLED, alone=False)  # before the reader has had its turn
        call.start()
        call.end(OUTPUT)
        assert await reading == OUTPUT

        late = Call(Submit([1], SamplingParams()))
        reading = asyncio.create_task(late.output())
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        late.end(EngineError("no"))
        with pytest.raises(EngineError, match="no"):
            await late.output()

    asyncio.run(main())


def test_suspects_run_one_by_one_and_then_everybody() -> None:
    async def main() -> None:
        bench = Bench()
        calls = [bench.ask() for _ in range(3)]
        queued = bench.ask(running=False)
        bench.die(CRASH)
        late = bench.ask()
        assert not late.in_engine and bench.supervisor.counters.waiting == 5
        engine = bench.start()
        for call in calls:
            assert engine.submitted == [c.id for c in calls[: calls.index(call) + 1]]
            bench.admit(call)
            bench.finish(call)
        # in the order of their arrival
        assert engine.submitted[3:] == [queued.id, late.id]
        assert [(await call.output()) for call in calls] == [OUTPUT] * 3

    asyncio.run(main())


def test_the_guilty_one_is_found_and_fails() -> None:
    async def main() -> None:
        bench = Bench()
        good, bad, other = (bench.ask() for _ in range(3))
        bench.die(CRASH)
        bench.start()
        bench.admit(good)
        bench.finish(good)
        bench.admit(bad)
        bench.die(CRASH)
        with pytest.raises(EngineDiedError, match="it crashed"):
            await bad.output()
        engine = bench.start()
        assert engine.submitted == [other.id]
        assert not good.in_engine and await good.output() == OUTPUT

    asyncio.run(main())


def test_aborting_whoever_waits_lets_others_go_on() -> None:
    async def main() -> None:
        bench = Bench()
        first, second, third = (bench.ask() for _ in range(3))
        bench.die(CRASH)
        held = bench.ask()
        supervisor = bench.supervisor
        supervisor.abort(second)  # a suspect
        engine = bench.start()
        assert engine.submitted == [first.id]
        supervisor.abort(first)  # the one that runs alone
        assert engine.sent[-2:] == [Abort([first.id]), third.submit]
        supervisor.abort(held)  # one that waits for the suspects
        bench.admit(third)
        bench.finish(third)
        assert supervisor._calls == {} and engine.submitted == [first.id, third.id]
        for call in (first, second, held):
            with pytest.raises(RequestAbortedError):
                await call.output()
        before = list(engine.sent)
        supervisor.abort(first)  # again, and one that is through
        supervisor.abort(third)
        assert engine.sent == before
        # what the engine still says of it is not heard
        bench.admit(first)
        bench.finish(first)
        assert supervisor.counters.waiting == 0

    asyncio.run(main())


def test_calls_that_end_while_their_engine_dies_are_not_judged() -> None:
    async def main() -> None:
        bench = Bench()
        ended, dropped, going = (bench.ask() for _ in range(3))
        bench.finish(ended)
        bench.supervisor.abort(dropped, EngineError("its client left"))
        # sent to an engine that is dead already
        late = bench.ask(running=False)
        assert late.in_engine
        bench.die(KILL)
        assert await ended.output() == OUTPUT
        with pytest.raises(EngineError, match="left"):
            await dropped.output()
        engine = bench.start()
        assert engine.submitted == [going.id, late.id]

    asyncio.run(main())


def test_reports_reach_their_calls() -> None:
    async def main() -> None:
        bench = Bench()
        good, bad = bench.ask(stream=True), bench.ask()
        report = Report(
            Counters(running=2, steps=3),
            committed=[Committed(good.id, [4, 5]), Committed(77, [1])],
            failed=[Failed(bad.id, "OutOfMemoryError", "too much"), Failed(78, "X", "y")],
        )
        bench.supervisor._handle(report)
        assert isinstance(await good.next(), Started)
        assert await good.next() == Delta([4, 5])
        with pytest.raises(MemoryError, match="too much"):
            await bad.output()

    asyncio.run(main())


def test_counters_go_on_from_engine_to_engine() -> None:
    def counted(**values: Any) -> None:
        bench.supervisor._handle(Report(Counters(**values)))

    bench = Bench()
    counted(running=3, pages_used=0.5, steps=10, spans=20, positions=30, committed=40, busy=1.5)
    bench.die(KILL)
    now = bench.supervisor.counters
    assert (now.running, now.pages_used) == (0, 0.0)
    bench.start()
    counted(running=1, pages_used=0.25, steps=1, spans=2, positions=3, committed=4, busy=0.5)
    now = bench.supervisor.counters
    assert (now.running, now.pages_used) == (1, 0.25)
    assert (now.steps, now.spans, now.positions, now.committed) == (11, 22, 33, 44)
    assert now.busy == 2.0
    bench.die(KILL)
    assert bench.supervisor.counters.steps == 11
