"""A fleet under any order of events: every request is in one engine, and the books are right."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dllmserve.errors import EngineError
from dllmserve.process.calls import Call
from dllmserve.process.fleet import _Standing, _standing
from dllmserve.process.supervisor import State
from dllmserve.process.worker import Cause
from tests.process.played import PlayedFleet

SIZE = 3
PLACES = st.integers(0, SIZE - 1)


class Fleets(RuleBasedStateMachine):
    """Engines answer, die, come back and are given up while requests come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = PlayedFleet(SIZE)
        self.calls: list[Call] = []

    @property
    def open(self) -> list[Call]:
        return [call for call in self.calls if not call.ended]

    def some(self, data: Any, calls: list[Call]) -> Call | None:
        return data.draw(st.sampled_from(calls)) if calls else None

    @rule(work=st.integers(0, 3))
    def ask(self, work: int) -> None:
        engines = self.bench.fleet.supervisors
        before = {i: (_standing(e), e.work, e.requests) for i, e in enumerate(engines)}
        if self.bench.fleet.state is State.FAILED:
            with pytest.raises(EngineError):
                self.bench.ask(work)
            return
        call = self.bench.ask(work, admit=False)
        self.calls.append(call)
        assert before[self.bench.index_of(call)] == min(before.values())

    @rule(data=st.data())
    def admit(self, data: Any) -> None:
        call = self.some(data, [c for c in self.open if c.in_engine and not c.running])
        if call:
            self.bench.admit(call)

    @rule(data=st.data(), well=st.booleans())
    def answer(self, data: Any, well: bool) -> None:
        call = self.some(data, [c for c in self.open if c.running])
        if call:
            (self.bench.finish if well else self.bench.fail)(call)

    @rule(data=st.data())
    def abort(self, data: Any) -> None:
        call = self.some(data, self.calls)
        if call:
            self.bench.fleet.abort(call)

    @rule(index=PLACES, cause=st.sampled_from([Cause.KILLED, Cause.CRASHED, Cause.HUNG]))
    def die(self, index: int, cause: Cause) -> None:
        if self.bench[index].state is State.READY:
            self.bench.die(index, cause)

    @rule(index=PLACES)
    def up(self, index: int) -> None:
        if self.bench[index].state is State.RESTARTING:
            self.bench.up(index)

    @precondition(lambda self: len(self.calls) > 12)
    @rule(index=PLACES)
    def give_up(self, index: int) -> None:
        if self.bench[index].state is State.RESTARTING:
            self.bench.give_up(index)

    @invariant()
    def the_books_are_right(self) -> None:
        engines = self.bench.fleet.supervisors
        held = [[c for c in self.calls if engine.holds(c)] for engine in engines]
        assert sorted(c.id for calls in held for c in calls) == [c.id for c in self.open]
        for engine, calls in zip(engines, held, strict=True):
            assert engine.work == sum(c.work for c in calls)
            assert engine.requests == len(calls)
            if engine.state is not State.READY:
                assert not any(c.in_engine for c in calls)

    @invariant()
    def suspects_run_alone(self) -> None:
        for engine in self.bench.fleet.supervisors:
            inside = [c for c in self.open if c.in_engine and engine.holds(c)]
            assert len(inside) < 2 or not any(c._suspected for c in inside)

    @invariant()
    def nothing_waits_where_others_would_run_it(self) -> None:
        engines = self.bench.fleet.supervisors
        if any(_standing(engine) is _Standing.OPEN for engine in engines):
            assert not any(engine.stuck() for engine in engines)

    def teardown(self) -> None:
        """Whatever was, every request ends if one engine is left."""
        for index in range(SIZE):
            self.up(index)
        while calls := [c for c in self.open if c.in_engine]:
            self.bench.admit(calls[0])
            self.bench.finish(calls[0])
        assert not self.open and self.bench.works == [0] * SIZE


TestFleets = Fleets.TestCase
TestFleets.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
