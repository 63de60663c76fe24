"""The file of a SqliteStore: checked before it is used, and owned by one server at a time."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from dllmserve._checks import user_path
from dllmserve.errors import ConfigError, JobStoreError
from dllmserve.server.private_files import Folder, SharedDirectoryError, restrict
from dllmserve.server.store.lease import MAKE_ALIVE
from dllmserve.server.store.rows import check_rows

#: "dllm", which marks the file as a job store of dllmserve
APPLICATION_ID = 0x646C6C6D
_APPLICATION_ID_AT = 68
SCHEMA_VERSION = 1

#: tables and indexes that stores of an older dllmserve lack; it updates those that it finds
ADDED = {
    "alive": MAKE_ALIVE,
    "jobs_by_owner": "CREATE INDEX IF NOT EXISTS jobs_by_owner ON jobs (owner, state, place)",
    "tombstones_by_owner": "CREATE INDEX IF NOT EXISTS tombstones_by_owner ON tombstones (owner)",
}
#: ``place`` orders the jobs of one state: by acceptance, by their end, by when they were read
SCHEMA = (
    """CREATE TABLE jobs (
        id INTEGER PRIMARY KEY,
        state INTEGER NOT NULL,
        place INTEGER NOT NULL,
        owner BLOB NOT NULL,
        model BLOB NOT NULL,
        created REAL NOT NULL,
        deadline REAL NOT NULL,
        request BLOB,
        status TEXT,
        text BLOB,
        error BLOB,
        details BLOB,
        finished REAL,
        size INTEGER NOT NULL DEFAULT 0
    )""",
    "CREATE INDEX jobs_by_place ON jobs (state, place)",
    "CREATE INDEX jobs_by_end ON jobs (finished) WHERE finished IS NOT NULL",
    """CREATE TABLE tombstones (
        place INTEGER PRIMARY KEY,
        id INTEGER NOT NULL UNIQUE,
        reason TEXT NOT NULL,
        owner BLOB NOT NULL
    )""",
    "CREATE TABLE next_id (id INTEGER NOT NULL)",
    "INSERT INTO next_id VALUES (0)",
    *ADDED.values(),
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)

#: errors that Python's sqlite3 raises for a damaged file
DAMAGE = (sqlite3.Error, UnicodeDecodeError, MemoryError)
#: the endings of the names of a database's files; the last is that of the database itself
_ENDINGS = ("-wal", "-shm", "-journal", "")

_ANOTHER = "give another file with --job-store"
#: before Python 3.12, SQLite cannot be told to keep the log when it closes a file
_KEPT = (
    "it was left as it is"
    if sys.version_info >= (3, 12)
    else "nothing was changed, but its log, if it had one, may be part of it now"
)


class JobFile:
    """An open, locked database with the schema above.

    All of its files belong to this user alone, in a directory that nobody else can change; see
    :mod:`dllmserve.server.private_files`. The lock is on a ``.lock`` file beside the database, and
    it stays. The lock belongs to the process, so it is gone when the process ends, in whatever
    way. The connection belongs to the thread that made this object.

    Args:
        path: the database; made with its directory, readable for this user only, if missing.

    Raises:
        ConfigError: another server has the file, other users can access it, or it is no job
            store, too new, or damaged. Nothing in it was changed then; before Python 3.12 SQLite
            may have merged its write-ahead log into it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = user_path(path)
        with ExitStack() as stack:
            try:
                self._folder = Folder(path.parent)
                stack.callback(self._folder.close)
                if not path.name or path.is_dir():  # before a lock is made for it
                    raise OSError(f"{path} is a directory")
                self.path = self._folder.path / path.name
                files: list[int] = []
                for ending in _ENDINGS:
                    files += self._folder.existing(path.name + ending, stack)
                self._lock(stack)
                # the database stays open here as well: closing it would release SQLite's locks
                files.append(self._folder.keep(path.name, stack))
                self._refuse_lost_log(files[-1])
                self.db = self._connect(files)
            except OSError as error:
                raise self._unfit(error) from error
            self._held = stack.pop_all()

    def close(self) -> None:
        """Close the database, then release the lock."""
        try:
            self.db.close()
        finally:
            self._held.close()

    def _lock(self, stack: ExitStack) -> None:
        """Take the lock; the stack releases it."""
        file = self._folder.keep(f"{self.path.name}.lock", stack)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(file, 32, 0).decode("ascii", "replace").strip()
            who = f" (process {owner})" if owner.isdecimal() else ""
            raise _in_use(self.path, who) from error
        restrict([file])
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)

    def _refuse_lost_log(self, file: int) -> None:
        """Refuse an empty database beside a log: it is damaged, and SQLite would delete the log."""
        log = self._folder.path / f"{self.path.name}-wal"
        if not os.fstat(file).st_size and log.exists() and log.stat().st_size:
            raise _damaged(self.path, f"it is empty, and {log.name} is not")

    def _unfit(self, error: OSError) -> ConfigError:
        reason = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        way_out = _ANOTHER
        if isinstance(error, SharedDirectoryError) and error.sticky:
            own = error.directory / f"dllmserve-{os.geteuid()}" / self.path.name
            way_out += f", such as {own}: its directory is made for this user alone"
        elif isinstance(error, SharedDirectoryError):
            reason += f" (chmod go-w {error.directory} ends that)"
        return ConfigError(f"the job store {self.path} cannot be opened: {reason}; {way_out}")

    def _connect(self, files: Sequence[int]) -> sqlite3.Connection:
        """Open the database, check it, and make its tables if it is new."""
        path = self.path
        if os.pread(files[-1], 4, _APPLICATION_ID_AT) == APPLICATION_ID.to_bytes(4, "big"):
            restrict(files)  # before SQLite makes a log with the rights of the database
        db = sqlite3.connect(path, isolation_level=None, timeout=0)
        try:
            # invalid texts are found by the check of the values
            db.text_factory = lambda text: text.decode("utf-8", "replace")
            # exclusive also keeps SQLite from mapping shared memory, which kills on a full disk
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            _keep_log(db, True)  # in case the file is refused
            fresh = _check(db, path)
            _keep_log(db, False)
            if not self._folder.holds(path.name, files[-1]):
                raise OSError("another file was put in its place")
            with ExitStack() as stack:
                log = self._folder.existing(f"{path.name}-wal", stack)
                restrict([*files, *log])
            if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                raise ConfigError(
                    f"the job store {path} cannot use write-ahead logging; {_ANOTHER}"
                )
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA secure_delete = ON")
            db.execute("PRAGMA temp_store = MEMORY")
            if fresh:
                _make(db)
                self._folder.sync()
            for statement in ADDED.values():
                db.execute(statement)
        except DAMAGE as error:
            db.close()
            raise unusable(path, error) from error
        except BaseException:
            db.close()
            raise
        return db


