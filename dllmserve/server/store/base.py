"""What every job store promises, and the records that go in and out.

Rules that hold for all of them:

- Reading never deletes.
- A result is kept for ``ttl_s`` seconds after its job finished. Above a limit (results or bytes),
  the owner who holds most loses a result: first those that were read, in the order of reading,
  then the others, in the order of finishing. So an owner who holds less than an equal share never
  loses a result to others. If several owners hold the same, the result that comes first in that
  order goes. An unfinished job is never evicted. ``finish`` enforces this in the same operation.
- A dropped job leaves a tombstone with the reason and the owner. So another owner can be told the
  same as for an id that was never issued. Above the limit on tombstones, the owner with
  most of them loses the oldest.
- The store compares no owners. The caller does, with ``Stored.record.owner`` and ``Gone.owner``.
- Orders (oldest first, finished first) are those of the calls. Unix times decide about the ttl, so
  a jump of the wall clock does not make new results the first to be evicted. The time limit of
  a job counts by the store's own clock. Jumps of the wall clock do not move it, and it stands still
  while no server has the store.
- An operation takes place or not as a whole, in the order of the calls. Cancelling the ``await``
  does not undo it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from dllmserve._checks import check_float, check_int
from dllmserve.errors import ConfigError, JobStoreError
from dllmserve.server.store.holdings import Holdings

#: largest id: JavaScript and jq lose integers above it
MAX_JOB_ID = 2**53 - 1

JobStatus = Literal["finished", "failed", "cancelled"]
GoneReason = Literal["expired", "evicted", "deleted"]
DropReason = Literal["expired", "evicted_read", "evicted_unread", "deleted"]

#: why jobs are dropped, in the words of the counters -> in the words of a tombstone
DROP_REASONS: Mapping[DropReason, GoneReason] = {
    "expired": "expired",
    "evicted_read": "evicted",
    "evicted_unread": "evicted",
    "deleted": "deleted",
}


class JobIdTaken(JobStoreError):
    """An id of the inserted records belongs to a job, or to one that has left a tombstone.

    Nothing of that insert was stored. The caller draws other ids and tries again.
    """


@dataclass(frozen=True, slots=True)
class JobRecord:
    """An accepted job.

    Attributes:
        id: 0 to MAX_JOB_ID.
        owner: digest of the API key, "" without keys.
        model: name of the model that it is for.
        created: when it was accepted, by :meth:`JobStore.clock`.
        deadline: when its time is over, by the same clock.
        request: what it takes to run the job again, opaque to the store. It is dropped when the
            job finishes: prompts are not kept longer than needed.
    """

    id: int
    owner: str
    model: str
    created: float
    deadline: float
    request: bytes


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended.

    Attributes:
        status: "finished", "failed" or "cancelled".
        text: the answer, if there is one.
        error: the reason of a failure, in words for the client.
        details: more about the answer, opaque to the store.
        finished: unix seconds; the ttl counts from here.
    """

    status: JobStatus
    text: str | None
    error: str | None
    details: bytes
    finished: float


@dataclass(frozen=True, slots=True)
class Stored:
    """A job that is there; ``result`` is None until it finishes, ``record.request`` b"" after."""

    record: JobRecord
    result: JobResult | None


@dataclass(frozen=True, slots=True)
class Gone:
    """A job that was dropped: the reason, and its owner."""

    reason: GoneReason
    owner: str


