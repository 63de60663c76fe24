"""Call: one request in an engine process, from its submission to its output or error.

:meth:`Call.judge` decides what happens to a request whose engine died.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from enum import Enum

from dllmserve.outputs import CanvasStep, RequestOutput, TokenLogprob
from dllmserve.process.home import Home
from dllmserve.process.messages import Submit
from dllmserve.process.worker import Cause

#: answer positions in canvases that wait for a slow reader; above it the oldest canvas is dropped
MAX_WAITING_CELLS = 1 << 18
#: a request that ran with others when its engine was killed from outside (for want of memory, for
#: example) may be killed so often when it runs alone
MAX_KILLS_ALONE = 3


@dataclass(frozen=True)
class Started:
    """The request takes part in the coming forward pass. ``at``: monotonic seconds."""

    at: float


@dataclass(frozen=True)
class Delta:
    """Ids that joined the committed prefix, and their log-probabilities if asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None


Event = Started | Delta | CanvasStep | RequestOutput


class Fate(Enum):
    """What becomes of a request whose engine died."""

    RERUN = "rerun"
    ALONE = "alone"
    FAIL = "fail"


class Call:
    """One request, from submission to its end.

    Attributes:
        submit: the message that runs it, as often as it takes.
        work: what it costs at most, see :func:`dllmserve.core.work.work_of`.
        in_engine: sent to the engine, and not ended.
        running: takes part in forward passes.
        ended: has an output or an error.
        finished: has an output.
        started: monotonic seconds of the first forward pass, or None.
        reruns: times that it was begun again on a new engine; events then start again, too.
        home: where its events can be waited for; None is anywhere.
    """

    def __init__(self, submit: Submit, work: int = 0) -> None:
        self.submit, self.work = submit, work
        self.in_engine = False
        self.running = False
        self.ended = self.finished = False
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.reruns = 0
        self.home: Home | None = None
        self._events: deque[Event | BaseException] = deque()
        self._arrived = asyncio.Event()
        self._waiting_cells = 0
        self._given_out = False
        self._suspected = False
        self._deaths = 0
        self._deaths_alone = 0

    @property
    def id(self) -> int:
        """The id in messages."""
        return self.submit.id

    async def next(self) -> Event:
        """The next event; a RequestOutput is the last.

        Raises:
            DllmServeError: the request has failed, or the caller is not in its event loop.
        """
        if self.home is not None:
            self.home.check()
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, Delta | CanvasStep):
            self._given_out = True
        if isinstance(event, CanvasStep):
            self._waiting_cells -= len(event.token_ids)
        return event

    def hold_back(self) -> None:
        """Note that the reader has kept all events to itself, so the request may run again."""
        self._given_out = False

    async def output(self) -> RequestOutput:
        """Wait for the end. Raises what :meth:`next` raises."""
        while True:
            event = await self.next()
            if isinstance(event, RequestOutput):
                return event

    def start(self) -> None:
        """The engine has admitted it."""
        self.running = True
        if self.started is None:
            self.started = time.monotonic()
            self._put(Started(self.started))

    def put(self, event: Delta | CanvasStep) -> None:
        """Add an event of a step. A reader that pauses for long may miss older canvases."""
        self._put(event)
        if isinstance(event, CanvasStep):
            self._waiting_cells += len(event.token_ids)
            while self._waiting_cells > MAX_WAITING_CELLS and self._lose_canvas(event):
                continue

    def end(self, result: RequestOutput | BaseException) -> None:
        """End the call with an output or an error."""
        self.in_engine = self.running = False
        self.ended = True
        self.finished = isinstance(result, RequestOutput)
        self._put(result)

    def judge(self, cause: Cause, alone: bool) -> Fate:
        """Decide what happens after the engine died with the call in it.

        A request fails if something of its answer was given out. A request that was waiting
        cannot be the reason, so it runs again. A request that was running may be the reason:

        - After a crash or a hang it runs again alone, so that only the guilty request fails.
        - After a kill from outside it runs again with others the first time, and alone after
          the second.
        - It fails after a crash or a hang in which it was alone, if an engine had died with it
          before.
        - It fails after two kills from outside, if it was alone both times; otherwise after
          MAX_KILLS_ALONE kills while it was alone.

        Args:
            cause: why the engine ended.
            alone: no other request was running.
        """
        was_running, self.in_engine, self.running = self.running, False, False
        if self._given_out:
            return Fate.FAIL
        self._forget_events()
        self.reruns += 1
        if not was_running:
            return Fate.ALONE if self._suspected else Fate.RERUN
        self._deaths += 1
        self._deaths_alone += alone
        fate = self._judge_running(cause, alone)
        self._suspected = fate is Fate.ALONE
        return fate

    def _judge_running(self, cause: Cause, alone: bool) -> Fate:
        if cause is Cause.KILLED:
            always_alone = self._deaths == self._deaths_alone
            if self._deaths_alone >= (2 if always_alone else MAX_KILLS_ALONE):
                return Fate.FAIL
            return Fate.ALONE if self._deaths >= 2 else Fate.RERUN
        return Fate.FAIL if alone and self._deaths >= 2 else Fate.ALONE

    def _put(self, event: Event | BaseException) -> None:
        self._events.append(event)
        self._arrived.set()

    def _lose_canvas(self, newest: CanvasStep) -> bool:
        """Drop the oldest canvas. Returns False if only the newest one is left."""
        for index, event in enumerate(self._events):
            if isinstance(event, CanvasStep):
                if event is newest:
                    break
                del self._events[index]
                self._waiting_cells -= len(event.token_ids)
                return True
        return False

    def _forget_events(self) -> None:
        """Drop the events that nobody has taken: the next run produces them again."""
        kept = [event for event in self._events if isinstance(event, Started)]
        self._events = deque(kept)
        self._waiting_cells = 0
