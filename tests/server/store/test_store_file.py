"""The file of a SqliteStore: restarts, kill -9, one server at a time, damage, a full disk."""

import asyncio
import os
import re
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from dllmserve.errors import ConfigError, JobStoreError
from dllmserve.server.store import Gone, SqliteStore, Stored, StoreLimits, tables
from tests.server.store.jobs import answer, done, job, using

ROOT = Path(__file__).parents[3]
BESIDE = ("-wal", "-shm", "-journal")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "jobs.db"


def fill(path: Path, jobs: int) -> None:
    """A store with so many jobs, the even ones finished, closed again."""
    store = SqliteStore(path)

    async def body() -> None:
        await store.insert([job(id, request=b"prompt" * 200) for id in range(jobs)])
        for id in range(0, jobs, 2):
            await store.finish(id, answer(f"text {id} " * 100))

    using(store, body)


def refusal(path: Path) -> str:
    """Why the file is refused; it and the files beside it are not changed by that."""

    def contents() -> dict[str, bytes]:
        files = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
        return {f.name: f.read_bytes() for f in files if f.is_file() and f.suffix != ".lock"}

    before = contents()
    store = SqliteStore(path)
    with pytest.raises(ConfigError, match="--job-store") as refused:
        asyncio.run(store.open())
    assert contents() == before
    message = str(refused.value)
    assert str(path.resolve()) in message and "\n" not in message
    return message


def test_everything_is_there_after_a_restart(path: Path) -> None:
    first = SqliteStore(path, StoreLimits(max_results=3))

    async def before() -> None:
        assert await first.reserve_ids(6) == [0, 1, 2, 3, 4, 5]
        await first.insert([job(id) for id in (5, 3, 4, 1, 0)])
        for id in (3, 4, 1):
            await first.finish(id, answer(f"text {id}"))
        await first.mark_read(4)
        await first.delete(0)

    using(first, before)
    second = SqliteStore(path, StoreLimits(max_results=3))

    async def after() -> None:
        assert await second.reserve_ids(1) == [6]
        assert await second.unfinished() == [job(5)]
        assert await second.find(1) == done(job(1), answer("text 1"))
        assert await second.find(0) == Gone("deleted", "ann")
        assert second.stats().bytes == 18
        assert set(second.stats().evicted.values()) == {0}
        await second.finish(5, answer())  # 4 was read, also before the restart
        assert await second.find(4) == Gone("evicted", "ann")

    using(second, after)


def test_lower_limits_hold_from_the_start(path: Path) -> None:
    fill(path, 20)
    store = SqliteStore(path, StoreLimits(max_results=4, max_tombstones=3))

    async def body() -> None:
        assert (store.stats().results, store.stats().unfinished) == (4, 10)
        found = [await store.find(id) for id in range(0, 20, 2)]
        assert [type(one) for one in found] == [type(None)] * 3 + [Gone] * 3 + [Stored] * 4

    using(store, body)


def test_only_the_user_can_read_the_files(path: Path) -> None:
    store = SqliteStore(path)

    async def body() -> None:
        await store.insert([job(1)])
        modes = {f.name: stat.S_IMODE(f.stat().st_mode) for f in path.parent.iterdir()}
        assert modes == dict.fromkeys(["jobs.db", "jobs.db-wal", "jobs.db.lock"], 0o600)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700

    using(store, body)
    for file in path.parent.iterdir():  # as Kubernetes does with the files of a volume
        file.chmod(0o666)

    using(SqliteStore(path), body_of_another(path))


def body_of_another(path: Path) -> Callable[[], Awaitable[None]]:
    async def body() -> None:
        assert (path.parent / "jobs.db-wal").exists()
        modes = {stat.S_IMODE(f.stat().st_mode) for f in path.parent.iterdir()}
        assert modes == {0o600}

    return body


def test_the_files_of_a_killed_server_become_its_users_alone(path: Path, tmp_path: Path) -> None:
    """Also where all of the database is still in the log."""
    store, copy = SqliteStore(path), tmp_path / "copy" / "jobs.db"
    copy.parent.mkdir()

    async def body() -> None:
        await store.insert([job(1)])
        for ending in ("", "-wal"):
            shutil.copy(f"{path}{ending}", f"{copy}{ending}")
            Path(f"{copy}{ending}").chmod(0o664)

    using(store, body)
    using(SqliteStore(copy), body_of_another(copy))


