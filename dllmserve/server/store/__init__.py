"""Accepted jobs of the poll API and their results, kept until their retention ends.

:class:`MemoryStore` forgets everything when the process ends; :class:`SqliteStore` keeps jobs
and results in a file. Both have the interface of :class:`JobStore` and know nothing of HTTP or
engines.
"""

from dllmserve.server.store.base import (
    MAX_JOB_ID,
    Gone,
    JobIdTaken,
    JobRecord,
    JobResult,
    JobStore,
    Stored,
    StoreLimits,
    StoreStats,
)
from dllmserve.server.store.memory import MemoryStore
from dllmserve.server.store.sqlite import SqliteStore

__all__ = [
    "MAX_JOB_ID",
    "Gone",
    "JobIdTaken",
    "JobRecord",
    "JobResult",
    "JobStore",
    "MemoryStore",
    "SqliteStore",
    "StoreLimits",
    "StoreStats",
    "Stored",
]
