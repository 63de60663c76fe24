"""The clock of a store: it stands still without a server; no kill and no jump moves it far."""

import asyncio
import math
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Self

import pytest

from dllmserve.errors import JobStoreError
from dllmserve.server.store import JobRecord, SqliteStore, Stored
from dllmserve.server.store import tables as made_of
from dllmserve.server.store.lease import LEASE_S
from dllmserve.server.store.tables import Tables
from tests.server.store.jobs import answer, job, using


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


class Life:
    """A server that has a store, from its start to its kill or its end."""

    def __init__(self, path: Path, clock: Clock, began: float | None = None) -> None:
        self.path, self.clock = path, clock
        self.store = SqliteStore(path, monotonic=clock, began=began)

    async def __aenter__(self) -> Self:
        await self.store.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.store.close()

    async def accept(self, id: int, timeout: float) -> None:
        now = self.store.clock()
        await self.store.insert([JobRecord(id, "", "tiny", now, now + timeout, b"prompt")])

    async def runs(self, seconds: float) -> None:
        """So much time passes, with a look at a job once a second, or less."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now = min(self.clock.now + 1.0, end)
            await self.store.find(0)

    async def left(self, id: int = 0) -> float:
        """Seconds that a job has left."""
        found = {record.id: record for record in await self.store.unfinished()}
        return found[id].deadline - self.store.clock()

    def killed(self, copy: Path) -> Path:
        """What a kill -9 would leave behind now."""
        for ending in ("", "-wal"):
            shutil.copy(f"{self.path}{ending}", f"{copy}{ending}")
        return copy


def test_time_without_a_server_does_not_count(tmp_path: Path) -> None:
    """Killed after 2 of 6 seconds, and back 9 later, a job has 4 left, or up to a lease less."""
    clock = Clock()

    async def main() -> None:
        async with Life(tmp_path / "a", clock) as first:
            await first.accept(0, timeout=6)
            await first.runs(2)
            path = first.killed(tmp_path / "b")
        clock.now += 9
        async with Life(path, clock) as second:
            assert 4 - LEASE_S <= await second.left() <= 4
            await second.runs(1.5)
            assert 2.5 - LEASE_S <= await second.left() <= 2.5
        clock.now += 1000  # closed, it says when it ended
        async with Life(path, clock) as third:
            assert 2.5 - LEASE_S <= await third.left() <= 2.5

    asyncio.run(main())


def test_an_end_that_is_no_kill_is_exact(tmp_path: Path) -> None:
    clock = Clock()

    async def main() -> None:
        async with Life(tmp_path / "a", clock) as first:
            await first.accept(0, timeout=6)
            clock.now += 2.25
        clock.now += 9
        async with Life(tmp_path / "a", clock) as second:
            assert await second.left() == pytest.approx(3.75)

    asyncio.run(main())


def test_the_time_of_a_start_counts(tmp_path: Path) -> None:
    clock = Clock()

    async def main() -> None:
        async with Life(tmp_path / "a", clock) as first:
            await first.accept(0, timeout=6)
        began = clock.now = 100.0
        clock.now += 1.5
        async with Life(tmp_path / "a", clock, began) as second:
            assert await second.left() == pytest.approx(4.5)

    asyncio.run(main())


def test_servers_that_are_killed_at_once_use_a_job_up(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "0"

    async def main() -> int:
        async with Life(path, clock) as life:
            await life.accept(0, timeout=6)
            copy = life.killed(tmp_path / "1")
        for count in range(1, 20):
            async with Life(copy, clock) as life:
                if await life.left() <= 0:
                    return count
                await life.runs(0.001)
                copy = life.killed(tmp_path / str(count + 1))
        raise AssertionError("it lives for ever")

    assert asyncio.run(main()) <= math.ceil(6 / LEASE_S)


@pytest.mark.parametrize("jump", [86_400.0, -86_400.0])
def test_the_wall_clock_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    clock, wall = Clock(), time.time()

    async def main() -> None:
        async with Life(tmp_path / "a", clock) as first:
            await first.accept(0, timeout=6)
            monkeypatch.setattr(time, "time", lambda: wall + jump)
            await first.runs(2)
            assert await first.left() == pytest.approx(4)
        async with Life(tmp_path / "a", clock) as second:
            assert await second.left() == pytest.approx(4)

    asyncio.run(main())


def test_a_lease_that_was_set_back_gives_no_job_more_than_its_time(tmp_path: Path) -> None:
    clock = Clock()

    async def main() -> None:
        async with Life(tmp_path / "a", clock) as first:
            await first.accept(0, timeout=6)
        db = sqlite3.connect(tmp_path / "a")
        db.execute("UPDATE alive SET until = 1.0")
        db.commit()
        db.close()
        async with Life(tmp_path / "a", clock) as second:
            assert await second.left() <= 6

    asyncio.run(main())


async def until_written(tables: Tables, count: int) -> None:
    """Wait until the store's thread has written so often by itself."""
    async with asyncio.timeout(30):
        while tables._db.total_changes < count:
            await asyncio.sleep(0.001)


