"""An event loop for tests with timers, on machines that have other things to do."""

import asyncio
import selectors
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

#: the longest that a steady loop sleeps at a time, in seconds
NAP = 0.02
#: the most that a steady loop's clock goes on between two looks at it, in seconds
STALL = 0.1


class Naps(selectors.DefaultSelector):
    """A selector that wakes at least every ``NAP`` seconds."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready; nothing after a nap."""
        return super().select(NAP if timeout is None else min(timeout, NAP))


class SteadyLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still while the machine runs something else.

    The server and its clients share the loop. Where tests have a busy machine, the whole process
    may get no processor for a second; by a real clock a client would then be late.
    """

    def __init__(self) -> None:
        self._seen = time.monotonic()
        self._lost = 0.0
        super().__init__(Naps())

    def time(self) -> float:
        """Seconds, less those that the loop stood still for."""
        now = time.monotonic()
        self._lost += max(0.0, now - self._seen - STALL)
        self._seen = now
        return now - self._lost


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """``asyncio.run`` in a steady loop."""
    with asyncio.Runner(loop_factory=SteadyLoop) as runner:
        return runner.run(main)


@contextmanager
def watched() -> Iterator[Callable[[], float]]:
    """Seconds so far that a thread which only naps overslept, all in all.

    For tests whose times are real ones, as where a server has a thread of its own.
    """
    lost, ended = [0.0], threading.Event()

    def nap() -> None:
        seen = time.monotonic()
        while not ended.wait(NAP):
            now = time.monotonic()
            lost[0] += now - seen - NAP
            seen = now

    thread = threading.Thread(target=nap, daemon=True)
    thread.start()
    try:
        yield lambda: lost[0]
    finally:
        ended.set()
        thread.join()
