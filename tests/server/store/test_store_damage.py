"""Damaged stores: each is refused in one line, or read with documented answers."""

import asyncio
import random
import shutil
import sqlite3
import sys
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dllmserve.errors import ConfigError, DllmServeError, JobStoreError
from dllmserve.server.jobs import Details, details_of
from dllmserve.server.store import Gone, JobResult, SqliteStore, Stored, StoreLimits
from dllmserve.server.store.files import _KEPT
from tests.server.store.jobs import answer, job, using

JOBS = 40
LIMITS = StoreLimits(max_results=20, max_tombstones=8)


async def filled(path: Path) -> SqliteStore:
    """A store with all kinds of rows, open: results read and not, waiting jobs, dropped ones."""
    store = SqliteStore(path, LIMITS)
    await store.open()
    await store.reserve_ids(JOBS)
    await store.insert([job(id, owner=f"owner {id % 2}") for id in range(JOBS)])
    for id in range(25):
        await store.finish(id, answer(f"text of owner {id % 2} " * 9))
    for id in (7, 9):
        await store.mark_read(id)
    await store.delete(30)
    return store


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was closed, and one that was killed: with its log beside it."""
    folder = tmp_path_factory.mktemp("sound")

    async def main() -> None:
        store = await filled(folder / "closed.db")
        for ending in ("", "-wal"):
            shutil.copy(folder / f"closed.db{ending}", folder / f"killed.db{ending}")
        await store.close()

    asyncio.run(main())
    assert (folder / "killed.db-wal").stat().st_size > 4096
    return folder


async def use(path: Path) -> None:
    """Open and use a store; whatever it raises must be one of ours."""
    store = SqliteStore(path, LIMITS)
    await store.open()

    async def tried(operation: Awaitable[Any]) -> Any:
        try:
            return await operation
        except JobStoreError as error:
            assert "\n" not in str(error)
            return None

    try:
        await tried(store.unfinished())
        for id in range(-1, JOBS + 1):
            found = await tried(store.find(id))
            assert isinstance(found, Stored | Gone | None)
            if isinstance(found, Stored) and found.result is not None:
                await tried(parsed(found.result))
        new = await tried(store.reserve_ids(1)) or [JOBS]
        await tried(store.insert([job(new[0])]))
        await tried(store.finish(new[0], answer()))
        await tried(store.mark_read(11))
        await tried(store.delete(12))
        await tried(store.expire(1e9))
        store.stats()
    finally:
        await store.close()


async def parsed(result: JobResult) -> Details | None:
    return details_of(result)


def damaged(data: bytes, how: random.Random) -> bytes:
    """A few bytes, or a range of them, are not what they were; or the end is missing."""
    found = bytearray(data)
    kind = how.choice(["bit", "bytes", "zeros", "cut", "page", "swap"])
    place = how.randrange(len(found))
    if kind == "bit":
        found[place] ^= 1 << how.randrange(8)
    elif kind == "bytes":
        for _ in range(how.choice([1, 5, 50])):
            found[how.randrange(len(found))] = how.randrange(256)
    elif kind == "zeros":
        length = how.choice([1, 64, 4096])
        found[place : place + length] = bytes(len(found[place : place + length]))
    elif kind == "cut":
        del found[place:]
    elif kind == "page":
        start = place // 4096 * 4096
        found[start : start + 4096] = how.randbytes(len(found[start : start + 4096]))
    else:
        first, second = (how.randrange(len(found) // 4096 + 1) * 4096 for _ in range(2))
        page = found[first : first + 4096]
        if len(page) == len(found[second : second + 4096]):
            found[first : first + 4096] = found[second : second + 4096]
            found[second : second + 4096] = page
    return bytes(found)


@pytest.mark.parametrize("part", range(4))
def test_random_damage(sound: Path, tmp_path: Path, part: int) -> None:
    outcomes = {"opened": 0, "refused": 0}
    with asyncio.Runner() as runner:
        for seed in range(part * 60, part * 60 + 60):
            how = random.Random(seed)
            path = tmp_path / f"{seed}.db"
            name = how.choice(["closed.db", "killed.db"])
            hurt = how.choice(["", "-wal"]) if name == "killed.db" else ""
            for ending in ("", "-wal"):
                if (source := sound / f"{name}{ending}").exists():
                    data = source.read_bytes()
                    data = damaged(data, how) if ending == hurt else data
                    path.with_name(path.name + ending).write_bytes(data)
            try:
                runner.run(use(path))
                outcomes["opened"] += 1
            except ConfigError as error:
                outcomes["refused"] += 1
                message = str(error)
                assert str(path) in message and "\n" not in message, seed
                assert path.exists(), seed
    assert min(outcomes.values()) > 5, outcomes


VALUES: dict[str, tuple[str, str]] = {
    "id below 0": ("UPDATE jobs SET id = -5 WHERE id = 39", "job -5 .*: id"),
    "id above all": (f"UPDATE jobs SET id = {2**53} WHERE id = 39", f"job {2**53} .*: id"),
    "owner no text": ("UPDATE jobs SET owner = x'ff' WHERE id = 38", "job 38 has a text that"),
    "owner a number": ("UPDATE jobs SET owner = 5 WHERE id = 38", "job 38 .*: owner"),
    "model TEXT": ("UPDATE jobs SET model = 'tiny' WHERE id = 38", "job 38 .*: model"),
    "created a word": ("UPDATE jobs SET created = 'now'", "job .*: created"),
    "created negative": ("UPDATE jobs SET created = -1.0", "job .*: created"),
    "deadline infinite": ("UPDATE jobs SET deadline = 9e999", "job .*: deadline"),
    "deadline negative": ("UPDATE jobs SET deadline = -9e999", "job .*: deadline"),
    "deadline before": ("UPDATE jobs SET deadline = created - 1", "job .*: deadline"),
    "request a word": ("UPDATE jobs SET request = 'x' WHERE id = 38", "job 38 .*: request"),
    "request left": ("UPDATE jobs SET request = x'00' WHERE id = 20", "job 20 .*: request"),
    "status unknown": ("UPDATE jobs SET status = 'boo' WHERE id = 20", "job 20 .*: status"),
    "status no text": (
        "UPDATE jobs SET status = CAST(x'ff' AS TEXT) WHERE id = 20",
        "job 20 .*: status",
    ),
    "status without an end": ("UPDATE jobs SET status = 'failed' WHERE id = 38", "job 38 .*"),
    "text no text": ("UPDATE jobs SET text = x'c3' WHERE id = 20", "job 20 has a text"),
    "text a number": ("UPDATE jobs SET text = 5 WHERE id = 20", "job 20 .*: text"),
    "error a word": ("UPDATE jobs SET error = 'x' WHERE id = 20", "job 20 .*: error"),
    "details missing": ("UPDATE jobs SET details = NULL WHERE id = 20", "job 20 .*: details"),
    "finished missing": ("UPDATE jobs SET finished = NULL WHERE id = 20", "job 20 .*: finished"),
    "finished negative": ("UPDATE jobs SET finished = -1.0 WHERE id = 20", "job 20 .*: finished"),
    "result of none": ("UPDATE jobs SET text = x'00' WHERE id = 38", "job 38 .*: result"),
    "size huge": (f"UPDATE jobs SET size = {2**63 - 1}", "job .*: (size|result)"),
    "state unknown": ("UPDATE jobs SET state = 7 WHERE id = 38", "job 38 .*: state"),
    "place negative": ("UPDATE jobs SET place = -1 WHERE id = 38", "job 38 .*: place"),
    "reason unknown": ("UPDATE tombstones SET reason = 'x'", "dropped job .*: reason"),
    "tombstone owner": ("UPDATE tombstones SET owner = x'ff'", "dropped job .* has a text"),
    "tombstone id": ("UPDATE tombstones SET id = -1 WHERE id = 30", "dropped job -1 .*: id"),
    "no count": ("DELETE FROM next_id", "next_id"),
    "two counts": ("INSERT INTO next_id VALUES (1)", "next_id"),
    "count a word": ("UPDATE next_id SET id = 'x'", "next_id"),
    "count negative": ("UPDATE next_id SET id = -1", "next_id"),
    "two leases": ("INSERT INTO alive VALUES (1.0)", "the time until which"),
    "lease a word": ("UPDATE alive SET until = 'x'", "the time until which"),
    "lease infinite": ("UPDATE alive SET until = 9e999", "the time until which"),
    "no tombstones": ("DROP TABLE tombstones", "'tombstones' is missing"),
    "no index": ("DROP INDEX jobs_by_place", "'jobs_by_place' is missing"),
    "more tables": ("CREATE TABLE more (x)", "'more' is not part of one"),
    "a trigger": (
        "CREATE TRIGGER t AFTER DELETE ON jobs BEGIN DELETE FROM jobs; END",
        "'t' is not part of one",
    ),
    "more columns": ("ALTER TABLE jobs ADD COLUMN x", "'jobs' is not as it should be"),
    "fewer columns": ("ALTER TABLE jobs DROP COLUMN details", "'jobs' is not as it should be"),
    "other columns": ("ALTER TABLE alive RENAME COLUMN until TO x", "'alive' is not as it should"),
}


def changed(path: Path, statement: str) -> None:
    """Change a store with a tool."""
    db = sqlite3.connect(path)
    db.execute(statement)
    db.commit()
    db.close()


@pytest.mark.parametrize(("statement", "said"), VALUES.values(), ids=VALUES)
def test_values_that_cannot_be(sound: Path, tmp_path: Path, statement: str, said: str) -> None:
    """SQLite finds nothing wrong with them."""
    path = tmp_path / "jobs.db"
    shutil.copy(sound / "closed.db", path)
    changed(path, statement)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=said) as refused:
        asyncio.run(SqliteStore(path).open())
    message = str(refused.value)
    assert "\n" not in message and _KEPT in message and str(path) in message
    assert path.read_bytes() == before


def test_a_store_without_a_lease_is_an_older_one(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    shutil.copy(sound / "closed.db", path)
    changed(path, "DROP TABLE alive")
    store = SqliteStore(path, LIMITS)

    async def body() -> None:
        # no job has had more of its time than it can have had
        assert store.clock() >= max(record.created for record in await store.unfinished())
        assert len(await store.unfinished()) == store.stats().unfinished == 14

    using(store, body)
    using(SqliteStore(path, LIMITS), lambda: asyncio.sleep(0))


@pytest.mark.parametrize("kept", ["empty", "missing"])
def test_a_log_without_its_store_is_kept(sound: Path, tmp_path: Path, kept: str) -> None:
    path, log = tmp_path / "jobs.db", tmp_path / "jobs.db-wal"
    shutil.copy(sound / "killed.db-wal", log)
    if kept == "empty":
        path.touch()
    with pytest.raises(ConfigError, match=r"it is empty, and jobs\.db-wal is not"):
        asyncio.run(SqliteStore(path).open())
    assert log.read_bytes() == (sound / "killed.db-wal").read_bytes()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python cannot tell SQLite so")
def test_a_refused_store_keeps_its_log(sound: Path, tmp_path: Path) -> None:
    path, log = tmp_path / "jobs.db", tmp_path / "jobs.db-wal"
    shutil.copy(sound / "killed.db", path)
    shutil.copy(sound / "killed.db-wal", log)

    async def main() -> None:
        store = SqliteStore(path, LIMITS)
        await store.open()
        await store._commits.run(lambda tables: tables._db.execute("UPDATE next_id SET id = -1"))
        for file in (path, log):
            shutil.copy(file, tmp_path / f"copy-{file.name}")
        await store.close()

    asyncio.run(main())
    copy = tmp_path / "copy-jobs.db"
    before = {p.name: p.read_bytes() for p in tmp_path.glob("copy-*")}
    with pytest.raises(ConfigError, match="next_id"):
        asyncio.run(SqliteStore(copy).open())
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def while_open(path: Path, statement: str, then: Callable[[SqliteStore], Awaitable[None]]) -> None:
    """Damage a store that is being used."""
    store = SqliteStore(path, LIMITS)

    async def body() -> None:
        await store._commits.run(lambda tables: tables._db.execute(statement))
        await then(store)

    using(store, body)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE jobs SET owner = x'ff' WHERE id = 20",
        "UPDATE jobs SET text = x'ff' WHERE id = 20",
        "UPDATE jobs SET status = CAST(x'ff' AS TEXT) WHERE id = 20",
        "UPDATE jobs SET finished = 'x' WHERE id = 20",
        "UPDATE jobs SET details = 'x' WHERE id = 20",
    ],
)
def test_damage_while_it_is_open_fails_the_read_of_one_job(
    sound: Path, tmp_path: Path, statement: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "jobs.db"
    shutil.copy(sound / "closed.db", path)

    async def then(store: SqliteStore) -> None:
        found = await asyncio.gather(
            store.find(20), store.find(21), store.find(0), return_exceptions=True
        )
        assert isinstance(found[0], JobStoreError) and "job 20 has a " in str(found[0])
        assert isinstance(found[1], Stored) and isinstance(found[2], Gone)

    while_open(path, statement, then)
    assert caplog.records == []


def test_a_text_that_sqlite_cannot_even_report(tmp_path: Path) -> None:
    """Its own messages quote the file, and Python takes them for UTF-8."""
    path = tmp_path / "jobs.db"
    using(SqliteStore(path), lambda: asyncio.sleep(0))
    data = path.read_bytes()
    at = data.index(b"CREATE TABLE jobs")
    path.write_bytes(data[: at + 13] + b"\xff\xfe" + data[at + 15 :])
    with warnings.catch_warnings(), pytest.raises(ConfigError, match="is damaged"):
        warnings.simplefilter("ignore")
        asyncio.run(SqliteStore(path).open())


@pytest.mark.parametrize(
    "packed",
    [
        b"\xc1",
        b"\x81",
        msgspec.msgpack.encode({"finish_reason": 5}),
        msgspec.msgpack.encode(Details("stop", 1, 2, 3, float("nan"))),
        msgspec.msgpack.encode(Details("stop", 1, 2, 3, float("inf"))),
        msgspec.msgpack.encode(Details("stop", 1, 2, 3)).replace(b"stop", b"\xff\xff\xff\xff"),
    ],
)
def test_details_that_are_none(packed: bytes) -> None:
    with pytest.raises(JobStoreError, match="the details of a result are damaged"):
        details_of(JobResult("finished", "x", None, packed, 1.0))


def test_details_that_are() -> None:
    details = Details("stop", 1, 2, 3, 0.5)
    assert details_of(answer()) is None
    packed = msgspec.msgpack.encode(details)
    assert details_of(JobResult("finished", "x", None, packed, 1.0)) == details
    assert issubclass(JobStoreError, DllmServeError)
