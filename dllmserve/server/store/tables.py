"""The SQL of a job store: one connection, one thread, plain calls inside of transactions."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from dllmserve.errors import JobStoreError
from dllmserve.server.store.base import (
    DROP_REASONS,
    MAX_JOB_ID,
    DropReason,
    Gone,
    JobIdTaken,
    JobRecord,
    JobResult,
    Stored,
    StoreLimits,
    StoreStats,
    check_count,
    check_new,
    encode,
)
from dllmserve.server.store.files import JobFile, MemoryFile
from dllmserve.server.store.holdings import Holdings
from dllmserve.server.store.lease import Lease
from dllmserve.server.store.rows import JOB, READ, UNFINISHED, UNREAD, read_gone, read_job

#: seconds without work after which the log of the file is emptied
TIDY_AFTER_S = 1.0
#: seconds between attempts to renew a lease that the disk refuses
_RETRY_S = 0.1
#: jobs that one call of expire drops, so that other operations get their turn in between
EXPIRE_CHUNK = 1000

_TAKEN = "SELECT 1 FROM jobs WHERE id = ?1 UNION ALL SELECT 1 FROM tombstones WHERE id = ?1"
_INSERT = """INSERT INTO jobs (id, state, place, owner, model, created, deadline, request)
    VALUES (?, 0, ?, ?, ?, ?, ?, ?)"""
_UNFINISHED = f"SELECT {JOB} FROM jobs WHERE state = 0 ORDER BY place"
_FINISH = """UPDATE jobs SET state = 1, place = ?, request = NULL, status = ?, text = ?,
    error = ?, details = ?, finished = ?, size = ? WHERE id = ?"""
_FIND = f"SELECT {JOB} FROM jobs WHERE id = ?"
_VICTIM = """SELECT id, owner, size, state, place FROM jobs
    WHERE owner = ? AND state = ? ORDER BY place LIMIT 1"""
_EXPIRED = """SELECT id, owner, size, state FROM jobs WHERE finished <= ?
    ORDER BY finished, id LIMIT ?"""
_OLDEST = "SELECT place, owner FROM tombstones WHERE owner = ? ORDER BY place LIMIT 1"

#: id, owner, size and state of a job that is to be dropped
_Row = tuple[int, bytes, int, int]


@dataclass
class _Counts:
    """Running totals, so that rows need not be counted; a rollback restores them as well."""

    held: Holdings = field(default_factory=Holdings)
    unfinished: int = 0
    place: int = 0
    evicted: dict[DropReason, int] = field(default_factory=lambda: dict.fromkeys(DROP_REASONS, 0))

    def copy(self) -> _Counts:
        return replace(self, held=self.held.copy(), evicted=dict(self.evicted))


class Tables:
    """The operations of a job store on an open file.

    All operations are called between :meth:`begin` and :meth:`commit` or :meth:`rollback`. An
    operation that refuses (with a DllmServeError) does so before it writes anything.

    Attributes:
        stats: as of the last commit; may be read from any thread.
        untidy: whether the log of the file may hold what was deleted.
        lease: how long servers have had the file.
    """

    stats: StoreStats

    def __init__(
        self,
        file: JobFile | MemoryFile,
        limits: StoreLimits,
        monotonic: Callable[[], float] = time.monotonic,
        began: float | None = None,
    ) -> None:
        self._file = file
        self._db = file.db
        self._limits = limits
        self.untidy = True
        self._now = self._count()
        self._saved = self._now
        self.begin()
        self.lease = Lease(self._db, monotonic, began)
        # the limits may be lower than those of the server that wrote the file
        self._enforce()
        self._trim()
        self.commit()

    def begin(self) -> None:
        """Start a transaction."""
        if self._db.in_transaction:  # an earlier rollback has failed
            self._db.execute("ROLLBACK")
        self._saved = self._now.copy()
        self._writes = self._db.total_changes
        self._db.execute("BEGIN IMMEDIATE")

    def commit(self) -> bool:
        """Commit the transaction. Returns whether it wrote anything besides the lease."""
        now, lease = self._now, self.lease
        wrote = self._db.total_changes != self._writes
        until = lease.renew() if wrote else lease.until
        self._db.execute("COMMIT")
        lease.until = until
        results, size = now.held.total("results"), now.held.total("bytes")
        self.stats = StoreStats(results, size, now.unfinished, dict(now.evicted))
        self.untidy = self.untidy or wrote
        return wrote

    def rollback(self) -> None:
        """Undo the transaction."""
        self._now = self._saved
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    @property
    def patience(self) -> float | None:
        """Seconds to wait for an operation before maintenance is due; None if none will be due."""
        if self._now.unfinished:
            # never 0, even if the lease is due: a full disk may refuse to renew it again and again
            return min(TIDY_AFTER_S, max(self.lease.left, _RETRY_S))
        return TIDY_AFTER_S if self.untidy else None

    def tidy(self) -> None:
        """Move the log into the file and empty the log, where texts of deleted jobs may be left."""
        if self.untidy:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self.untidy = False

    def renew(self) -> None:
        """Renew the lease, if that is due and a job's time counts by it."""
        if self._now.unfinished and not self.lease.left:
            self.begin()
            until = self.lease.renew()
            self._db.execute("COMMIT")
            self.lease.until = until

    def close(self) -> None:
        """End the lease and close the file."""
        try:
            # a full disk must not prevent the end; jobs then lose what is left of the lease
            with suppress(sqlite3.Error):
                self.begin()
                self.lease.end()
                self._db.execute("COMMIT")
        finally:
            self._file.close()

    def reserve_ids(self, count: int) -> list[int]:
        """Take the next ids."""
        check_count(count)
        (first,) = self._one("SELECT id FROM next_id")
        if first + count > MAX_JOB_ID + 1:
            raise JobStoreError(f"the sequential job ids are used up: {first} of {MAX_JOB_ID + 1}")
        self._db.execute("UPDATE next_id SET id = ?", (first + count,))
        return list(range(first, first + count))

    def insert(self, records: Sequence[JobRecord]) -> None:
        """Add unfinished jobs, all or none."""
        check_new(records)
        for record in records:
            if self._one(_TAKEN, (record.id,)):
                raise JobIdTaken(f"job id {record.id} is taken")
        for r in records:
            row = (r.id, self._place(), encode(r.owner), encode(r.model), r.created, r.deadline)
            self._db.execute(_INSERT, (*row, r.request))
        self._now.unfinished += len(records)

    def unfinished(self) -> list[JobRecord]:
        """Unfinished jobs in the order of their acceptance."""
        return [read_job(row).record for row in self._db.execute(_UNFINISHED)]

    def finish(self, id: int, result: JobResult) -> bool:
        """Give an unfinished job its result and enforce the limits."""
        waiting = self._one("SELECT owner FROM jobs WHERE id = ? AND state = 0", (id,))
        if waiting is None:
            return False
        text, error = encode(result.text), encode(result.error)
        size = len(text or b"") + len(error or b"") + len(result.details)
        row = (self._place(), result.status, text, error, result.details, result.finished, size)
        self._db.execute(_FINISH, (*row, id))
        self._now.unfinished -= 1
        self._now.held.add(waiting[0], results=1, bytes=size)
        self._enforce()
        return True

    def find(self, id: int) -> Stored | Gone | None:
        """Look in the jobs, then in the tombstones."""
        if row := self._one(_FIND, (id,)):
            return read_job(row)
        row = self._one("SELECT id, reason, owner FROM tombstones WHERE id = ?", (id,))
        return read_gone(*row) if row else None

    def mark_read(self, id: int) -> None:
        """Put a result behind those that were read before."""
        self._db.execute(
            "UPDATE jobs SET state = 2, place = ? WHERE id = ? AND state = 1", (self._place(), id)
        )

    def delete(self, id: int) -> bool:
        """Drop one job."""
        row = self._one("SELECT id, owner, size, state FROM jobs WHERE id = ?", (id,))
        self._drop([row] if row else [], "deleted")
        return row is not None

    def expire(self, oldest: float) -> int:
        """Drop results of jobs that finished before, EXPIRE_CHUNK of them. Returns how many."""
        rows = self._db.execute(_EXPIRED, (oldest, EXPIRE_CHUNK)).fetchall()
        self._drop(rows, "expired")
        return len(rows)

    def _enforce(self) -> None:
        """Evict until the limits hold."""
        held = self._now.held
        while what := self._limits.exceeded(held):
            victims = [self._victim(owner) for owner in held.most(what)]
            row = min(victims, key=lambda row: (row[3] != READ, row[4]))
            self._drop([row[:4]], "evicted_read" if row[3] == READ else "evicted_unread")

    def _victim(self, owner: bytes) -> Any:
        """The row of the result that an owner loses first; its place is the last column."""
        return self._one(_VICTIM, (owner, READ)) or self._one(_VICTIM, (owner, UNREAD))

    def _drop(self, rows: Sequence[_Row], reason: DropReason) -> None:
        """Replace jobs with tombstones."""
        now = self._now
        insert = "INSERT INTO tombstones (id, reason, owner) VALUES (?, ?, ?)"
        for id, owner, size, state in rows:
            self._db.execute("DELETE FROM jobs WHERE id = ?", (id,))
            self._db.execute(insert, (id, DROP_REASONS[reason], owner))
            now.evicted[reason] += 1
            now.held.add(owner, tombstones=1)
            if state == UNFINISHED:
                now.unfinished -= 1
            else:
                now.held.add(owner, results=-1, bytes=-size)
            self._trim()

    def _trim(self) -> None:
        """Drop tombstones above their limit: the oldest of the owner who has most of them."""
        held = self._now.held
        while held.total("tombstones") > self._limits.max_tombstones:
            oldest = (self._one(_OLDEST, (owner,)) for owner in held.most("tombstones"))
            place, owner = min(oldest)
            self._db.execute("DELETE FROM tombstones WHERE place = ?", (place,))
            held.add(owner, tombstones=-1)

    def _place(self) -> int:
        self._now.place += 1
        return self._now.place

    def _count(self) -> _Counts:
        """Count what the file holds; the only time that all rows are looked at."""
        counts = _Counts()
        query = (
            "SELECT owner, state, count(*), sum(size), max(place) FROM jobs GROUP BY owner, state"
        )
        for owner, state, jobs, size, place in self._db.execute(query):
            if state == UNFINISHED:
                counts.unfinished += jobs
            else:
                counts.held.add(owner, results=jobs, bytes=size)
            counts.place = max(counts.place, place)
        for owner, dropped in self._db.execute(
            "SELECT owner, count(*) FROM tombstones GROUP BY owner"
        ):
            counts.held.add(owner, tombstones=dropped)
        return counts

    def _one(self, query: str, values: tuple[Any, ...] = ()) -> Any:
        return self._db.execute(query, values).fetchone()