def test_a_deleted_prompt_is_not_in_the_files(path: Path) -> None:
    store = SqliteStore(path)

    async def body() -> None:
        await store.insert([job(1, request=b"SECRET" * 1000), job(2, request=b"SECRET" * 10)])
        await store.finish(1, answer())
        await store.delete(2)

    using(store, body)
    assert not any(b"SECRET" in file.read_bytes() for file in path.parent.iterdir())


def test_a_second_server_is_refused(path: Path, tmp_path: Path) -> None:
    store = SqliteStore(path)
    other_name = tmp_path / "link"

    async def body() -> None:
        other_name.symlink_to(path.parent)
        for name in (path, other_name / path.name):
            second = SqliteStore(name)
            with pytest.raises(ConfigError) as refused:
                await second.open()
            assert str(refused.value) == (
                f"the job store {path} is in use by another server (process {os.getpid()}); "
                "stop that one, or give another file with --job-store"
            )
            with pytest.raises(JobStoreError, match="not open"):
                await second.find(1)
            await second.close()
        await store.insert([job(1)])

    using(store, body)
    using(SqliteStore(other_name / path.name), lambda: asyncio.sleep(0))


def test_a_database_locked_by_a_tool_is_refused(path: Path) -> None:
    fill(path, 1)
    tool = sqlite3.connect(path, isolation_level=None)
    try:
        tool.execute("PRAGMA locking_mode = EXCLUSIVE")
        tool.execute("BEGIN IMMEDIATE")
        with pytest.raises(ConfigError, match="is in use by another server; stop that one"):
            asyncio.run(SqliteStore(path).open())
    finally:
        tool.close()


def overwrite(path: Path, start: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)


