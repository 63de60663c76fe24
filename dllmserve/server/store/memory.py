"""A job store in this process's memory."""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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
from dllmserve.server.store.holdings import Holdings


@dataclass
class _Shelf:
    """What one owner holds: ids, with their number in the order in which they are dropped.

    They are OrderedDicts, because taking the first item of a dict gets slower with every item that
    was removed before it.
    """

    unread: OrderedDict[int, int] = field(default_factory=OrderedDict)
    read: OrderedDict[int, int] = field(default_factory=OrderedDict)
    tombstones: OrderedDict[int, int] = field(default_factory=OrderedDict)

    def victim(self) -> tuple[bool, int, int]:
        """The result to drop first: whether it is unread, its number in the order, its id."""
        unread = not self.read
        id, place = next(iter((self.unread if unread else self.read).items()))
        return unread, place, id

    def oldest(self) -> tuple[int, int]:
        """The oldest tombstone: its number in the order, its id."""
        id, place = next(iter(self.tombstones.items()))
        return place, id


class MemoryStore:
    """A :class:`~dllmserve.server.store.base.JobStore` that ends with its process.

    Ids start from 0 again in the next process. ``open`` and ``close`` do nothing.

    Args:
        limits: bounds of what is kept; None takes the defaults.
    """

    def __init__(self, limits: StoreLimits | None = None) -> None:
        self._limits = limits or StoreLimits()
        self._waiting: OrderedDict[int, JobRecord] = OrderedDict()
        self._results: dict[int, Stored] = {}
        self._tombstones: dict[int, Gone] = {}
        #: one for each owner that has sent a job, so at most one for each key
        self._shelves: defaultdict[str, _Shelf] = defaultdict(_Shelf)
        self._held: Holdings[str] = Holdings()
        self._next_id = self._last_place = 0
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
        self._results[id] = Stored(replace(record, request=b""), result)
        self._shelves[record.owner].unread[id] = self._place()
        self._held.add(record.owner, results=1, bytes=result_size(result))
        while what := self._limits.exceeded(self._held):
            unread, _, victim = min(self._shelves[o].victim() for o in self._held.most(what))
            self._drop(victim, "evicted_unread" if unread else "evicted_read")
        return True

    async def find(self, id: int) -> Stored | Gone | None:
        """Return the job, why it is gone, or None."""
        if (record := self._waiting.get(id)) is not None:
            return Stored(record, None)
        return self._results.get(id) or self._tombstones.get(id)

    async def mark_read(self, id: int) -> None:
        """Note that a result was delivered; it is then evicted before unread ones."""
        stored = self._results.get(id)
        if stored is not None:
            shelf = self._shelves[stored.record.owner]
            if shelf.unread.pop(id, None) is not None:
                shelf.read[id] = self._place()

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
            for id, stored in self._results.items()
            if stored.result is not None and stored.result.finished <= oldest
        ]
        for _, id in sorted(expired):
            self._drop(id, "expired")

    def clock(self) -> float:
        """Seconds of this process."""
        return time.monotonic()

    def stats(self) -> StoreStats:
        """Counts, from memory."""
        results, size = self._held.total("results"), self._held.total("bytes")
        return StoreStats(results, size, len(self._waiting), dict(self._evicted))

    def _has(self, id: int) -> bool:
        return id in self._waiting or id in self._results

    def _place(self) -> int:
        self._last_place += 1
        return self._last_place

    def _drop(self, id: int, reason: DropReason) -> None:
        """Replace a job that is there with its tombstone."""
        record = self._waiting.pop(id, None)
        if record is None:
            stored = self._results.pop(id)
            record = stored.record
            shelf = self._shelves[record.owner]
            if shelf.unread.pop(id, None) is None:
                del shelf.read[id]
            size = result_size(stored.result) if stored.result else 0
            self._held.add(record.owner, results=-1, bytes=-size)
        self._evicted[reason] += 1
        self._tombstones[id] = Gone(DROP_REASONS[reason], record.owner)
        self._shelves[record.owner].tombstones[id] = self._place()
        self._held.add(record.owner, tombstones=1)
        while self._held.total("tombstones") > self._limits.max_tombstones:
            owners = self._held.most("tombstones")
            _, oldest, owner = min((*self._shelves[o].oldest(), o) for o in owners)
            del self._tombstones[oldest], self._shelves[owner].tombstones[oldest]
            self._held.add(owner, tombstones=-1)