class MemoryFile:
    """The same database in memory, which ends when it is closed."""

    path = Path(":memory:")

    def __init__(self) -> None:
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        _make(self.db)

    def close(self) -> None:
        """Free the database."""
        self.db.close()


def _keep_log(db: sqlite3.Connection, keep: bool) -> None:
    """Set whether the write-ahead log stays when the database is closed (from Python 3.12 on)."""
    if sys.version_info >= (3, 12):
        db.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, keep)


def _make(db: sqlite3.Connection) -> None:
    """Make the tables."""
    db.execute("BEGIN IMMEDIATE")
    for statement in SCHEMA:
        db.execute(statement)
    db.execute("COMMIT")


def _check(db: sqlite3.Connection, path: Path) -> bool:
    """Refuse a file that is not a sound job store of a known version. True if it is empty."""
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not (application or version or tables):
        return True
    if application != APPLICATION_ID:
        raise ConfigError(
            f"{path} is a database of something else, not a job store of dllmserve; {_ANOTHER}"
        )
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"the job store {path} has version {version} and this dllmserve knows "
            f"{SCHEMA_VERSION}; use the newer dllmserve that wrote it, or {_ANOTHER}"
        )
    # this checks the indexes as well, which eviction and expiry rely on
    (verdict,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok":
        raise _damaged(path, verdict)
    _check_schema(db, path)
    try:
        check_rows(db)
    except JobStoreError as error:
        raise _damaged(path, str(error)) from error
    return False


def _check_schema(db: sqlite3.Connection, path: Path) -> None:
    """Refuse tables and indexes that are not exactly those above."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as made:
        _make(made)
        known = _objects(made)
    found = _objects(db)
    every = known.keys() | found.keys()
    for name in sorted(every, key=lambda name: (name.startswith("sqlite_"), name)):
        if known.get(name) != found.get(name) and (name not in ADDED or name in found):
            what = "missing" if name not in found else "not as it should be"
            raise _damaged(path, f"{name!r} is {what if name in known else 'not part of one'}")


def _objects(db: sqlite3.Connection) -> dict[str, str]:
    """The statements that made the tables, indexes and the like, by name."""
    query = (
        "SELECT name, type || ' of ' || tbl_name || ': ' || coalesce(sql, '') FROM sqlite_master"
    )
    return {name: " ".join(made.split()) for name, made in db.execute(query)}


def unusable(path: Path, error: Exception) -> ConfigError:
    """The ConfigError for an error of SQLite while a store is being opened."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return _in_use(path, "")
    bad = code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    if bad or not isinstance(error, sqlite3.Error):
        return _damaged(path, str(error))
    return ConfigError(f"the job store {path} cannot be opened: {error}; {_ANOTHER}")


def _in_use(path: Path, who: str) -> ConfigError:
    return ConfigError(
        f"the job store {path} is in use by another server{who}; stop that one, or {_ANOTHER}"
    )


def _damaged(path: Path, detail: str) -> ConfigError:
    detail = " ".join(detail.split())
    return ConfigError(
        f"the job store {path} is damaged, or no job store ({detail}); {_KEPT}. "
        f"Restore it, move it away and lose its jobs, or {_ANOTHER}"
    )
