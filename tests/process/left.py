"""Processes that a test leaves behind."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil


def children() -> set[psutil.Process]:
    """Processes that this one has started, directly or not, and that still run."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
        except psutil.NoSuchProcess:
            continue
    return found


@contextmanager
def nothing_left() -> Iterator[None]:
    """What is started inside must have ended; servers that other tests share do not count."""
    before = children()
    yield
    assert children() <= before
