"""LeadRunner: rank 0's runner, which has all other ranks do what it does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import StepPlan
from dllmserve.core.rows import RowInit
from dllmserve.errors import RankError
from dllmserve.process.messages import Admit, Execute, ToWorker
from dllmserve.process.ranks import Ranks
from dllmserve.runtime.platform import on_device, record_event
from dllmserve.runtime.runner import ModelRunner, StepHandle
from dllmserve.runtime.state_table import StateTable


class LeadRunner:
    """A runner that sends each operation to the other ranks before it runs it.

    An error in the middle of an operation leaves the ranks out of step. The engine ends then, and
    every later call raises the same RankError.

    Args:
        runner: this rank's.
        ranks: the others.
    """

    #: a step that ran out of memory cannot run again, because other ranks may have finished it
    recovers = False

    def __init__(self, runner: ModelRunner, ranks: Ranks) -> None:
        self._runner, self.ranks = runner, ranks

    @property
    def spec(self) -> ModelSpec:
        """The whole model."""
        return self._runner.spec

    @property
    def table(self) -> StateTable:
        """State rows; every rank has the same."""
        return self._runner.table

    def admit(self, init: RowInit) -> None:
        """See :meth:`ModelRunner.admit`. Raises RankError."""
        with self._together(Admit(init)):
            self._runner.admit(init)

    def execute(self, plan: StepPlan) -> StepHandle:
        """See :meth:`ModelRunner.execute`. Raises RankError."""
        with self._together(Execute(plan)):
            handle = self._runner.execute(plan)
        handle.await_event = self.ranks.await_event
        return handle

    def close(self) -> None:
        """End the other ranks, after the steps in flight."""
        device = self.table.device
        with on_device(device), suppress(RankError):
            event = record_event(device)
            if event is not None:
                self.ranks.await_event(event)
        if self._runner.graphs is not None:
            # CUDA graphs hold exchanges of the group, so they have to go before it
            self._runner.graphs.clear()
        self.ranks.stop()

    @contextmanager
    def _together(self, message: ToWorker) -> Iterator[None]:
        with _uninterrupted():
            self.ranks.send(message)
            try:
                yield
            except Exception as error:
                raise self.ranks.explain(error) from error
            except BaseException as error:
                self.ranks.give_up(error)
                raise


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C: in the middle of an exchange it would leave the ranks out of step."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # Ctrl-C interrupts the main thread only, and only Python's handler is replaced
        return
    caught: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(*caught[-1])
