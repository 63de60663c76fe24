"""Accepted jobs of the poll API and their results, kept until their retention ends.

:class:`SqliteStore` keeps jobs and results in a file, or in memory until the process ends. It has
the interface of :class:`JobStore` and knows nothing of HTTP or engines.
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
from dllmserve.server.store.sqlite import SqliteStore

__all__ = [
    "MAX_JOB_ID",
    "Gone",
    "JobIdTaken",
    "JobRecord",
    "JobResult",
    "JobStore",
    "SqliteStore",
    "StoreLimits",
    "StoreStats",
    "Stored",
]
