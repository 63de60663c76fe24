"""The file of a SqliteStore: found fit for use or refused, owned by one server at a time."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
from pathlib import Path

from dllmserve.errors import ConfigError

#: "dllm" in the header of the file says whose it is
APPLICATION_ID = 0x646C6C6D
SCHEMA_VERSION = 1

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
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)

_ANOTHER = "give another file with --job-store"


class JobFile:
    """An open, locked database with the schema above.

    The lock is on a ``.lock`` file beside the database, which stays there. It belongs to the
    process: however that ends, the lock is gone. The connection belongs to the thread that
    made this object.

    Args:
        path: the database; made with its directory, readable for this user only, if missing.

    Raises:
        ConfigError: another server has it, or it is no job store, too new, or damaged. Nothing
            in it was changed then.
    """

    def __init__(self, path: Path) -> None:
        # two names of one file need one lock
        self.path = path.expanduser().resolve()
        try:
            self._make()
            self._lock = _lock(self.path)
            try:
                self.db = _connect(self.path)
            except BaseException:
                os.close(self._lock)
                raise
        except OSError as error:
            reason = f"{error.strerror}: {error.filename}" if error.filename else str(error)
            message = f"the job store {self.path} cannot be opened: {reason}; {_ANOTHER}"
            raise ConfigError(message) from error

    def close(self) -> None:
        """Close the database, then let others have it."""
        try:
            self.db.close()
        finally:
            os.close(self._lock)

    def _make(self) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError("not a regular file")
        finally:
            os.close(file)


def _lock(path: Path) -> int:
    """Take the lock of a database; returns the descriptor that holds it."""
    beside = path.with_name(path.name + ".lock")
    file = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as error:
        owner = os.pread(file, 32, 0).decode("ascii", "replace").strip()
        os.close(file)
        raise _in_use(path, f" (process {owner})" if owner.isdecimal() else "") from error
    except OSError:
        os.close(file)
        raise
    return file


def _connect(path: Path) -> sqlite3.Connection:
    """Open the database, check it, and make its tables if it is new."""
    db = sqlite3.connect(path, isolation_level=None, timeout=0)
    try:
        # exclusive also keeps SQLite from mapping shared memory, which kills on a full disk
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        fresh = _check(db, path)
        path.chmod(0o600)
        if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise ConfigError(f"the job store {path} cannot use write-ahead logging; {_ANOTHER}")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA secure_delete = ON")
        db.execute("PRAGMA temp_store = MEMORY")
        if fresh:
            db.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA:
                db.execute(statement)
            db.execute("COMMIT")
            _sync(path.parent)
    except sqlite3.Error as error:
        db.close()
        raise unusable(path, error) from error
    except BaseException:
        db.close()
        raise
    return db


def _check(db: sqlite3.Connection, path: Path) -> bool:
    """Refuse what is not a sound job store of a known version. True if it is empty."""
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
    (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise _damaged(path, verdict)
    return False


def unusable(path: Path, error: sqlite3.Error) -> ConfigError:
    """What an error of SQLite means while a store is being opened."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return _in_use(path, "")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return _damaged(path, str(error))
    return ConfigError(f"the job store {path} cannot be opened: {error}; {_ANOTHER}")


def _in_use(path: Path, who: str) -> ConfigError:
    return ConfigError(
        f"the job store {path} is in use by another server{who}; stop that one, or {_ANOTHER}"
    )


def _damaged(path: Path, detail: str) -> ConfigError:
    detail = " ".join(detail.split())
    return ConfigError(
        f"the job store {path} is damaged, or no job store ({detail}); it was left as it is. "
        f"Restore it, move it away and lose its jobs, or {_ANOTHER}"
    )


def _sync(directory: Path) -> None:
    """Make a new file's name last."""
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
