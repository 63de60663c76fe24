"""EngineProcess: one engine process, from its start to its end."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from dllmserve._environment import child_environment
from dllmserve.cores import wait_variables
from dllmserve.errors import DllmServeError, EngineStartError, error_named
from dllmserve.process.calls import Cause, Death
from dllmserve.process.channel import Connection, Listener
from dllmserve.process.messages import (
    Configure,
    Crashed,
    EngineInfo,
    FromEngine,
    NotLoaded,
    Ready,
    Stop,
    ToEngine,
    decode_from_engine,
    encode,
)
from dllmserve.ranks.daemon import STOPPED_S, StopClock

_log = logging.getLogger("dllmserve.engine")

#: how an engine is started; the socket's path and the owner's process id follow
COMMAND = (sys.executable, "-m", "dllmserve.process.child")
#: seconds that an engine gets to leave by itself, and to write its stacks, before it is killed
STOP_S = 5.0
STACKS_S = 1.0
#: a longer pause between two looks at an engine means that this process did not run
_PAUSE_S = 3.0
#: signals that no engine sends itself
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM)
_MAX_LINE = 1 << 16
_NO_MESSAGE = "the engine sent what is no message"
_WAS_STOPPED = "the engine's process was stopped, and was killed"


class EngineStoppedError(EngineStartError):
    """A signal stopped the engine while it was starting: nothing is wrong with it."""


class EngineProcess:
    """A running engine. Made by :meth:`start`.

    Attributes:
        info: the loaded engine.
        pid: its process id.
        last_message: monotonic seconds of its last sign of life.
    """

    def __init__(self, process: asyncio.subprocess.Process, log: logging.Logger) -> None:
        self.info: EngineInfo
        self.pid = process.pid
        self.last_message = time.monotonic()
        self._process = process
        self._connection: Connection
        self._log = log
        self._crash: str | None = None
        self._killed = False
        self._hung = self._stopped = False
        #: seconds; an engine that loads its model is silent
        self._silence_limit = math.inf
        self._relay = asyncio.create_task(_relay_log(process, log))
        self._watchdog = asyncio.create_task(self._watch())

    @classmethod
    async def start(
        cls,
        options: dict[str, Any],
        *,
        timeout_s: float,
        command: Sequence[str] = COMMAND,
        environment: Mapping[str, str] | None = None,
        log: logging.Logger = _log,
        begun: Callable[[int], object] | None = None,
    ) -> EngineProcess:
        """Start a process and wait until its model is loaded.

        Args:
            options: fields of EngineConfig.
            timeout_s: for all of it.
            command: program and arguments; the socket and the owner's id are appended.
            environment: variables that it gets besides this process's own.
            log: where what it writes goes.
            begun: called with the process's id before its model is loaded, so that it can be
                killed where this event loop does not run any more.

        Raises:
            DllmServeError: what the engine says is wrong with model or options.
            EngineStartError: it died, took too long, or the system had no room for it; an
                EngineStoppedError if a signal had stopped it.
        """
        try:
            return await cls._start(options, timeout_s, command, environment, log, begun)
        except DllmServeError:
            raise
        except OSError as error:  # too many processes or open files, a full disk
            raise EngineStartError(f"the engine could not be started: {error}") from error

    @classmethod
    async def _start(
        cls,
        options: dict[str, Any],
        timeout_s: float,
        command: Sequence[str],
        environment: Mapping[str, str] | None,
        log: logging.Logger,
        begun: Callable[[int], object] | None,
    ) -> EngineProcess:
        listener = Listener()
        self: EngineProcess | None = None
        try:
            await listener.start()
            process = await asyncio.create_subprocess_exec(
                *command,
                listener.path,
                str(os.getpid()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                limit=_MAX_LINE,
                env=child_environment(wait_variables(), environment or {}),
                start_new_session=True,  # Ctrl-C in a terminal is for the owner alone
            )
            self = cls(process, log)
            if begun is not None:
                begun(process.pid)
            async with asyncio.timeout(timeout_s):
                await self._meet(listener, options)
            return self
        except BaseException as error:
            if self is not None:
                self._watchdog.cancel()
                await _end(self._process)
            if isinstance(error, TimeoutError):
                raise EngineStartError(
                    f"the engine was not ready after {timeout_s:g} s: give it more time, or "
                    "look at its log"
                ) from error
            if self is not None and self._stopped and isinstance(error, EngineStartError):
                raise EngineStoppedError(_WAS_STOPPED) from error
            raise
        finally:
            listener.close()

    async def _meet(self, listener: Listener, options: dict[str, Any]) -> None:
        """Connect to the new process, configure it and wait until it is ready."""
        accepting = asyncio.create_task(listener.accept(self.pid))
        dead = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait((accepting, dead), return_when=asyncio.FIRST_COMPLETED)
            if not accepting.done():
                await self._relay  # what it said is the reason
                raise EngineStartError(f"the engine {_how(self._process)} before it had started")
            self._connection = accepting.result()
        finally:
            accepting.cancel()
            dead.cancel()
        try:
            await self._load(options)
        except BaseException:
            self._connection.close()
            raise

    async def _load(self, options: dict[str, Any]) -> None:
        """Configure the engine and wait until it is ready."""
        self.send(Configure(options))
        while (data := await self._connection.receive()) is not None:
            self.last_message = time.monotonic()
            try:
                message = decode_from_engine(data)
            except msgspec.MsgspecError as error:
                raise EngineStartError(f"{_NO_MESSAGE}: {error}") from error
            if isinstance(message, NotLoaded):
                if message.stopped:
                    raise EngineStoppedError(message.message)
                raise error_named(message.error, message.message)
            if isinstance(message, Ready):
                self.info = message.info
                return
        await self._process.wait()
        raise EngineStartError(f"the engine {_how(self._process)} while it loaded the model")

    def send(self, message: ToEngine) -> None:
        """Send a message; that the engine is dead is noticed elsewhere."""
        self._connection.send(encode(message))

    async def run(self, handle: Callable[[FromEngine], None], watchdog_s: float) -> Death:
        """Hand every message to ``handle`` until the process ends.

        Args:
            handle: called with each message.
            watchdog_s: an engine that says nothing for this long is killed; its threads'
                stacks are in the log then.
        """
        self._silence_limit = watchdog_s
        try:
            while (data := await self._connection.receive()) is not None:
                message = decode_from_engine(data)
                self.last_message = time.monotonic()
                if isinstance(message, Crashed):
                    self._crash = f"the engine's step failed: {message.message}"
                    self._killed = message.killed
                else:
                    handle(message)
        except msgspec.MsgspecError as error:
            self._crash = f"{_NO_MESSAGE}: {error}"
            self.kill()
        finally:
            self._watchdog.cancel()
            self._connection.close()
        return await self._death()

    def kill(self) -> None:
        """End the process at once."""
        with suppress(ProcessLookupError):
            self._process.kill()

    async def gone(self) -> None:
        """Wait until the process has ended."""
        await self._process.wait()

    async def stop(self) -> None:
        """Ask the process to leave, and see to it that it does."""
        self.send(Stop())
        try:
            async with asyncio.timeout(STOP_S):
                await self._process.wait()
        except TimeoutError:
            await _end(self._process)
        finally:
            self.kill()  # whoever waited may have been cancelled
            self._watchdog.cancel()
            self._connection.close()

    async def _watch(self) -> None:
        """Kill an engine that is stopped at any time, or says nothing for too long."""
        stopped, looked = StopClock(self.pid, _PAUSE_S), time.monotonic()
        while True:
            now = time.monotonic()
            if now - looked > _PAUSE_S:  # this process was stopped itself: time that does not count
                self.last_message += now - looked
            looked = now
            if (seconds := stopped.seconds()) > STOPPED_S:
                self._stopped = True
                self._log.error("the engine's process has been stopped for %.0f s", seconds)
                return self.kill()
            silent = now - self.last_message
            if silent > self._silence_limit:
                break
            await asyncio.sleep(min(self._silence_limit - silent + 0.01, 1.0))
        self._hung = True
        self._log.error("the engine has been silent for %.0f s; its stacks follow", silent)
        with suppress(ProcessLookupError):  # it may end at any moment
            self._process.send_signal(signal.SIGUSR1)
            await asyncio.sleep(STACKS_S)
            self.kill()

    async def _death(self) -> Death:
        """What the process died of."""
        try:
            async with asyncio.timeout(STOP_S):
                code = await self._process.wait()
        except TimeoutError:  # it closed its socket and lives on
            await _end(self._process)
            return Death(Cause.HUNG, "the engine closed its socket and did not leave")
        how = f"the engine {_how(self._process)}"
        if self._hung:
            return Death(Cause.HUNG, "the engine hung and was killed")
        if self._stopped:
            return Death(Cause.KILLED, _WAS_STOPPED)
        if self._crash is not None:
            return Death(Cause.KILLED if self._killed else Cause.CRASHED, self._crash)
        if code == 0:
            return Death(Cause.STOPPED, how)
        return Death(Cause.KILLED if -code in _FROM_OUTSIDE else Cause.CRASHED, how)


def runs(pid: int) -> bool:
    """Whether a child of this process has not ended. Leaves its exit code to whoever waits."""
    try:
        if hasattr(os, "waitid"):
            return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        os.kill(pid, 0)  # macOS before Python 3.13: asyncio's thread takes the exit code at once
    except (ChildProcessError, ProcessLookupError):
        return False
    return True


def kill(pid: int) -> None:
    """End a child of this process at once, unless it has ended."""
    if runs(pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _how(process: asyncio.subprocess.Process) -> str:
    """How a process ended, for people."""
    code = process.returncode
    if code is None:
        return "closed its socket"
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    return f"ended with code {code}"


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill a process, if it still runs, and wait for it."""
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def _relay_log(process: asyncio.subprocess.Process, log: logging.Logger) -> None:
    """Log every line that the process writes, so that logs have one format."""
    stream = process.stdout
    if stream is None:
        return
    while True:
        try:
            line = await stream.readline()
        except ValueError:  # longer than _MAX_LINE; readline() has dropped it
            log.warning("a line of more than %d bytes was left out", _MAX_LINE)
            continue
        if not line:
            return
        log.info("%s", line.decode(errors="replace").rstrip())
