"""Random sequences of operations by three owners, against a model of a few lines."""

import asyncio
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dllmserve.server.store import (
    Gone,
    JobIdTaken,
    JobRecord,
    JobResult,
    JobStore,
    Stored,
    StoreLimits,
)
from tests.server.store.jobs import done, make_store

OWNERS = st.sampled_from(["ann", "bob", "eve"])
LIMITS = StoreLimits(ttl_s=10, max_results=3, max_bytes=60, max_tombstones=4)
#: a few ids far above the sequential ones, so that they meet again
RANDOM_IDS = st.integers(2**53 - 6, 2**53 - 1)
ANY_ID = st.integers(0, 12) | RANDOM_IDS


def size_of(stored: Stored) -> int:
    result = stored.result
    assert result is not None
    return len((result.text or "").encode()) + len(result.error or "") + len(result.details)


@dataclass
class Model:
    """The rules, written for reading: every operation looks at everything."""

    waiting: dict[int, JobRecord] = field(default_factory=dict)
    #: in the order in which they finished
    results: dict[int, Stored] = field(default_factory=dict)
    #: in the order in which they were read
    read: list[int] = field(default_factory=list)
    tombstones: dict[int, Gone] = field(default_factory=dict)
    evicted: int = 0

    def has(self, id: int) -> bool:
        return id in self.waiting or id in self.results or id in self.tombstones

    def size(self) -> int:
        return sum(map(size_of, self.results.values()))

    def finish(self, id: int, result: JobResult) -> bool:
        if id not in self.waiting:
            return False
        self.results[id] = done(self.waiting.pop(id), result)
        while len(self.results) > LIMITS.max_results or self.size() > LIMITS.max_bytes:
            sizes = Counter[str]()
            for stored in self.results.values():
                too_many = len(self.results) > LIMITS.max_results
                sizes[stored.record.owner] += 1 if too_many else size_of(stored)
            holds_most = [o for o in sizes if sizes[o] == max(sizes.values())]
            order = [*self.read, *self.results]
            self.drop(
                next(i for i in order if self.results[i].record.owner in holds_most), "evicted"
            )
        return True

    def drop(self, id: int, reason: Any) -> None:
        record = self.waiting.pop(id, None) or self.results.pop(id).record
        self.read = [other for other in self.read if other != id]
        self.tombstones[id] = Gone(reason, record.owner)
        while len(self.tombstones) > LIMITS.max_tombstones:
            counts = Counter(gone.owner for gone in self.tombstones.values())
            del self.tombstones[
                next(
                    i for i, g in self.tombstones.items() if counts[g.owner] == max(counts.values())
                )
            ]
        self.evicted += 1

    def expire(self, now: float) -> None:
        ends = [(s.result.finished, id) for id, s in self.results.items() if s.result]
        for finished, id in sorted(ends):
            if finished + LIMITS.ttl_s <= now:
                self.drop(id, "expired")

    def find(self, id: int) -> Stored | Gone | None:
        if id in self.waiting:
            return Stored(self.waiting[id], None)
        return self.results.get(id) or self.tombstones.get(id)


