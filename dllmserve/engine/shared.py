"""SharedEngine: one engine for all threads of a program, whose steps serve the requests of all.

One thread steps at a time. The others wait until their requests have ended, or until nobody
steps; then one of them goes on.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from dllmserve._system import refuse_fork
from dllmserve.core.plan import StepPlan
from dllmserve.core.request import Request
from dllmserve.engine.core import EngineCore
from dllmserve.errors import EngineError
from dllmserve.outputs import CanvasStep, RequestOutput

#: canvases kept for a stream that is read slower than the engine runs; older ones are lost
_KEPT_CANVASES = 256
#: seconds that a waiting thread sleeps at most: Ctrl-C may have hit the stepping thread before it
#: could wake the others
_GLANCE_S = 0.1
_CLOSED = "the engine has been closed: load the model again"


class Ticket:
    """A request, as the thread that waits for it sees it.

    Attributes:
        request: what runs.
        output: once it has ended well.
        error: once it has ended otherwise.
        canvases: of a watched request, those that nobody has taken yet.
    """

    def __init__(self, request: Request, batch: Batch) -> None:
        self.request = request
        self.output: RequestOutput | None = None
        self.error: BaseException | None = None
        self.canvases: deque[CanvasStep] = deque(maxlen=_KEPT_CANVASES)
        self._batch = batch

    def end(self, result: RequestOutput | BaseException) -> None:
        """Set output or error; the first one counts."""
        if self.output is not None or self.error is not None:
            return
        if isinstance(result, RequestOutput):
            self.output = result
        else:
            self.error = result
        self._batch.ended += 1


class Batch:
    """The requests of one call.

    Attributes:
        tickets: in the order of the requests.
        ended: how many of them have ended.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.ended = 0
        self.tickets = [Ticket(request, self) for request in requests]