def test_a_store_with_unfinished_jobs_renews_its_lease_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log is emptied all the same; without such a job it writes nothing."""
    monkeypatch.setattr(made_of, "TIDY_AFTER_S", 0.01)
    path, log, clock = tmp_path / "a", tmp_path / "a-wal", Clock()
    store = SqliteStore(path, monotonic=clock)

    async def body() -> None:
        tables = store._tables
        assert tables is not None
        await store.insert([job(1, request=b"SECRET" * 100), job(2)])
        await store.delete(1)
        for _ in range(3):
            before = tables._db.total_changes
            clock.now += LEASE_S
            await until_written(tables, before + 1)
        async with asyncio.timeout(30):
            while tables.untidy or b"SECRET" in log.read_bytes():
                await asyncio.sleep(0.001)
        assert b"SECRET" not in path.read_bytes()
        await store.finish(2, answer())
        async with asyncio.timeout(30):
            while log.stat().st_size:
                await asyncio.sleep(0.001)
        before = tables._db.total_changes
        clock.now += 1000
        await store.find(2)
        assert (tables._db.total_changes, log.stat().st_size) == (before, 0)
        assert tables.patience is None

    using(store, body)


def test_a_lease_is_not_in_force_before_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    store = SqliteStore(tmp_path / "a", monotonic=clock)

    async def body() -> None:
        await store.insert([job(1)])
        tables = store._tables
        assert tables is not None
        before = tables.lease.until
        clock.now += LEASE_S

        def full() -> float:
            raise sqlite3.OperationalError("database or disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(tables.lease, "renew", full)
            for _ in range(3):  # reads go on
                assert await store.find(1) == Stored(job(1), None)
            with pytest.raises(JobStoreError, match="disk is full"):
                await store.insert([job(2)])
            assert tables.lease.until == before
        await store.insert([job(2)])
        assert tables.lease.until == pytest.approx(before + LEASE_S)

    using(store, body)
    assert [r.getMessage().rpartition(": ")[2] for r in caplog.records] == [
        "database or disk is full",
        "works again",
    ]


def test_a_full_disk_keeps_no_store_from_being_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SqliteStore(tmp_path / "a")

    def full() -> None:
        raise sqlite3.OperationalError("database or disk is full")

    async def body() -> None:
        await store.insert([job(1)])
        assert store._tables is not None
        monkeypatch.setattr(store._tables.lease, "end", full)

    using(store, body)
    again = SqliteStore(tmp_path / "a")
    assert using(again, again.unfinished) == [job(1)]


def test_a_clock_that_is_not_running(tmp_path: Path) -> None:
    for path in (None, tmp_path / "a"):
        with pytest.raises(JobStoreError, match="not open"):
            SqliteStore(path).clock()
