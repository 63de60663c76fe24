"""Worker: a child process that this process starts, sends messages to, watches and ends."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import msgspec

from dllmserve._environment import child_environment
from dllmserve.cores import wait_variables
from dllmserve.process.channel import Connection
from dllmserve.process.child import is_stopped
from dllmserve.process.messages import (
    Crashed,
    FromWorker,
    Stop,
    ToWorker,
    decode_from_worker,
    encode,
)

#: how a worker is started; the descriptor of its socket and the owner's process id follow
COMMAND = (sys.executable, "-m", "dllmserve.engine.worker")
#: seconds for which a signal (SIGSTOP, for instance) may stop a worker before it is killed
STOPPED_S = 10.0
#: seconds that a worker gets to end by itself, and to write its stacks, before it is killed
STOP_S = 5.0
STACKS_S = 1.0
#: seconds between two checks of a worker, and of a worker that is about to end
_TICK_S, _ENDING_S = 0.5, 0.01
#: a longer pause between two checks means that this process itself was stopped
_PAUSE_S = 3.0
#: signals that no worker sends itself
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM)
_MAX_LINE = 1 << 16


class Cause(Enum):
    """Why a worker ended."""

    STOPPED = "stopped"
    KILLED = "killed"
    CRASHED = "crashed"
    HUNG = "hung"


@dataclass(frozen=True)
class Death:
    """The end of a worker.

    Attributes:
        cause: KILLED means a signal that only comes from outside (SIGKILL, SIGTERM, SIGSTOP).
        text: for the log and for errors.
        frozen: a signal had stopped it, so nothing is wrong with it.
    """

    cause: Cause
    text: str
    frozen: bool = False


class Worker:
    """A child process, started at once and watched from :meth:`open` on, on one event loop.

    It is killed when a signal has stopped it for STOPPED_S seconds, or when it has sent nothing
    for ``silence_s`` seconds.

    Args:
        name: for people, such as "the engine" or "rank 1".
        command: program and arguments; descriptor and owner's id are appended.
        environment: variables that it gets besides this process's own.
        log: gets what happens to it.
        relayed: log what it writes as well, so that logs have one format.

    Attributes:
        process: its handle, which may be used in any thread.
        socket: this process's end.
        last_message: monotonic seconds of its last message, which counts as a heartbeat.
        silence_s: longest silence in seconds; infinite until :meth:`run` sets it.
        noted: why it dies, once that is known; it may be known before its end.

    Raises:
        OSError: too many processes or open files.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: logging.Logger,
        relayed: bool = False,
    ) -> None:
        self.name = name
        self.silence_s = math.inf
        self.noted: Death | None = None
        self._log = log
        self.socket, other = socket.socketpair()
        try:
            with other:
                self.process = subprocess.Popen(
                    [*command, str(other.fileno()), str(os.getpid())],
                    pass_fds=(other.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if relayed else None,
                    stderr=subprocess.STDOUT if relayed else None,
                    env=child_environment(wait_variables(), _source(), environment),
                    start_new_session=True,  # Ctrl-C in a terminal is for the owner alone
                )
        except BaseException:
            self.socket.close()
            raise
        self.last_message = time.monotonic()
        self._connection: Connection | None = None
        self._watchdog: asyncio.Task[None] | None = None
        self._relay: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    async def open(self) -> None:
        """Connect to the process and start to watch it."""
        self._connection = await Connection.open(self.socket)
        self._watchdog = asyncio.create_task(self._watch())
        if self.process.stdout is not None:
            self._relay = asyncio.create_task(self._relay_log())

    def send(self, message: ToWorker) -> None:
        """Send a message. A dead worker is no error here: :meth:`receive` notices it."""
        if self._connection is not None:
            self._connection.send(encode(message))

    async def receive(self) -> FromWorker | None:
        """Its next message; None once it has closed its socket or sent invalid bytes."""
        data = None if self._connection is None else await self._connection.receive()
        if data is None:
            return None
        self.last_message = time.monotonic()
        try:
            message = decode_from_worker(data)
        except msgspec.MsgspecError as error:
            self._note_death(Cause.CRASHED, f"sent what is no message: {error}")
            self.kill()
            return None
        if isinstance(message, Crashed):
            cause = Cause.KILLED if message.killed else Cause.CRASHED
            self._note_death(cause, f"failed: {message.message}")
        return message

    async def run(self, handle: Callable[[FromWorker], None], silence_s: float) -> Death:
        """Hand every message to ``handle`` until the process ends.

        Args:
            handle: called with each message.
            silence_s: a worker that says nothing for this long is killed; its threads' stacks
                are in the log then.
        """
        self.silence_s = silence_s
        try:
            while (message := await self.receive()) is not None:
                handle(message)
        finally:
            self.close()
        return await self.death()

    def kill(self) -> None:
        """End the process at once, unless it has ended."""
        self.process.kill()

    async def ended(self, patience_s: float = math.inf) -> bool:
        """Wait until the process has ended; False if it has not within ``patience_s``."""
        until = time.monotonic() + patience_s
        while self.process.poll() is None:
            if time.monotonic() > until:
                return False
            await asyncio.sleep(_ENDING_S)
        return True

    async def end(self) -> None:
        """Kill the process, if it still runs, and wait for it."""
        self.kill()
        self.close()
        await self.ended()

    async def stop(self) -> None:
        """Ask the process to end, and kill it if it does not."""
        self.send(Stop())
        try:
            await self.ended(STOP_S)
        finally:
            self.kill()  # also when the wait above was cancelled
            self.close()
        await self.ended()

    def close(self) -> None:
        """Stop watching the process and close the socket."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        if self._connection is not None:
            self._connection.close()
        else:
            self.socket.close()

    async def death(self) -> Death:
        """Why the process died. Called once it has closed its socket, or was killed."""
        if not await self.ended(STOP_S):
            self._note_death(Cause.HUNG, "closed its socket and did not leave")
            await self.end()
        code = self.process.returncode
        if code < 0:
            cause = Cause.KILLED if -code in _FROM_OUTSIDE else Cause.CRASHED
            self._note_death(cause, f"died of {signal.Signals(-code).name}")
        return self._note_death(Cause.CRASHED if code else Cause.STOPPED, f"ended with code {code}")

    async def relayed(self) -> None:
        """Wait until all that it wrote is logged, a second at most: children may hold its pipe."""
        if self._relay is not None:
            await asyncio.wait({self._relay}, timeout=STACKS_S)

    def _note_death(self, cause: Cause, how: str, *, frozen: bool = False) -> Death:
        """Note why it dies; the first reason counts."""
        self.noted = self.noted or Death(cause, f"{self.name} {how}", frozen)
        return self.noted

    async def _watch(self) -> None:
        """Kill the worker when a signal has stopped it, or when it is silent, for too long."""
        looked = ran = time.monotonic()
        while True:
            now = time.monotonic()
            if now - looked > _PAUSE_S:  # this process was stopped: that time does not count
                self.last_message, ran = self.last_message + now - looked, now
            looked = now
            ran = ran if is_stopped(self.pid) else now
            if now - ran > STOPPED_S:
                how = f"has been stopped for {now - ran:.0f} s, and was killed"
                self._log.error("%s", self._note_death(Cause.KILLED, how, frozen=True).text)
                return self.kill()
            silent = now - self.last_message
            if silent > self.silence_s:
                break
            await asyncio.sleep(_TICK_S)
        how = f"was silent for {silent:.0f} s: it hung and was killed"
        death = self._note_death(Cause.HUNG, how)
        self._log.error("%s; its stacks follow", death.text)
        self.process.send_signal(signal.SIGUSR1)
        await asyncio.sleep(STACKS_S)
        self.kill()

    async def _relay_log(self) -> None:
        """Log every line that the process writes."""
        stream = asyncio.StreamReader(limit=_MAX_LINE)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), self.process.stdout
        )
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # longer than _MAX_LINE; readline() has dropped it
                self._log.warning("a line of more than %d bytes was left out", _MAX_LINE)
                continue
            if not line:
                return
            self._log.info("%s", line.decode(errors="replace").rstrip())


def kill_for_good(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker's process, where no event loop may be left to wait for its end."""
    process.kill()
    with suppress(RuntimeError):  # at the interpreter's end, where the system takes care of it
        threading.Thread(target=process.wait, name="dllmserve-end", daemon=True).start()


def _source() -> dict[str, str]:
    """PYTHONPATH for a worker, if this package is not installed in site-packages."""
    source = Path(__file__).parents[2]
    if source.name in ("site-packages", "dist-packages"):
        return {}
    paths = [str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}
