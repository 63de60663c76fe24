"""The thread of a SqliteStore: shared transactions, answers after them, errors end nothing."""

import asyncio
import logging
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from dllmserve.errors import JobStoreError
from dllmserve.server.store import JobIdTaken, SqliteStore, Stored, tables
from dllmserve.server.store.tables import Tables
from tests.server.store.jobs import answer, job, using


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


class Commits:
    """Counts commits, holds them back, or lets them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.entered = threading.Event()
        self.free = threading.Event()
        self.free.set()
        self.failures = 0
        commit = Tables.commit

        def watched(tables: Tables) -> bool:
            self.entered.set()
            assert self.free.wait(60)
            self.count += 1
            if self.failures:
                self.failures -= 1
                raise sqlite3.OperationalError("disk I/O error")
            return commit(tables)

        monkeypatch.setattr(Tables, "commit", watched)

    async def reached(self) -> None:
        """Wait until a commit is being written."""
        while not self.entered.is_set():
            await asyncio.sleep(0.001)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Commits:
    return Commits(monkeypatch)


def test_what_queues_up_behind_a_commit_shares_the_next(path: Path, watched: Commits) -> None:
    store = SqliteStore(path)

    async def body() -> None:
        watched.count = 0
        watched.entered.clear()
        watched.free.clear()
        first = asyncio.create_task(store.insert([job(1000)]))
        await watched.reached()
        rest = [asyncio.create_task(store.insert([job(id)])) for id in range(200)]
        finds = [asyncio.create_task(store.find(id)) for id in range(200)]
        await asyncio.sleep(0.02)
        assert not any(task.done() for task in (first, *rest, *finds))  # nothing is on the disk
        assert store.stats().unfinished == 0
        watched.free.set()
        await asyncio.gather(first, *rest)
        assert [await find for find in finds] == [Stored(job(id), None) for id in range(200)]
        assert watched.count == 2
        assert store.stats().unfinished == 201

    using(store, body)


def test_many_submitters_each_get_what_is_theirs(path: Path) -> None:
    store = SqliteStore(path)
    taken = 0

    async def client(number: int) -> None:
        nonlocal taken
        for turn in range(10):
            (id,) = await store.reserve_ids(1)
            await store.insert([job(id, owner=f"client {number}", request=b"%d" % turn)])
            try:  # a pair that is half taken
                await store.insert([job(10_000 + id), job(id)])
            except JobIdTaken:
                taken += 1
            assert await store.finish(id, answer(f"{number} {turn}"))
            found = await store.find(id)
            assert isinstance(found, Stored) and found.result == answer(f"{number} {turn}")
            assert found.record.owner == f"client {number}"

    async def body() -> None:
        await asyncio.gather(*(client(number) for number in range(32)))
        assert taken == 320
        assert (store.stats().results, store.stats().unfinished) == (320, 0)

    using(store, body)


def test_a_failed_commit_is_tried_again_operation_by_operation(
    path: Path, watched: Commits
) -> None:
    store = SqliteStore(path)

    async def body() -> None:
        watched.failures = 1
        await asyncio.gather(*(store.insert([job(id)]) for id in range(20)))
        assert watched.failures == 0
        assert len(await store.unfinished()) == store.stats().unfinished == 20

    using(store, body)


def test_errors_of_the_disk_reach_every_caller_and_end_nothing(
    path: Path, watched: Commits, caplog: pytest.LogCaptureFixture
) -> None:
    store = SqliteStore(path)

    async def body() -> None:
        await store.insert([job(1)])
        before = store.stats()
        watched.failures = 10_000
        errors = await asyncio.gather(
            store.reserve_ids(3),
            store.insert([job(2)]),
            store.finish(1, answer()),
            store.delete(1),
            return_exceptions=True,
        )
        for error in errors:
            assert isinstance(error, JobStoreError) and not isinstance(error, JobIdTaken)
            assert str(error) == "the job store failed and nothing was changed: disk I/O error"
            assert isinstance(error.__cause__, sqlite3.OperationalError)
        watched.failures = 0
        assert store.stats() == before
        assert await store.reserve_ids(1) == [0]
        assert await store.unfinished() == [job(1)]
        await store.insert([job(2)])
        assert store.stats().unfinished == 2

    using(store, body)
    assert [record.getMessage() for record in caplog.records] == [
        f"job store {path}: disk I/O error",
        f"job store {path}: works again",
    ]


def test_a_bug_in_one_operation_fails_only_that_one(path: Path) -> None:
    store = SqliteStore(path)

    async def body() -> None:
        good, wrong_type, too_large, last = await asyncio.gather(
            store.insert([job(1)]),
            store.finish(1, None),  # type: ignore[arg-type]
            store.find(1 << 70),
            store.find(1),
            return_exceptions=True,
        )
        assert isinstance(wrong_type, AttributeError) and isinstance(too_large, OverflowError)
        assert (good, last) == (None, Stored(job(1), None))
        assert store.stats().unfinished == 1

    using(store, body)


def test_cancelling_a_wait_undoes_nothing(path: Path, watched: Commits) -> None:
    store = SqliteStore(path)

    async def body() -> None:
        watched.entered.clear()
        watched.free.clear()
        first, second, third = (asyncio.create_task(store.insert([job(id)])) for id in range(3))
        await watched.reached()
        for task in (first, second):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        watched.free.set()
        await asyncio.wait_for(third, 60)  # it shares a transaction with a cancelled one
        assert await store.unfinished() == [job(0), job(1), job(2)]

    using(store, body)


def test_close_finishes_what_was_asked_for(path: Path) -> None:
    store = SqliteStore(path)

    async def first() -> None:
        await store.open()
        inserts = [asyncio.create_task(store.insert([job(id)])) for id in range(50)]
        await asyncio.sleep(0)  # they have queued up
        await asyncio.gather(store.close(), store.close())
        assert all(task.done() and task.exception() is None for task in inserts)
        for refused in (store.find(1), store.insert([job(99)])):
            with pytest.raises(JobStoreError, match="the job store is not open"):
                await refused
        with pytest.raises(JobStoreError, match="was opened before"):
            await store.open()
        assert store.stats().unfinished == 50
        await store.close()

    asyncio.run(first())
    assert [thread.name for thread in threading.enumerate() if thread.name == "job-store"] == []
    again = SqliteStore(path)
    assert again.stats().unfinished == 0
    assert len(using(again, again.unfinished)) == 50
    asyncio.run(SqliteStore(path).close())  # never opened


def test_an_event_loop_that_ends_early_ends_nothing_else(
    path: Path, watched: Commits, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="dllmserve.store")
    store = SqliteStore(path)

    async def body() -> None:
        await store.open()
        watched.entered.clear()
        watched.free.clear()
        waiting = asyncio.create_task(store.insert([job(1)]))
        await watched.reached()
        waiting.cancel()

    asyncio.run(body())
    watched.free.set()
    store._commits._queue.put(None)
    thread = store._commits._thread
    assert thread is not None
    thread.join(60)
    assert f"job store {path}: the event loop has ended" in caplog.messages
    again = SqliteStore(path)
    assert using(again, again.unfinished) == [job(1)]


def test_an_idle_store_empties_its_log(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "TIDY_AFTER_S", 0.01)
    log = path.with_name("jobs.db-wal")
    tidy, failures = Tables.tidy, [1, 2]

    def failing(tables: Tables) -> None:
        if failures:
            failures.pop()
            raise sqlite3.OperationalError("database or disk is full")
        tidy(tables)

    monkeypatch.setattr(Tables, "tidy", failing)
    store = SqliteStore(path)

    async def body() -> None:
        await store.insert([job(1, request=b"SECRET" * 100)])
        assert await store.delete(1)
        await store.find(1)
        until = time.monotonic() + 60
        while log.stat().st_size and time.monotonic() < until:
            await asyncio.sleep(0.005)
        assert (log.stat().st_size, failures) == (0, [])
        assert b"SECRET" not in path.read_bytes()
        await store.insert([job(2)])
        assert await store.find(2) == Stored(job(2), None)

    using(store, body)
