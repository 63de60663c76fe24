"""A long stream of jobs: the bounds hold all the time and memory stays flat."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dllmserve.server.store import JobRecord, StoreLimits
from tests.server.store.jobs import answer, make_store, using

LIMITS = StoreLimits(ttl_s=2.0, max_results=2000, max_bytes=4 << 20, max_tombstones=4000)
CLIENTS = 32
PROMPTS = 4


@pytest.mark.parametrize(("kind", "jobs"), [("memory", 50_000), ("sqlite", 12_800)])
def test_memory_and_file_stay_flat(kind: str, jobs: int, tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    store = make_store(kind, path, LIMITS)
    rss: Callable[[], int] = lambda: psutil.Process().memory_info().rss  # noqa: E731
    now, half = 1000.0, (0, 0)

    async def client() -> None:
        """Submits, lets all of it finish, reads a tenth of it."""
        ids = await store.reserve_ids(PROMPTS)
        await store.insert([JobRecord(id, "ann", "tiny", now, now + 9, b"p" * 500) for id in ids])
        for id in ids:
            assert await store.finish(id, answer(f"text {id} " * 100, finished=now))
            if id % 10 == 0:
                await store.find(id)
                await store.mark_read(id)

    async def body() -> None:
        nonlocal now, half
        rounds = jobs // (CLIENTS * PROMPTS)
        for turn in range(rounds):
            await asyncio.gather(*(client() for _ in range(CLIENTS)))
            # bursts exceed the limits, in the quiet time between results expire
            now += 0.05 if turn % 40 < 20 else 0.5
            await store.expire(now)
            stats = store.stats()
            assert stats.results <= LIMITS.max_results and stats.bytes <= LIMITS.max_bytes
            assert stats.unfinished == 0
            if turn == rounds // 2:
                half = (rss(), path.stat().st_size if kind == "sqlite" else 0)
        assert rss() - half[0] < 20 << 20
        if kind == "sqlite":
            assert path.stat().st_size < half[1] * 1.25
        gone = store.stats().evicted
        assert gone["expired"] and gone["evicted_read"] and gone["evicted_unread"]
        assert sum(gone.values()) + store.stats().results == rounds * CLIENTS * PROMPTS

    using(store, body)
