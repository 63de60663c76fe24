"""Jobs and results for tests of the stores, and both stores by name."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from dllmserve.server.store import (
    JobRecord,
    JobResult,
    JobStore,
    SqliteStore,
    Stored,
    StoreLimits,
)

T = TypeVar("T")
KINDS = ("memory", "sqlite")


def job(
    id: int, owner: str = "ann", created: float = 100.0, request: bytes = b"prompt"
) -> JobRecord:
    return JobRecord(id, owner, "tiny", created, created + 600.0, request)


def answer(text: str = "Hi!", finished: float = 200.0) -> JobResult:
    return JobResult("finished", text, None, b"", finished)


def done(record: JobRecord, result: JobResult) -> Stored:
    """What is found of a job that has finished."""
    return Stored(replace(record, request=b""), result)


def make_store(kind: str, path: Path, limits: StoreLimits | None = None) -> JobStore:
    return SqliteStore(None if kind == "memory" else path, limits)


def using(store: JobStore, body: Callable[[], Awaitable[T]]) -> T:
    """Run ``body`` with the store open, in an event loop of its own."""

    async def main() -> T:
        await store.open()
        try:
            return await body()
        finally:
            await store.close()

    return asyncio.run(main())
