"""A job store in SQLite: in a file, which outlives its server, or in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dllmserve.errors import JobStoreError
from dllmserve.server.store.base import (
    DROP_REASONS,
    Gone,
    JobRecord,
    JobResult,
    Stored,
    StoreLimits,
    StoreStats,
)
from dllmserve.server.store.commits import GroupCommit
from dllmserve.server.store.files import DAMAGE, JobFile, MemoryFile, unusable
from dllmserve.server.store.tables import EXPIRE_CHUNK, Tables


class SqliteStore:
    """A :class:`~dllmserve.server.store.base.JobStore` in an SQLite file, or in memory.

    When an operation returns, its changes are on the disk (write-ahead log, synchronous=FULL). So
    they survive ``kill -9`` and a power cut. One server at a time can have the file open.

    Prompts and answers are sensitive, so only the file's user can read it. Deleted, evicted and
    expired jobs are overwritten with zeros (secure_delete, which costs nothing measurable here),
    and so is the request of a job that finishes. The write-ahead log, which holds copies, is
    emptied after a second without work and when the store is closed; without such a pause, a few
    megabytes of later writes replace the copies. This is not a guarantee: SQLite leaves traces in
    unused parts of pages that it rearranged, until they are written again, and so do file
    systems and disks. For a guarantee, encrypt the disk.

    Args:
        path: the file; it and its directory are made if they are missing. None keeps jobs in
            memory: they end with the process, and ids start from 0 in the next one.
        limits: bounds of what is kept; None takes the defaults. They are enforced when the store
            is opened, if they are lower than before.
        monotonic: returns seconds that only grow, for :meth:`clock`.
        began: the value of ``monotonic`` when the server began; None for when it opens the store.
    """

    def __init__(
        self,
        path: str | Path | None,
        limits: StoreLimits | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        began: float | None = None,
    ) -> None:
        self._limits = limits or StoreLimits()

        def opened() -> Tables:
            file = MemoryFile() if path is None else JobFile(Path(path))
            try:
                return Tables(file, self._limits, monotonic, began)
            except (*DAMAGE, JobStoreError) as error:
                file.close()
                raise unusable(file.path, error) from error

        self._commits = GroupCommit(str(path or "in memory"), opened)
        self._tables: Tables | None = None

    async def open(self) -> None:
        """Open the file, at most once.

        Raises:
            ConfigError: another server has the file, other users can access it, or it is no job
                store, of a newer version, damaged, or cannot be written. It is never replaced.
        """
        self._tables = await self._commits.start()

    async def close(self) -> None:
        """Finish all operations and close the file. Safe to call twice."""
        await self._commits.stop()

    async def reserve_ids(self, count: int) -> list[int]:
        """Return ``count`` consecutive ids that were never given from this file."""
        return await self._commits.run(lambda tables: tables.reserve_ids(count))

    async def insert(self, records: Sequence[JobRecord]) -> None:
        """Store all records or none. Raises JobIdTaken or ValueError for their ids."""
        await self._commits.run(lambda tables: tables.insert(records))

    async def unfinished(self) -> list[JobRecord]:
        """Jobs without a result, the one accepted first in front."""
        return await self._commits.run(lambda tables: tables.unfinished())

    async def finish(self, id: int, result: JobResult) -> bool:
        """Give a job its result; False if there is no such unfinished job."""
        return await self._commits.run(lambda tables: tables.finish(id, result))

    async def find(self, id: int) -> Stored | Gone | None:
        """Return the job, why it is gone, or None."""
        return await self._commits.run(lambda tables: tables.find(id))

    async def mark_read(self, id: int) -> None:
        """Note that a result was delivered; it is then evicted before unread ones."""
        await self._commits.run(lambda tables: tables.mark_read(id))

    async def delete(self, id: int) -> bool:
        """Drop a job, finished or not, and leave a tombstone. False if it is not there."""
        return await self._commits.run(lambda tables: tables.delete(id))

    async def expire(self, now: float) -> None:
        """Drop results that are past their ttl at ``now`` (unix seconds)."""
        oldest = now - self._limits.ttl_s
        while await self._commits.run(lambda tables: tables.expire(oldest)) == EXPIRE_CHUNK:
            continue

    def clock(self) -> float:
        """Seconds of a clock that stands still while no server has the file."""
        if self._tables is None:
            raise JobStoreError("the job store is not open")
        return self._tables.lease.now()

    def stats(self) -> StoreStats:
        """Counts as of the last commit, from memory."""
        if self._tables is None:
            return StoreStats(0, 0, 0, dict.fromkeys(DROP_REASONS, 0))
        return self._tables.stats
