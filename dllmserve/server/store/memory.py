"""A job store in this process's memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from dllmserve.server.store.base import (
    DROP_REASONS,
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
    result_size,
)


class MemoryStore:
    """A :class:`~dllmserve.server.store.base.JobStore` that ends with its process.

    Ids start from 0 again in the next process. ``open`` and ``close`` do nothing.

    Args:
        limits: bounds of what is kept; None takes the defaults.
    """

    def __init__(self, limits: StoreLimits | None = None) -> None:
        self._limits = limits or StoreLimits()
        # the front of each is what goes first; OrderedDict, as taking the first item of a
        # dict gets slower with every item that was removed before it
        self._waiting: OrderedDict[int, JobRecord] = OrderedDict()
        self._unread: OrderedDict[int, Stored] = OrderedDict()
        self._read: OrderedDict[int, Stored] = OrderedDict()
        self._tombstones: OrderedDict[int, Gone] = OrderedDict()
        self._bytes = 0
        self._next_id = 0
        self._evicted: dict[DropReason, int] = dict.fromkeys(DROP_REASONS, 0)

    async def open(self) -> None:
        """There is nothing to open."""

    async def close(self) -> None:
        """There is nothing to close."""

    async def reserve_ids(self, count: int) -> list[int]:
        """Return ``count`` consecutive ids that this process has not given before."""
        check_count(count)
        first, self._next_id = self._next_id, self._next_id + count
        return list(range(first, self._next_id))

    async def insert(self, records: Sequence[JobRecord]) -> None:
        """Store all records or none. Raises JobIdTaken or ValueError for their ids."""
        check_new(records)
        for record in records:
            if record.id in self._tombstones or self._has(record.id):
                raise JobIdTaken(f"job id {record.id} is taken")
        self._waiting.update((record.id, record) for record in records)

    async def unfinished(self) -> list[JobRecord]:
        """Jobs without a result, the one accepted first in front."""
        return list(self._waiting.values())

    async def finish(self, id: int, result: JobResult) -> bool:
        """Give a job its result; False if there is no such unfinished job."""
        record = self._waiting.pop(id, None)
        if record is None:
            return False
        self._unread[id] = Stored(replace(record, request=b""), result)
        self._bytes += result_size(result)
        while self._limits.exceeded(len(self._unread) + len(self._read), self._bytes):
            if self._read:
                self._drop(next(iter(self._read)), "evicted_read")
            else:
                self._drop(next(iter(self._unread)), "evicted_unread")
        return True

    async def find(self, id: int) -> Stored | Gone | None:
        """Return the job, why it is gone, or None."""
        if (record := self._waiting.get(id)) is not None:
            return Stored(record, None)
        return self._unread.get(id) or self._read.get(id) or self._tombstones.get(id)

    async def mark_read(self, id: int) -> None:
        """Note that a result was delivered; it is then evicted before unread ones."""
        if (stored := self._unread.pop(id, None)) is not None:
            self._read[id] = stored

    async def delete(self, id: int) -> bool:
        """Drop a job, finished or not, and leave a tombstone. False if it is not there."""
        if there := self._has(id):
            self._drop(id, "deleted")
        return there

    async def expire(self, now: float) -> None:
        """Drop results that are past their ttl at ``now`` (unix seconds)."""
        oldest = now - self._limits.ttl_s
        expired = [
            (stored.result.finished, id)
            for part in (self._read, self._unread)
            for id, stored in part.items()
            if stored.result is not None and stored.result.finished <= oldest
        ]
        for _, id in sorted(expired):
            self._drop(id, "expired")

    def clock(self) -> float:
        """Seconds of this process."""
        return time.monotonic()

    def stats(self) -> StoreStats:
        """Counts, from memory."""
        results = len(self._unread) + len(self._read)
        return StoreStats(results, self._bytes, len(self._waiting), dict(self._evicted))

    def _has(self, id: int) -> bool:
        return id in self._waiting or id in self._unread or id in self._read

    def _drop(self, id: int, reason: DropReason) -> None:
        """Replace a job that is there with its tombstone."""
        record = self._waiting.pop(id, None)
        if record is None:
            stored = self._read.pop(id, None) or self._unread.pop(id)
            record = stored.record
            self._bytes -= result_size(stored.result) if stored.result else 0
        self._evicted[reason] += 1
        self._tombstones[id] = Gone(DROP_REASONS[reason], record.owner)
        while len(self._tombstones) > self._limits.max_tombstones:
            self._tombstones.popitem(last=False)
