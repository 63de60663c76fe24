"""Supervisor: restarts an engine process that dies, and runs its accepted requests again.

If the engine dies or hangs, the supervisor starts a new one. Requests of whose answer nothing was
given out run again from their prompts; :mod:`dllmserve.process.calls` has the exceptions. Each of
several engines has a supervisor of its own, and :mod:`dllmserve.process.fleet` moves requests
between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from msgspec.structs import replace

from dllmserve.core.line import Line
from dllmserve.errors import (
    DllmServeError,
    EngineDiedError,
    EngineError,
    EngineStartError,
    RequestAbortedError,
    error_named,
)
from dllmserve.process.calls import Call, Delta, Fate
from dllmserve.process.devices import Share
from dllmserve.process.engine_process import EngineProcess, EngineStoppedError
from dllmserve.process.messages import (
    Abort,
    Admitted,
    Counters,
    EngineInfo,
    FromWorker,
    Report,
    Submit,
    added,
)
from dllmserve.process.worker import COMMAND, Cause, Death, kill_for_good

_log = logging.getLogger("dllmserve.engine")

#: failed starts in a row before the supervisor gives up
MAX_FAILED_STARTS = 5
#: seconds between an engine's end and the next start: the first, and the most
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.1, 10.0
#: an engine that dies sooner than this, in seconds, counts as a failed start
_SETTLED_S = 2.0


class State(Enum):
    """The state of an engine."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    CLOSED = "closed"


@dataclass(frozen=True, kw_only=True)
class SupervisorOptions:
    """How an engine process is started and watched.

    Attributes:
        command: program that runs the engine; the descriptor of its socket and the owner's id are
            appended.
        watchdog_s: silence, in seconds, after which an engine is killed.
        load_timeout_s: for starting it and loading the model.
        restart: start a new engine when one dies; if not, its requests fail.
    """

    command: Sequence[str] = COMMAND
    watchdog_s: float = 300.0
    load_timeout_s: float = 1800.0
    restart: bool = True


