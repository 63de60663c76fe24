"""GroupCommit: a thread that runs the operations of a job store, many in one transaction.

A commit costs one write to the disk, however much is in it. Operations queue up while a commit is
being written, and all of them go into the next one. So a store under load makes few, large
transactions, and an idle store answers at once.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dllmserve.errors import DllmServeError, JobStoreError
from dllmserve.server.store.files import DAMAGE
from dllmserve.server.store.tables import Tables

_log = logging.getLogger("dllmserve.store")
_T = TypeVar("_T")

#: most operations in one transaction, so that the first of them do not wait for long
MAX_BATCH = 1000


@dataclass(slots=True)
class _Operation:
    work: Callable[[Tables], Any]
    future: asyncio.Future[Any]


@dataclass(slots=True)
class _Outcome:
    future: asyncio.Future[Any]
    value: Any = None
    error: BaseException | None = None


class GroupCommit:
    """Runs operations in a thread of its own and answers each after its commit.

    A failed operation does not harm the others: the transaction is undone, and the operations run
    again, each in a transaction of its own. The thread goes on after every error.

    Args:
        name: the name of the store, for the log.
        opener: makes the tables; called in the thread.
    """

    def __init__(self, name: str, opener: Callable[[], Tables]) -> None:
        self._name = name
        self._opener = opener
        self._queue: queue.SimpleQueue[_Operation | None] = queue.SimpleQueue()
        self._accepts = False
        self._failing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ended: asyncio.Future[None] | None = None

    async def start(self) -> Tables:
        """Open the tables. Raises what the opener raises; the thread has then ended."""
        if self._thread is not None:
            raise JobStoreError(f"the job store {self._name} was opened before; make a new one")
        self._loop = asyncio.get_running_loop()
        ready: asyncio.Future[Tables] = self._loop.create_future()
        self._ended = self._loop.create_future()
        # a daemon thread, because answered operations are on the disk: an exit need not wait for it
        self._thread = threading.Thread(
            target=self._main, args=(ready, self._ended), name="job-store", daemon=True
        )
        self._thread.start()
        tables = await ready
        self._accepts = True
        return tables

    async def run(self, work: Callable[[Tables], _T]) -> _T:
        """Run an operation; returns after its commit.

        ``work`` may be called twice, the first time without effect.

        Raises:
            JobStoreError: the storage failed, or the store is not open.
            DllmServeError: the operation refused.
        """
        if not self._accepts or self._loop is None:
            raise JobStoreError("the job store is not open")
        future: asyncio.Future[_T] = self._loop.create_future()
        self._queue.put(_Operation(work, future))
        return await future

    async def stop(self) -> None:
        """Run the queued operations, close the tables and end the thread."""
        if self._thread is None or self._ended is None:
            return
        self._accepts = False
        self._queue.put(None)
        await asyncio.shield(self._ended)
        self._thread.join()

    def _main(self, ready: asyncio.Future[Tables], ended: asyncio.Future[None]) -> None:
        try:
            try:
                tables = self._opener()
            except Exception as error:
                self._deliver([_Outcome(ready, error=error)])
                return
            self._deliver([_Outcome(ready, tables)])
            try:
                self._serve(tables)
            finally:
                tables.close()
        finally:
            self._deliver([_Outcome(ended)])

    def _serve(self, tables: Tables) -> None:
        last = False
        while not last:
            self._try(tables.renew)
            batch, last = self._take(tables)
            if batch:
                self._deliver(self._write(tables, batch))

    def _take(self, tables: Tables) -> tuple[list[_Operation], bool]:
        """Wait for an operation and take those queued behind it; True if they are the last."""
        batch: list[_Operation] = []
        try:
            operation = self._queue.get(timeout=tables.patience)
            while operation is not None:
                batch.append(operation)
                if len(batch) == MAX_BATCH:
                    return batch, False
                operation = self._queue.get_nowait()
        except queue.Empty:
            if not batch:
                self._try(tables.tidy)
            return batch, False
        return batch, True

    def _try(self, work: Callable[[], None]) -> None:
        """Do maintenance, for which no caller waits."""
        try:
            work()
        except DAMAGE as error:  # it is logged, and tried again later
            self._note(error)

    def _write(self, tables: Tables, batch: Sequence[_Operation]) -> list[_Outcome]:
        """Run operations in one transaction, or in one each if that fails."""
        try:
            return self._transaction(tables, batch)
        except Exception as error:
            if len(batch) > 1:
                return [outcome for one in batch for outcome in self._write(tables, [one])]
            if not isinstance(error, DAMAGE):
                return [_Outcome(batch[0].future, error=error)]
            self._note(error)
            failed = JobStoreError(f"the job store failed and nothing was changed: {error}")
            failed.__cause__ = error
            return [_Outcome(batch[0].future, error=failed)]

    def _transaction(self, tables: Tables, batch: Sequence[_Operation]) -> list[_Outcome]:
        outcomes = []
        tables.begin()
        try:
            for operation in batch:
                outcome = _Outcome(operation.future)
                try:
                    outcome.value = operation.work(tables)
                except DllmServeError as refusal:  # raised before anything was written
                    outcome.error = refusal
                outcomes.append(outcome)
            wrote = tables.commit()
        except BaseException:
            tables.rollback()
            raise
        if wrote and self._failing:
            self._failing = False
            _log.warning("job store %s: works again", self._name)
        return outcomes

    def _note(self, error: Exception) -> None:
        """Log the first of several failures in a row; callers get an error for each."""
        if not self._failing:
            self._failing = True
            _log.error("job store %s: %s", self._name, error)

    def _deliver(self, outcomes: Sequence[_Outcome]) -> None:
        """Hand outcomes to the event loop, all with one wake-up."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(_resolve, outcomes)
        except RuntimeError:  # the loop is closed, so no caller waits
            _log.debug("job store %s: the event loop has ended", self._name)


def _resolve(outcomes: Sequence[_Outcome]) -> None:
    for outcome in outcomes:
        if outcome.future.done():  # cancelled
            continue
        if outcome.error is not None:
            outcome.future.set_exception(outcome.error)
        else:
            outcome.future.set_result(outcome.value)
