"""Home: the process and the event loop in which engines were started and may be used."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress

from dllmserve._system import refuse_fork
from dllmserve.errors import EngineError


class Home:
    """The process and the running event loop in which this object was made.

    Attributes:
        loop: the event loop.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._pid = os.getpid()

    @property
    def forked(self) -> bool:
        """Whether the caller is in a process that was forked from the home's."""
        return os.getpid() != self._pid

    @property
    def here(self) -> bool:
        """Whether the caller runs in the loop."""
        try:
            return asyncio.get_running_loop() is self.loop and not self.forked
        except RuntimeError:
            return False

    def check_process(self) -> None:
        """Raise EngineError in a forked process."""
        refuse_fork("AsyncLLM", self._pid)

    def check(self) -> None:
        """Raise EngineError unless the caller runs in the loop."""
        self.check_process()
        if not self.here:
            over = ", which is over" if self.loop.is_closed() else ""
            raise EngineError(
                f"this AsyncLLM was started in another event loop{over}: asyncio.run() makes a new "
                "loop each time, so start, use and close an AsyncLLM inside one asyncio.run(), or "
                "make a new one here; from another thread, hand the coroutine to "
                "asyncio.run_coroutine_threadsafe() with the loop of start()"
            )

    def call(self, work: Callable[[], object]) -> None:
        """Have the loop call something, from any thread; nothing happens if the loop is closed."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(work)