class SharedEngine:
    """Takes requests from any thread, and runs steps in the threads that wait for them.

    Args:
        core: the engine. It is closed with this object, unless that is a copy in a forked process.

    Attributes:
        core: the engine.
        steps: forward passes so far.
        committed: tokens that became committed in them.
    """

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.steps = self.committed = 0
        self._pid = os.getpid()
        self._close_core = weakref.finalize(self, _close_at_home, core, self._pid)
        # guards what follows, for moments; reentrant, because garbage collection may end a stream
        # in any line. Only C code takes it (no Condition as a context manager): a signal cannot
        # come between taking it and the block that gives it back.
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        #: the thread that works with the core now
        self._owner: int | None = None
        self._arrived: deque[Ticket] = deque()
        self._live: dict[Request, Ticket] = {}
        self._dropped: deque[Ticket] = deque()
        self._closed = False

    def check(self) -> None:
        """Raise EngineError if the engine has been closed, or belongs to another process."""
        refuse_fork("LLM", self._pid)
        if self._closed:
            raise EngineError(_CLOSED)

    def submit(self, requests: Sequence[Request]) -> Batch:
        """Queue checked requests. Never waits for a step.

        Raises:
            EngineError: see :meth:`check`; or it is called from inside a step.
        """
        self.check()
        self._refuse_inside()
        with self._lock:
            self.check()
            batch = Batch(requests)
            self._arrived.extend(batch.tickets)
        return batch

    def advance(self, ticket: Ticket) -> bool:
        """Run a step for everybody, or wait while another thread does.

        Returns:
            False if the request has its output; True if it may still run.

        Raises:
            BaseException: whatever ended the request, in this thread's step or in another's.
        """
        refuse_fork("LLM", self._pid)
        self._refuse_inside()
        mine, tell = threading.get_ident(), True
        try:
            with self._lock:
                if ticket.output is not None:
                    return False
                if ticket.error is not None:
                    raise ticket.error
                if self._owner is not None:
                    self._news.wait(_GLANCE_S)
                    return True
                self._owner = mine
            tell = self._step()
        finally:
            # no call before the assignment: a signal would be handled in it
            if self._owner == mine:
                self._owner = None
                self._let_others(tell)
        return True

    def canvas(self, ticket: Ticket) -> CanvasStep | None:
        """The next canvas of a watched request; None after the last. Raises as :meth:`advance`."""
        refuse_fork("LLM", self._pid)
        while ticket.error is not None or not ticket.canvases:
            if not self.advance(ticket) and not ticket.canvases:
                return None
        return ticket.canvases.popleft()

    def drop(self, batch: Batch) -> None:
        """Forget requests, and free what those that still run hold, between two steps."""
        if os.getpid() == self._pid:
            self._dropped.extend(batch.tickets)
            self._let_others(tell=True)

    def close(self) -> None:
        """End every request with an error, and the engine after the step under way.

        Does nothing in a forked process: the engine is its parent's.
        """
        if os.getpid() != self._pid:
            return
        mine = threading.get_ident()
        with self._lock:
            self._closed = True
            for ticket in [*self._live.values(), *self._arrived]:
                ticket.end(EngineError(_CLOSED))
            self._news.notify_all()
            if self._owner == mine:
                return  # called from inside a step, which closes the core at its end
        try:
            with self._lock:
                while self._owner is not None:
                    self._news.wait(_GLANCE_S)
                self._owner = mine
            self._close_core()
        finally:
            if self._owner == mine:
                self._owner = None
                self._let_others(tell=True)

    @contextmanager
    def observed(self, callback: Callable[[StepPlan], None]) -> Iterator[None]:
        """Call ``callback`` with every plan that is launched inside the ``with`` block."""
        self.check()
        self.core.observers.append(callback)
        try:
            yield
        finally:
            self.core.observers.remove(callback)

    def _refuse_inside(self) -> None:
        if self._owner == threading.get_ident():
            raise EngineError(
                "a callback of observe() runs inside a step, so it cannot generate: let it "
                "return first"
            )

    def _let_others(self, tell: bool) -> None:
        """Free what was dropped, if nobody works with the core now, and wake who waits."""
        if not (tell or self._dropped):
            return
        with self._lock:
            if self._owner is None:
                try:
                    self._owner = threading.get_ident()
                    self._sort_in()
                finally:
                    self._owner = None
            self._news.notify_all()

    def _step(self) -> bool:
        """Run a step; say whether it brought anything that another thread may wait for."""
        try:
            self._sort_in()
            events = self.core.step()
            with self._lock:
                self.steps += 1
                self.committed += events.committed
                for watched, canvas in events.watched:
                    if watched in self._live:
                        self._live[watched].canvases.append(canvas)
                for request, output in events.finished:
                    self._end(request, output)
                for request in events.failed:
                    self._end(request, request.error or EngineError("no reason was given"))
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            if self._closed:
                self._close_core()
        return bool(events.finished or events.failed or events.watched or self._closed)

    def _sort_in(self) -> None:
        """Hand what has arrived to the core, and take back what was dropped."""
        while self._arrived:
            ticket = self._arrived[0]
            self._live[ticket.request] = ticket
            self.core.add(ticket.request)
            self._arrived.popleft()
        while self._dropped:
            request = self._dropped.popleft().request
            self.core.abort(request)
            self._live.pop(request, None)

    def _end(self, request: Request, result: RequestOutput | BaseException) -> None:
        ticket = self._live.pop(request, None)
        if ticket is not None:
            ticket.end(result)

    def _fail(self, error: BaseException) -> None:
        """A step was cut short, so no request's state can be trusted any more."""
        self.core.abandon()
        with self._lock:
            lost = [*self._live.values(), *self._arrived]
            for ticket in lost:
                told = EngineError(f"the engine's step failed: {error!r}")
                told.__cause__ = error
                ticket.end(told)
            for ticket in lost:
                self.core.abort(ticket.request)
            self._live.clear()
            self._arrived.clear()


def _close_at_home(core: EngineCore, pid: int) -> None:
    """Close the core, but not from a forked process: what it would end is the parent's."""
    if os.getpid() == pid:
        core.close()
