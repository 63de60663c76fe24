"""Fleet: several engines with the same model, as if they were one.

A request goes to the engine with the least outstanding work. When that engine dies or is given
up, its waiting requests move to another engine. The requests that may have killed it (the
suspects) stay, and run there one at a time.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import time
from collections.abc import Coroutine
from enum import IntEnum
from typing import Any

from msgspec.structs import replace

from dllmserve._checks import check_int
from dllmserve.errors import ConfigError, DllmServeError, EngineError
from dllmserve.process.calls import Call
from dllmserve.process.devices import shares
from dllmserve.process.messages import Counters, EngineInfo, Submit, added
from dllmserve.process.supervisor import State, Supervisor, SupervisorOptions
from dllmserve.process.worker import STOP_S

_log = logging.getLogger("dllmserve.engine")

#: seconds of silence after which new requests avoid an engine; its heartbeats come every half
#: second, unless a step takes longer
AVOIDED_AFTER_S = 10.0


class _Standing(IntEnum):
    """How soon an engine would run a request, best first."""

    OPEN = 0
    #: suspects run there, one at a time
    SUSPECTS = 1
    #: either it comes back, or the watchdog ends it and the request moves to another engine
    SILENT = 2
    STARTING = 3
    GONE = 4


class Fleet:
    """Owns the supervisors of all engines of one model. Used on one event loop.

    Args:
        options: fields of EngineConfig, the same for all.
        how: how each engine process is started and watched.
        size: number of engines.

    Attributes:
        supervisors: one for each engine.

    Raises:
        ConfigError: a wrong number.
    """

    def __init__(self, options: dict[str, Any], how: SupervisorOptions, size: int = 1) -> None:
        check_int(ConfigError, "data_parallel_size", size, 1)
        self._options, self._how = options, how
        self.supervisors = [
            Supervisor(
                options,
                how,
                changed=self._engine_changed,
                log=_log.getChild(str(index)) if size > 1 else _log,
            )
            for index in range(size)
        ]
        self._next = 0
        self._started = self._closed = False
        self._serving = size

    @property
    def state(self) -> State:
        """READY if any engine is; FAILED only if all are gone for good."""
        states = {s.state for s in self.supervisors}
        for state in (State.CLOSED, State.READY, State.RESTARTING, State.STARTING):
            if state in states:
                return state
        return State.FAILED

    @property
    def info(self) -> EngineInfo | None:
        """The engine with the fewest K,V pages: a request that fits it fits every engine.

        None before all are ready. Engines differ in pages where their GPUs differ in free memory.
        """
        known = [s.info for s in self.supervisors if s.info is not None]
        if len(known) < len(self.supervisors):
            return None
        return min(known, key=lambda info: info.limits.num_pages)

    @property
    def counters(self) -> Counters:
        """Of all engines together; the share of pages is the mean of those that run."""
        found = added(*(s.counters for s in self.supervisors))
        return replace(found, pages_used=found.pages_used / max(self.serving, 1))

    @property
    def serving(self) -> int:
        """Engines that are ready."""
        return sum(s.state is State.READY for s in self.supervisors)

    @property
    def requests(self) -> int:
        """Requests under way."""
        return sum(s.requests for s in self.supervisors)

    @property
    def restarts(self) -> int:
        """Engines started after the first ones."""
        return sum(s.restarts for s in self.supervisors)

    @property
    def engine_pids(self) -> list[int]:
        """Process ids of the engines, also of those that are being loaded."""
        return [s.engine_pid for s in self.supervisors if s.engine_pid is not None]

    @property
    def silence(self) -> float:
        """Seconds since the last heartbeat of any engine that is ready; 0 if none is ready."""
        ready = (s.silence for s in self.supervisors if s.state is State.READY)
        return min(ready, default=0.0)

    async def start(self) -> EngineInfo:
        """Start all engines at the same time and wait until they are ready.

        Raises:
            ConfigError: there are not enough GPUs for so many.
            DllmServeError: model or options are wrong, or one of them did not start; the
                others are ended then.
        """
        shared = await shares(self._options, len(self.supervisors), self._how.load_timeout_s)
        if self.state is State.CLOSED:
            raise EngineError("the engine has been closed")
        for supervisor, share in zip(self.supervisors, shared, strict=True):
            supervisor.share = share
        starting = [asyncio.create_task(s.start()) for s in self.supervisors]
        try:
            infos = await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                # a second cancellation would interrupt the wait for the end of its process
                if not task.cancelling():
                    task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            await self._close_those_that_run()
            raise
        self._started = True
        self._engine_changed()
        return self.info or infos[0]

    async def close(self) -> None:
        """End all engines; what is still under way fails."""
        self._closed = True  # so that no request moves from a closed engine to an open one
        await _all(*(s.close() for s in self.supervisors))

    def kill_at_once(self) -> list[subprocess.Popen[bytes]]:
        """Kill all engines, even when their event loop does not run any more.

        Returns:
            Their processes, which may take a moment to end.
        """
        self._closed = True
        error = EngineError("the engine has been closed")
        killed = [s.kill_at_once(error) for s in self.supervisors]
        return [process for process in killed if process is not None]

    async def kill(self) -> None:
        """Kill all engines, from any event loop; returns when the processes have ended."""
        killed = self.kill_at_once()
        until = time.monotonic() + STOP_S
        while any(process.poll() is None for process in killed) and time.monotonic() < until:
            await asyncio.sleep(0.01)

    async def _close_those_that_run(self) -> None:
        """Close the engines that did start, after a start that failed."""
        running = [s for s in self.supervisors if s.state is not State.STARTING]
        await _all(*(s.close() for s in running))

    async def failed(self) -> DllmServeError:
        """Wait until all engines are given up; returns why. Never returns otherwise."""
        reasons = await asyncio.gather(*(s.failed() for s in self.supervisors))
        return reasons[0]

    def submit(self, request: Submit, work: int = 0) -> Call:
        """Queue a checked request at the engine with the least outstanding work.

        Args:
            request: the message that runs it.
            work: what it costs at most, see :func:`dllmserve.core.work.work_of`.

        Raises:
            EngineError: all engines are gone for good.
        """
        # if the best one is gone, all are, and it raises the reason
        return self._best().submit(request, work)

    def abort(self, call: Call, error: DllmServeError | None = None) -> None:
        """Drop a request; its rows and pages are free after the current forward pass.

        Args:
            call: the request.
            error: what whoever waits for it gets; a RequestAbortedError by default.
        """
        for supervisor in self.supervisors:
            if supervisor.holds(call):
                supervisor.abort(call, error)
                self._engine_changed()  # the request may have been the last suspect
                return

    def _best(self) -> Supervisor:
        """The engine for the next request.

        Equal engines take turns, so that the first does not get every request of a quiet time.
        """
        size = len(self.supervisors)

        def rank(index: int) -> tuple[int, int, int, int]:
            supervisor = self.supervisors[index]
            turn = (index - self._next) % size
            return _standing(supervisor), supervisor.work, supervisor.requests, turn

        index = min(range(size), key=rank)
        self._next = (index + 1) % size
        return self.supervisors[index]

    def _engine_changed(self) -> None:
        """Move requests away from engines that cannot run them; log how many engines serve."""
        if len(self.supervisors) == 1 or self._closed:
            return
        for source in self.supervisors:
            if source.state is State.FAILED:
                self._clear(source)
                continue
            # a waiting request moves only to an engine that runs it at once: at any other engine
            # it would wait as well
            while source.stuck() and _standing(target := self._best()) is _Standing.OPEN:
                target.adopt(source.release()[0])
        serving = self.serving
        if self._started and serving != self._serving:
            level = logging.INFO if serving == len(self.supervisors) else logging.WARNING
            _log.log(level, "%d of %d engines serve", serving, len(self.supervisors))
            self._serving = serving

    def _clear(self, gone: Supervisor) -> None:
        """Move everything from an engine that was given up, unless all were."""
        # without restarts, suspects would kill one engine after the other
        suspects = self._how.restart
        while gone.stuck(suspects=suspects) and self.state is not State.FAILED:
            call, alone = gone.release(suspects=suspects)
            # suspects stay together, because nothing else runs beside a suspect
            target = self._best() if not alone else self._least_disturbed()
            target.adopt(call, alone=alone)

    def _least_disturbed(self) -> Supervisor:
        """The engine where requests that have to run alone disturb the fewest others."""
        return min(
            (s for s in self.supervisors if _standing(s) is not _Standing.GONE),
            key=lambda s: (not s.suspected, _standing(s), s.work),
        )


def _standing(supervisor: Supervisor) -> _Standing:
    if supervisor.state in (State.FAILED, State.CLOSED):
        return _Standing.GONE
    if supervisor.state is not State.READY:
        return _Standing.STARTING
    if supervisor.silence > AVOIDED_AFTER_S:
        return _Standing.SILENT
    return _Standing.OPEN if supervisor.open else _Standing.SUSPECTS


async def _all(*closing: Coroutine[Any, Any, None]) -> None:
    """Wait for all of them, and raise the first error afterwards."""
    results = await asyncio.gather(*closing, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