@dataclass(frozen=True)
class StoreLimits:
    """Bounds of what a store keeps.

    Attributes:
        ttl_s: seconds from the end of a job until its result expires.
        max_results: finished jobs.
        max_bytes: bytes of their texts (UTF-8), errors and details. A single result above it is
            evicted at once.
        max_tombstones: dropped jobs that are remembered.

    Raises:
        ConfigError: (a ValueError) a wrong value or type.
    """

    ttl_s: float = 600.0
    max_results: int = 10_000
    max_bytes: int = 64 << 20
    max_tombstones: int = 65_536

    def __post_init__(self) -> None:
        check_float(ConfigError, "ttl_s", self.ttl_s, 0.0, low_open=True)
        check_int(ConfigError, "max_results", self.max_results, 1)
        check_int(ConfigError, "max_bytes", self.max_bytes, 1)
        check_int(ConfigError, "max_tombstones", self.max_tombstones, 0)

    def exceeded(self, held: Holdings) -> Literal["results", "bytes"] | None:
        """The first limit that is exceeded, or None."""
        if held.total("results") > self.max_results:
            return "results"
        return "bytes" if held.total("bytes") > self.max_bytes else None


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts of a store.

    Attributes:
        results: finished jobs that are kept.
        bytes: their size as ``StoreLimits.max_bytes`` counts it.
        unfinished: accepted jobs without a result.
        evicted: jobs dropped since the store was opened, by reason; all reasons are there.
    """

    results: int
    bytes: int
    unfinished: int
    evicted: Mapping[DropReason, int]


class JobStore(Protocol):
    """Keeps accepted jobs and their results until their retention ends.

    Every operation may raise :class:`~dllmserve.errors.JobStoreError` when the storage fails;
    it has then changed nothing, and a later one works as soon as the storage does.

    Example::

        store = SqliteStore(None, StoreLimits(ttl_s=60))
        await store.open()
        (job,) = await store.reserve_ids(1)
        await store.insert([JobRecord(job, "", "tiny", now, now + 600, b"...")])
        await store.finish(job, JobResult("finished", "Hi!", None, b"", now))
        stored = await store.find(job)
    """

    async def open(self) -> None:
        """Make the store ready. Raises ConfigError if it cannot be used."""

    async def reserve_ids(self, count: int) -> list[int]:
        """Return ``count`` consecutive ids, none of them ever given before.

        The first one ever is 0. A restart changes nothing about that, where there is a file.

        Raises:
            ValueError: ``count`` is below 0.
        """

    async def insert(self, records: Sequence[JobRecord]) -> None:
        """Store all records or none; they are durable when this returns.

        Raises:
            JobIdTaken: an id is not free, or is in ``records`` twice.
            ValueError: an id outside of 0 to MAX_JOB_ID.
        """

    async def unfinished(self) -> list[JobRecord]:
        """Jobs without a result, in the order of acceptance. Called at the start."""

    async def finish(self, id: int, result: JobResult) -> bool:
        """Give a job its result and drop its request; evict what exceeds the limits.

        Returns:
            False if there is no such unfinished job: it was deleted, or has a result.
        """

    async def find(self, id: int) -> Stored | Gone | None:
        """Return the job, why it is gone, or None if it was never issued or is forgotten."""

    async def mark_read(self, id: int) -> None:
        """Note that a result was delivered, so that it is evicted before unread ones.

        Only the first call per result changes anything. The note is a hint, so a caller that
        delivers a result may ignore a JobStoreError here.
        """

    async def delete(self, id: int) -> bool:
        """Drop a job, finished or not, and leave a tombstone. False if it is not there."""

    async def expire(self, now: float) -> None:
        """Drop results that are past their ttl at ``now`` (unix seconds)."""

    def clock(self) -> float:
        """Seconds in which servers had the store, plus any constant; it never goes back."""

    def stats(self) -> StoreStats:
        """Counts, from memory."""

    async def close(self) -> None:
        """Finish all operations and close the storage. Safe to call twice."""


def result_size(result: JobResult) -> int:
    """Bytes of a result that count against ``StoreLimits.max_bytes``.

    Example:
        >>> result_size(JobResult("finished", "naïve", None, b"12", 0.0))
        8
    """
    return len(encode(result.text) or b"") + len(encode(result.error) or b"") + len(result.details)


def encode(text: str | None) -> bytes | None:
    """UTF-8 of any str; JSON can carry lone surrogates, which plain UTF-8 refuses."""
    return None if text is None else text.encode("utf-8", "surrogatepass")


def check_new(records: Sequence[JobRecord]) -> None:
    """Check the ids of new records against their bounds and against each other.

    Raises:
        JobIdTaken: one is in the list twice.
        ValueError: one is outside of 0 to MAX_JOB_ID.
    """
    ids = set()
    for record in records:
        check_id(record.id)
        if record.id in ids:
            raise JobIdTaken(f"job id {record.id} is in one insert twice")
        ids.add(record.id)


def check_count(count: int) -> None:
    """Raise ValueError for a number of ids that cannot be reserved."""
    if count < 0:
        raise ValueError(f"the number of ids must be >= 0, got {count}")


def check_id(id: int) -> None:
    """Raise ValueError for an id outside of 0 to MAX_JOB_ID."""
    if not 0 <= id <= MAX_JOB_ID:
        raise ValueError(f"a job id must be in [0, {MAX_JOB_ID}], got {id}")