def test_a_damaged_file_is_refused_and_kept(path: Path) -> None:
    fill(path, 60)
    sound = path.read_bytes()
    overwrite(path, 0, b"not a database at all")
    assert "is damaged, or no job store (file is not a database)" in refusal(path)
    path.write_bytes(sound)
    overwrite(path, 4096, b"\xa5" * (len(sound) - 4096))
    assert "is damaged" in refusal(path)
    path.write_bytes(sound[: len(sound) // 2])
    assert "is damaged" in refusal(path)
    path.write_bytes(sound)
    db = sqlite3.connect(path)
    query = "SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_tombstones_1'"
    (page,) = db.execute(query).fetchone()
    db.close()
    overwrite(path, (page - 1) * 4096, b"\xa5" * 4096)  # what is not read at the start
    assert "is damaged" in refusal(path)
    path.write_bytes(sound)
    using(SqliteStore(path), lambda: asyncio.sleep(0))


def execute(path: Path, statement: str) -> None:
    db = sqlite3.connect(path)
    db.execute(statement)
    db.commit()
    db.close()


def test_a_file_without_the_newer_indexes_gets_them(path: Path) -> None:
    """Earlier versions made none by owner."""
    fill(path, 3)
    indexes = ("jobs_by_owner", "tombstones_by_owner")
    for name in indexes:
        execute(path, f"DROP INDEX {name}")
    using(SqliteStore(path, StoreLimits(max_results=1)), lambda: asyncio.sleep(0))
    db = sqlite3.connect(path)
    names = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
    assert names >= set(indexes)
    # and what goes first is found there, however much there is
    for query in (tables._VICTIM, tables._OLDEST):
        values = ("ann", 1)[: query.count("?")]
        plan = " ".join(row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {query}", values))
        assert "USING" in plan and "_by_owner" in plan and "TEMP B-TREE" not in plan, plan
    db.close()


def test_files_of_others_and_newer_ones_are_refused(path: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "contacts.db"
    execute(foreign, "CREATE TABLE people (name TEXT)")
    foreign.chmod(0o644)
    assert "a database of something else" in refusal(foreign)
    assert stat.S_IMODE(foreign.stat().st_mode) == 0o644
    fill(path, 1)
    execute(path, "PRAGMA user_version = 2")
    assert "has version 2 and this dllmserve knows 1" in refusal(path)
    execute(path, "PRAGMA user_version = 1")
    execute(path, "DROP TABLE tombstones")
    assert "'tombstones' is missing" in refusal(path)


def test_paths_that_cannot_be_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    before = {*tmp_path.parent.iterdir()}
    for directory in (tmp_path, tmp_path / "..", Path("/")):
        assert "is a directory" in refusal(directory)
    for name in ("", ".", ".."):
        with pytest.raises(ConfigError, match="is a directory; give another file"):
            asyncio.run(SqliteStore(Path(name)).open())
    assert {*tmp_path.parent.iterdir()} == before, "a lock was made"
    assert f"Not a directory: {tmp_path / 'file'}" in refusal(tmp_path / "file" / "jobs.db")


@pytest.mark.parametrize("name", ["jobs.db", "jobs.db.lock", *(f"jobs.db{b}" for b in BESIDE)])
@pytest.mark.parametrize("kind", ["directory", "pipe", "socket", "link", "hard link", "dead link"])
def test_what_is_no_file_of_its_own_is_refused(path: Path, name: str, kind: str) -> None:
    """In place of any of a store's files; what a link leads to is not touched."""
    path.parent.mkdir()
    place, victim = path.parent / name, path.parent.parent / "authorized_keys"
    victim.write_text("ssh-ed25519 AAAA\n")
    if kind == "directory":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(place))
    elif kind == "hard link":
        place.hardlink_to(victim)
    else:
        place.symlink_to(victim if kind == "link" else path.parent.parent / "nothing")
    said = {
        "directory": "((Is|is) a directory|is not a regular file)",
        "pipe": "is not a regular file",
        "socket": "(No such device|is not a regular file)",
        "hard link": r"is one of 2 names of a file \(hard links\)",
        "link": "is a link",
        "dead link": "is a link",
    }
    with pytest.raises(ConfigError, match=said[kind]) as refused:
        asyncio.run(SqliteStore(path).open())
    assert f"{path.parent}/" in str(refused.value) and "\n" not in str(refused.value)
    assert {p.name for p in path.parent.iterdir()} <= {name, "jobs.db.lock"}
    assert victim.read_text() == "ssh-ed25519 AAAA\n"
    assert not (path.parent.parent / "nothing").exists()


def test_sequential_ids_end_somewhere(path: Path) -> None:
    fill(path, 1)
    execute(path, f"UPDATE next_id SET id = {2**53 - 2}")
    store = SqliteStore(path)

    async def body() -> None:
        assert await store.reserve_ids(1) == [2**53 - 2]
        with pytest.raises(JobStoreError, match="are used up"):
            await store.reserve_ids(2)
        assert await store.reserve_ids(1) == [2**53 - 1]

    using(store, body)


def test_an_empty_file_is_a_new_store(path: Path) -> None:
    """As after a crash between making the file and writing to it."""
    path.parent.mkdir()
    path.touch()
    fill(path, 2)
    assert path.stat().st_size > 0


KILLED = """
import asyncio, sys
from dllmserve.server.store import SqliteStore
from tests.server.store.jobs import answer, job

async def submit(store):
    while True:
        ids = await store.reserve_ids(2)
        await store.insert([job(id, request=b"prompt %d" % id) for id in ids])
        print("inserted", *ids, flush=True)
        if ids[0] % 3 == 0:
            await store.finish(ids[0], answer(f"text {ids[0]}"))
            print("finished", ids[0], flush=True)

async def main():
    store = SqliteStore(sys.argv[1])
    await store.open()
    await asyncio.gather(*(submit(store) for _ in range(8)))

asyncio.run(main())
"""


def test_kill_9_loses_nothing_that_was_acknowledged(path: Path) -> None:
    for round in range(2):  # the second time on a file that was not closed
        command = [sys.executable, "-c", KILLED, str(path)]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        lines = [child.stdout.readline().split() for _ in range(300)]
        child.kill()
        # what was printed before the kill; the last line may be cut off
        lines += [line.split() for line in child.stdout.read().splitlines()[:-1]]
        child.stdout.close()
        assert child.wait() == -9
        inserted = {int(id) for line in lines if line[0] == "inserted" for id in line[1:]}
        finished = {int(line[1]) for line in lines if line[0] == "finished"}
        assert len(inserted) > 200 and len(finished) > 30, f"round {round}"
        store = SqliteStore(path)

        async def body(
            store: SqliteStore = store,
            inserted: set[int] = inserted,
            finished: set[int] = finished,
        ) -> None:
            waiting = {record.id: record for record in await store.unfinished()}
            for id in inserted - finished:  # its end may have been stored and not printed
                if id in waiting:
                    assert waiting[id] == job(id, request=b"prompt %d" % id)
                else:
                    assert await store.find(id) == done(job(id), answer(f"text {id}"))
            for id in finished:
                assert await store.find(id) == done(job(id), answer(f"text {id}"))
            assert (await store.reserve_ids(1))[0] > max(inserted)

        using(store, body)


FULL = """
import asyncio, resource, sys
from pathlib import Path
from dllmserve.errors import JobStoreError
from dllmserve.server.store import SqliteStore, Stored
from tests.server.store.jobs import answer, done, job

async def main():
    store = SqliteStore(sys.argv[1])
    await store.open()
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    accepted, refused = [], []
    async def submit(id):
        try:
            await store.insert([job(id, request=b"p" * 3000)])
            accepted.append(id)
        except JobStoreError as error:
            refused.append(id)
            assert str(error).startswith("the job store failed and nothing was changed: "), error
    for start in range(0, 400, 20):
        await asyncio.gather(*(submit(id) for id in range(start, start + 20)))
    assert len(accepted) > 20 and len(refused) > 20, (accepted, refused)
    assert store.stats().unfinished == len(accepted)
    assert await store.find(accepted[0]) == Stored(job(accepted[0], request=b"p" * 3000), None)
    assert await store.find(refused[0]) is None
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await asyncio.gather(*(submit(id) for id in refused[:]))
    assert await store.finish(5, answer())
    await store.close()
    again = SqliteStore(sys.argv[1])
    await again.open()
    assert {record.id for record in await again.unfinished()} == {*range(400)} - {5}
    assert await again.find(5) == done(job(5), answer())
    await again.close()

asyncio.run(main())
"""


def test_a_disk_that_takes_no_more_refuses_and_then_recovers(path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(path)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    # one line about the failure, one when it is over
    assert [line.split(": ")[-1] for line in child.stderr.splitlines()][1:] == ["works again"]


def test_a_full_database_refuses_only_what_does_not_fit(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = SqliteStore(path)

    async def pages(more: int) -> Any:
        def work(tables: Any) -> Any:
            (used,) = tables._db.execute("PRAGMA page_count").fetchone()
            tables._db.execute(f"PRAGMA max_page_count = {used + more}")

        return await store._commits.run(work)

    async def body() -> None:
        await store.insert([job(id) for id in range(10)])
        await pages(more=20)
        results = await asyncio.gather(
            store.finish(0, answer()),
            store.insert([job(100, request=b"p" * 200_000)]),
            store.insert([job(101)]),
            store.reserve_ids(2),
            return_exceptions=True,
        )
        assert isinstance(results[1], JobStoreError)
        assert "database or disk is full" in str(results[1])
        assert [results[0], *results[2:]] == [True, None, [0, 1]]
        assert await store.find(100) is None
        assert store.stats().unfinished == 10 and store.stats().results == 1
        await pages(more=1000)
        await store.insert([job(100, request=b"p" * 200_000)])
        assert store.stats().unfinished == 11

    using(store, body)
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


def test_no_operation_looks_at_all_rows(path: Path) -> None:
    fill(path, 1)
    db = sqlite3.connect(path)
    texts = {name: value for name, value in vars(tables).items() if isinstance(value, str)}
    queries = {name: text for name, text in texts.items() if re.match(r"_[A-Z]+$", name)}
    assert len(queries) == 8
    for name, query in queries.items():
        values = (1,) * (1 if "?1" in query else query.count("?"))
        plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {query}", values)]
        assert not [step for step in plan if "SCAN" in step or "TEMP" in step], (name, plan)
    db.close()