class StoreMachine(RuleBasedStateMachine):
    """A store does what the model does, and keeps its bounds after every operation."""

    kind = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.model = Model()
        self.clock = 1000.0
        self.reserved: list[int] = []
        self.owners: dict[int, str] = {}
        self.store = self.opened()

    def opened(self) -> JobStore:
        store = make_store(self.kind, Path(self.folder.name) / "jobs.db", LIMITS)
        self.runner.run(store.open())
        self.dropped_before = self.model.evicted
        return store

    def insert(self, ids: list[int], owner: str) -> None:
        prompt = b"prompt of " + owner.encode()
        records = [JobRecord(id, owner, "tiny", self.clock, self.clock + 60, prompt) for id in ids]
        if len(set(ids)) < len(ids) or any(self.model.has(id) for id in ids):
            try:
                self.runner.run(self.store.insert(records))
            except JobIdTaken:
                return
            raise AssertionError(f"{ids} were taken")
        self.runner.run(self.store.insert(records))
        self.model.waiting |= {record.id: record for record in records}
        self.owners |= dict.fromkeys(ids, owner)

    @rule(count=st.integers(1, 3), owner=OWNERS)
    def submit_sequential(self, count: int, owner: str) -> None:
        ids = self.runner.run(self.store.reserve_ids(count))
        first = len(self.reserved)
        assert ids == list(range(first, first + count))  # none twice, also after a restart
        self.reserved += ids
        self.insert(ids, owner)

    @rule(ids=st.lists(RANDOM_IDS, min_size=1, max_size=3), owner=OWNERS)
    def submit_random(self, ids: list[int], owner: str) -> None:
        self.insert(ids, owner)

    @rule(id=ANY_ID, length=st.integers(0, 70), details=st.binary(max_size=3))
    def finish(self, id: int, length: int, details: bytes) -> None:
        text = f"answer to {self.owners.get(id)} {id}" + "ä" * (length // 2)
        result = JobResult("finished", text, None, details, self.clock)
        assert self.runner.run(self.store.finish(id, result)) == self.model.finish(id, result)

    @precondition(lambda self: self.model.waiting)
    @rule(data=st.data(), failed=st.booleans())
    def finish_one_that_waits(self, data: st.DataObject, failed: bool) -> None:
        id = data.draw(st.sampled_from(sorted(self.model.waiting)))
        text = None if failed else f"answer to {self.owners[id]} {id}"
        status, error = ("failed", "broken") if failed else ("finished", None)
        result = JobResult(status, text, error, b"", self.clock)  # type: ignore[arg-type]
        assert self.runner.run(self.store.finish(id, result)) == self.model.finish(id, result)

    @rule(id=ANY_ID)
    def mark_read(self, id: int) -> None:
        self.runner.run(self.store.mark_read(id))
        if id in self.model.results and id not in self.model.read:
            self.model.read.append(id)

    @rule(id=ANY_ID)
    def delete(self, id: int) -> None:
        there = id in self.model.waiting or id in self.model.results
        assert self.runner.run(self.store.delete(id)) == there
        if there:
            self.model.drop(id, "deleted")

    @rule(step=st.integers(-3, 8))
    def time_passes(self, step: int) -> None:
        self.clock += step
        self.runner.run(self.store.expire(self.clock))
        self.model.expire(self.clock)

    @precondition(lambda self: self.kind == "sqlite")
    @rule()
    def restart(self) -> None:
        self.runner.run(self.store.close())
        self.store = self.opened()

    @invariant()
    def same_as_the_model(self) -> None:
        stats = self.store.stats()
        assert stats.results == len(self.model.results) <= LIMITS.max_results
        assert stats.bytes == self.model.size() <= LIMITS.max_bytes
        assert stats.unfinished == len(self.model.waiting)
        assert sum(stats.evicted.values()) == self.model.evicted - self.dropped_before
        assert self.runner.run(self.store.unfinished()) == list(self.model.waiting.values())

    @invariant()
    def everyone_gets_what_is_theirs(self) -> None:
        ids = [*range(13), *range(2**53 - 6, 2**53)]

        async def find_all() -> list[Stored | Gone | None]:
            return await asyncio.gather(*map(self.store.find, ids))

        for id, found in zip(ids, self.runner.run(find_all()), strict=True):
            assert found == self.model.find(id)
            if isinstance(found, Gone):
                assert found.owner == self.owners[id]
            elif found is not None:
                assert found.record.owner == self.owners[id]
                if found.result is not None and found.result.text is not None:
                    assert found.result.text.startswith(f"answer to {self.owners[id]} {id}")

    def teardown(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()
        self.folder.cleanup()


class SqliteMachine(StoreMachine):
    """The same with a file and restarts."""

    kind = "sqlite"


TestMemoryStore = StoreMachine.TestCase
TestMemoryStore.settings = settings(max_examples=60, stateful_step_count=30)
TestSqliteStore = SqliteMachine.TestCase
TestSqliteStore.settings = settings(max_examples=40, stateful_step_count=30)