class Supervisor:
    """Owns the engine process. Used on one event loop.

    Args:
        options: fields of EngineConfig.
        how: see :class:`SupervisorOptions`.
        changed: called when requests may have to move from here, or can move to here.
        log: gets what the engine writes, and what happens to it.

    Attributes:
        state: see :class:`State`.
        info: the loaded engine; None before the first one is ready.
        counters: as last reported, summed over all engines but for the gauges.
        restarts: engines started after the first.
        share: what engines are started with.
        work: of all requests that are here, see :func:`dllmserve.core.work.work_of`.
    """

    def __init__(
        self,
        options: dict[str, Any],
        how: SupervisorOptions,
        *,
        changed: Callable[[], None] = lambda: None,
        log: logging.Logger = _log,
    ) -> None:
        self.state = State.STARTING
        self.info: EngineInfo | None = None
        self.restarts = 0
        self.share = Share(options)
        self.work = 0
        self._changed, self._log = changed, log
        self._how = how
        self._engine: EngineProcess | None = None
        #: set while an engine is being loaded; the EngineProcess itself would keep a stopped event
        #: loop in memory
        self._loading: subprocess.Popen[bytes] | None = None
        self._calls: dict[int, Call] = {}
        self._held: Line[Call] = Line()
        self._suspects: Line[Call] = Line()
        self._alone: Call | None = None
        self._past = Counters()
        self._now = Counters()
        self._task: asyncio.Task[None] | None = None
        self._failure: DllmServeError | None = None

    @property
    def counters(self) -> Counters:
        """As last reported; all but the gauges are summed over the engines of this supervisor."""
        here = Counters(waiting=len(self._held) + len(self._suspects))
        return added(self._past, self._now, here)

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine, also while it is being loaded."""
        process = self._loading if self._engine is None else self._engine
        return None if process is None else process.pid

    @property
    def requests(self) -> int:
        """Requests that are here, in the engine or waiting for it."""
        return len(self._calls)

    @property
    def running(self) -> int:
        """Requests that take part in forward passes."""
        return sum(call.running for call in self._calls.values())

    @property
    def open(self) -> bool:
        """Whether a request would go to the engine at once; not while suspects run alone."""
        ready = self._engine is not None and self.state is State.READY
        return ready and not self.suspected

    @property
    def suspected(self) -> bool:
        """Whether there are suspects: requests that run alone, because they may kill engines."""
        return bool(self._suspects) or self._alone is not None

    @property
    def silence(self) -> float:
        """Seconds since the engine's last heartbeat; 0 while there is no engine."""
        return 0.0 if self._engine is None else time.monotonic() - self._engine.last_message

    async def start(self) -> EngineInfo:
        """Start the engine and wait until it is ready.

        Raises:
            DllmServeError: model or options are wrong, or the engine did not start.
        """
        engine = await self._launch_first()
        self._task = asyncio.create_task(self._supervise(engine))
        await asyncio.sleep(0)  # let it begin: a task that is cancelled before that never runs
        return engine.info

    async def close(self) -> None:
        """End the engine; what is still under way fails."""
        self.state = State.CLOSED
        if self._engine is not None:
            await self._engine.stop()
            self._engine = None
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._fail_all(EngineError("the engine has been closed"))

    def kill_at_once(self, error: DllmServeError) -> subprocess.Popen[bytes] | None:
        """Kill the engine, even when its event loop does not run any more.

        Returns:
            Its process, which may take a moment to end; None if there is none.
        """
        self.state = State.CLOSED
        process = self._loading if self._engine is None else self._engine.process
        if process is not None:
            kill_for_good(process)
        for call in list(self._calls.values()):
            with contextlib.suppress(RuntimeError):  # the waiting task's event loop is closed
                self._end(call, error)
        return process

    async def failed(self) -> DllmServeError:
        """Wait until the supervisor gives up; returns why. Never returns otherwise."""
        if self._task is None:
            raise EngineError("the supervisor has not been started")
        await asyncio.shield(self._task)
        if self._failure is None:
            await asyncio.Event().wait()
        return self._failure or EngineError("the engine has been closed")

    def submit(self, request: Submit, work: int = 0) -> Call:
        """Queue a checked request.

        Args:
            request: the message that runs it.
            work: what it costs at most, see :func:`dllmserve.core.work.work_of`.

        Raises:
            EngineError: the engine is gone for good.
        """
        if self.state in (State.FAILED, State.CLOSED):
            raise self._failure or EngineError("the engine has been closed")
        call = Call(request, work)
        self.adopt(call)
        return call

    def holds(self, call: Call) -> bool:
        """Whether a request is here and has not ended."""
        return call.id in self._calls

    def stuck(self, *, suspects: bool = False) -> bool:
        """Whether :meth:`release` would give a request."""
        return bool(self._held and not self.open) or (suspects and bool(self._suspects))

    def release(self, *, suspects: bool = False) -> tuple[Call, bool]:
        """Give up a request that cannot be sent to the engine now; another supervisor adopts it.

        Args:
            suspects: give up suspects as well, after all others.

        Returns:
            The request, and whether it has to run alone.
        """
        alone = not (self._held and not self.open)
        call = self._suspects.popleft() if alone and suspects else self._held.popleft()
        self._leave(call)
        return call, alone

    def adopt(self, call: Call, *, alone: bool = False) -> None:
        """Take over a request, as the last in its line.

        Args:
            call: a new request, or one that another supervisor has released.
            alone: it is a suspect, so nothing else may run beside it.
        """
        self._calls[call.id] = call
        self.work += call.work
        (self._suspects if alone else self._held).append(call)
        self._send_held()

    def _leave(self, call: Call) -> None:
        """Stop counting a request here, if it is still counted."""
        if self._calls.pop(call.id, None) is not None:
            self.work -= call.work

    def abort(self, call: Call, error: DllmServeError | None = None) -> None:
        """Drop a request; its rows and pages are free after the current forward pass.

        Args:
            call: the request.
            error: what whoever waits for it gets; a RequestAbortedError by default.
        """
        if call.ended:
            return
        if call.in_engine and self._engine is not None:
            self._engine.send(Abort([call.id]))
        call.end(error or RequestAbortedError("the request has been aborted"))
        self._forget(call)

    def _forget(self, call: Call) -> None:
        self._leave(call)
        self._held.discard(call)
        self._suspects.discard(call)
        if self._alone is call:
            self._alone = None
        self._send_held()

    def _send_held(self) -> None:
        """Send the requests that the engine may run now: one suspect at a time, then all others."""
        if self._engine is None or self.state is not State.READY:
            return
        if self.suspected:
            free = self._alone is None
            if self._suspects and free and not any(c.in_engine for c in self._calls.values()):
                self._alone = self._suspects.popleft()
                self._send(self._engine, self._alone)
            return
        while self._held:
            self._send(self._engine, self._held.popleft())

    def _send(self, engine: EngineProcess, call: Call) -> None:
        call.in_engine = True
        engine.send(call.submit)

    def _handle(self, message: FromWorker) -> None:
        """Handle a message of the engine."""
        if isinstance(message, Admitted):
            for id in message.ids:
                if call := self._calls.get(id):
                    call.start()
        elif isinstance(message, Report):
            self._now = message.counters
            for part in message.committed:
                if call := self._calls.get(part.id):
                    call.put(Delta(part.token_ids, part.logprobs))
            for canvas in message.canvases:
                if call := self._calls.get(canvas.id):
                    call.put(canvas.step)
            for finished in message.finished:
                if call := self._calls.get(finished.id):
                    self._end(call, finished.output)
            for failed in message.failed:
                if call := self._calls.get(failed.id):
                    self._end(call, error_named(failed.error, failed.message))
        self._changed()

    def _end(self, call: Call, result: Any) -> None:
        call.end(result)
        self._forget(call)

    async def _launch_first(self) -> EngineProcess:
        """Start an engine. If a signal stops it while it starts, start another one."""
        for _ in range(MAX_FAILED_STARTS - 1):
            try:
                return await self._launch()
            except EngineStoppedError as error:
                self._log.error("%s while it started", error)
        return await self._launch()

    async def _launch(self) -> EngineProcess:
        self._refuse_closed()
        engine = EngineProcess(self.share, self._how.command, self._log)
        self._loading = engine.process
        try:
            await engine.load(self._how.load_timeout_s)
        except DllmServeError:
            self._refuse_closed()  # close() ended it: say that, rather than how it died
            raise
        finally:
            self._loading = None
        if self.state is State.CLOSED:
            await engine.stop()
        self._refuse_closed()
        self._engine, self.info = engine, engine.info
        self.state = State.READY
        self._send_held()
        self._changed()
        return engine

    def _refuse_closed(self) -> None:
        if self.state is State.CLOSED:
            raise EngineError("the engine has been closed")

    async def _supervise(self, engine: EngineProcess) -> None:
        """Keep engines alive. If that itself fails, all requests end with an error."""
        try:
            await self._keep_alive(engine)
        except asyncio.CancelledError:
            if self.state is not State.CLOSED:  # the event loop ends, so the engine ends as well
                self.kill_at_once(EngineError("the engine's event loop has ended"))
                await (self._engine or engine).ended()
            raise
        except Exception:
            if self.state is State.CLOSED:  # the event loop was closed while its tasks ran
                return
            self._log.exception("the supervision of the engine failed")
            if self._engine is not None:
                self._engine.kill()
            self._give_up(EngineError("the supervision of the engine failed"))

    async def _keep_alive(self, engine: EngineProcess) -> None:
        """Run engines until closed, or until they do not start any more."""
        failed_starts, reason = 0, ""
        running: EngineProcess | None = engine
        while True:
            if running is not None:
                born = time.monotonic()
                death = await running.run(self._handle, self._how.watchdog_s)
                if self.state is State.CLOSED:
                    return
                suspected = self._judge(death)
                settled = suspected or time.monotonic() - born > _SETTLED_S
                failed_starts, reason = 0 if settled else failed_starts + 1, death.text
                if not self._how.restart:
                    return self._give_up(EngineDiedError(f"{death.text}; restarts are off"))
            if failed_starts >= MAX_FAILED_STARTS:
                return self._give_up(
                    EngineStartError(
                        f"the engine failed to start {failed_starts} times in a row: {reason}"
                    )
                )
            await asyncio.sleep(min(_FIRST_PAUSE_S * 4**failed_starts, _LAST_PAUSE_S))
            self.restarts += 1
            try:
                running = await self._launch()
                self._log.info("a new engine is ready (process %d)", running.pid)
            except DllmServeError as error:
                if self.state is State.CLOSED:
                    return
                running = None
                failed_starts, reason = failed_starts + 1, str(error)
                self._log.error("the engine could not be started again: %s", error)

    def _judge(self, death: Death) -> bool:
        """Decide what happens to every request after a death; True if any was running."""
        self._log.error("%s", death.text)
        self.state, self._engine, self._alone = State.RESTARTING, None, None
        counted = added(self._past, self._now)
        self._past = replace(counted, waiting=0, running=0, pages_used=0.0)
        self._now = Counters()
        lost = [call for call in self._calls.values() if call.in_engine]
        running = [call for call in lost if call.running]
        cause = Cause.CRASHED if death.cause is Cause.STOPPED else death.cause
        again: list[Call] = []
        for call in lost:
            fate = call.judge(cause, alone=len(running) == 1)
            if fate is Fate.FAIL:
                self._end(call, EngineDiedError(_why(death)))
            elif fate is Fate.ALONE:
                self._suspects.append(call)
            else:
                again.append(call)
        self._held.put_back(again)
        self._changed()
        return bool(running)

    def _give_up(self, error: DllmServeError) -> None:
        self._log.critical("%s: giving up", error)
        self.state, self._failure = State.FAILED, error
        try:
            self._changed()  # other engines may take the requests
        finally:
            self._fail_all(error)

    def _fail_all(self, error: DllmServeError) -> None:
        for call in list(self._calls.values()):
            self._end(call, error)


def _why(death: Death) -> str:
    return (
        f"{death.text} while it answered this request; it was not run again, because text had "
        "been given out already or because it had happened before"
    )
