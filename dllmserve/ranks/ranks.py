"""Ranks: the other ranks of an engine, as rank 0 sees them.

A thread watches them. When one dies, fails, is stopped or silent for too long, it ends all of them
and lets rank 0 go if that waits for them; whatever rank 0 does next raises a RankError.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

import torch

from dllmserve.errors import RankError
from dllmserve.parallel.group import TorchGroup
from dllmserve.ranks.daemon import STOPPED_S, StopClock
from dllmserve.ranks.signs import FAILED, REACHED
from dllmserve.ranks.wire import Kind, encode_kind
from dllmserve.runtime.platform import first_line

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_log = logging.getLogger("dllmserve.ranks")

#: seconds of silence after which a rank that is not stopped counts as dead: there are moments in
#: which C code lets no thread of it run
SILENCE_S = 120.0
#: seconds after which an exchange between ranks, or a step, that does not end has failed
EXCHANGE_S = 600.0
#: seconds that ranks get to leave by themselves, and that it may take to hear of a death
_STOP_S, _HEAR_S = 5.0, 3.0
_TICK_S = 0.25
#: a longer pause between two looks at the ranks means that this process did not run
_PAUSE_S = 2.0
#: signals that no rank sends itself
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)


class Ranks:
    """Ranks 1 to N - 1.

    Args:
        launch: starts them; called in the thread that watches them, because a process that is
            tied to its parent is tied to the thread that made it.
        store: where the ranks of the group find each other.

    Attributes:
        failure: why the engine can not go on; None while it can.
        pids: process ids, where this process has started them.

    Raises:
        RankError: they could not be started.
    """

    def __init__(self, launch: Callable[[], Sequence[Peer]], store: Store) -> None:
        self.failure: RankError | None = None
        self._store = store
        self._group: TorchGroup | None = None
        self._peers: Sequence[Peer] = ()
        self._launch = launch
        self._news = threading.Condition()
        self._sending = threading.Lock()
        # told to leave; and seen to have left
        self._leaving = self._over = False
        self._thread = threading.Thread(target=self._watch, name="dllmserve-ranks", daemon=True)
        self._thread.start()
        try:
            self._hear_until(lambda: bool(self._peers))
        except BaseException:
            self.stop()
            raise

    @property
    def size(self) -> int:
        """Ranks, this one included."""
        return len(self._peers) + 1

    @property
    def pids(self) -> list[int]:
        """Process ids of ranks that were started here."""
        return [peer.pid for peer in self._peers if peer.process is not None]

    def check(self) -> None:
        """Raise RankError if a rank is gone."""
        if self.failure is not None:
            failure = self.failure
            raise RankError(str(failure), killed=failure.killed, stopped=failure.stopped)

    def wait_for(self, stage: str) -> None:
        """Wait until all ranks have reached a stage. Raises RankError if one will not."""
        self._hear_until(lambda: all(stage in peer.stages for peer in self._peers))

    def group(self, device: torch.device) -> TorchGroup:
        """Connect the group that exchanges tensors; all ranks must have started.

        Raises:
            RankError: a rank is gone. The thread that still waits for it then is left behind.
        """
        made: list[TorchGroup | Exception] = []

        def connect() -> None:
            try:
                group = TorchGroup(self._store, 0, self.size, device, EXCHANGE_S)
                group.connect()
                made.append(group)
            except Exception as error:
                made.append(error)
            with self._news:
                self._news.notify_all()

        threading.Thread(target=connect, name="dllmserve-connect", daemon=True).start()
        self._hear_until(lambda: bool(made))
        (found,) = made
        if isinstance(found, Exception):
            raise self.explain(found) from found
        self._group = found
        return found

    def _hear_until(self, reached: Callable[[], bool]) -> None:
        """Wait for news. Raises RankError if a rank is gone."""
        with self._news:
            self._news.wait_for(lambda: self.failure or reached())
        self.check()

    def send(self, data: bytes) -> None:
        """Send a message to all ranks, from any thread. Raises RankError if one is gone."""
        self.check()
        try:
            with self._sending:
                for peer in self._peers:
                    peer.connection.send_bytes(data)
        except OSError as error:
            raise self.explain(error) from error

    def explain(self, error: BaseException) -> RankError:
        """What an error in the middle of a step means: a rank is gone, or rank 0 has failed.

        Either way the ranks are out of step, so all of them end.
        """
        with self._news:
            self._news.wait_for(lambda: self.failure is not None, timeout=_HEAR_S)
        self.give_up(error)
        return self.failure or RankError("the engine is being closed")

    def give_up(self, error: BaseException) -> None:
        """Rank 0 has left a step in its middle: the engine is over."""
        self._fail(RankError(f"rank 0 failed: {type(error).__name__}: {first_line(error)}"))

    def await_event(self, event: torch.cuda.Event) -> None:
        """Wait for the device, but not for ever on a rank that is gone. Raises RankError."""
        began = time.monotonic()
        while not event.query():  # type: ignore[no-untyped-call]
            if self.failure is not None:
                break
            if time.monotonic() - began > EXCHANGE_S:
                self._fail(RankError(f"a step did not end within {EXCHANGE_S:g} s"))
            time.sleep(2e-5)
        self.check()

    def stop(self) -> None:
        """End the ranks; those that do not leave are killed. Safe to call again."""
        if self._over:
            return
        self._leaving = True
        clean = self.failure is None
        with suppress(RankError):
            self.send(encode_kind(Kind.STOP))
        until = time.monotonic() + _STOP_S
        for peer in self._peers:
            peer.end(max(until - time.monotonic(), 0.0))
        with self._news:
            self.failure = self.failure or RankError("the engine has been closed")
            self._over = True
            self._news.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(_TICK_S * 4)
        for peer in self._peers:
            peer.connection.close()
        if self._group is not None and clean:
            self._group.abort()  # the other ranks have left, so there is nothing to finish

    def _watch(self) -> None:
        """Start the ranks, then listen to them until they are stopped, or one is gone."""
        try:
            peers = self._launch()
        except Exception as error:
            self._fail(RankError(f"the ranks could not be started: {first_line(error)}"))
            return
        with self._news:
            self._peers = peers
            self._news.notify_all()
        last = time.monotonic()
        while not self._over and self.failure is None:
            here = [peer.connection for peer in peers if not peer.left]
            if not here:
                time.sleep(_TICK_S)
            try:
                ready = wait(here, _TICK_S)
            except OSError:  # another thread has seen that a rank is gone
                continue
            now = time.monotonic()
            if now - last > _PAUSE_S:  # this process was stopped itself, and heard nobody
                for peer in peers:
                    peer.heard = now
            last = now
            for peer in peers:
                if peer.connection in ready:
                    self._hear(peer)
                elif peer.silence > _TICK_S and (seconds := peer.stopped.seconds()) > STOPPED_S:
                    reason = f"rank {peer.rank} has been stopped for {seconds:.0f} s"
                    self._fail(RankError(reason, killed=True, stopped=True))
                elif peer.silence > SILENCE_S:
                    reason = f"rank {peer.rank} has been silent for {peer.silence:.0f} s: it hangs"
                    self._fail(RankError(reason, killed=True))

    def _hear(self, peer: Peer) -> None:
        """Take in a message, or that there will be none any more."""
        try:
            data = peer.connection.recv_bytes()
        except (EOFError, OSError):
            peer.left = True
            if not self._leaving:
                self._fail(peer.death())
            return
        peer.heard = time.monotonic()
        if data[:1] == FAILED:
            said = RankError(f"rank {peer.rank} failed: {data[1:].decode()}")
            self._fail(self._reason(peer) or said)
        elif data[:1] == REACHED:
            with self._news:
                peer.stages.add(data[1:].decode())
                self._news.notify_all()

    def _reason(self, said: Peer) -> RankError | None:
        """The death of another rank, from which a rank's own failure may have come."""
        until = time.monotonic() + _TICK_S
        while time.monotonic() < until:
            for peer in self._peers:
                if peer is not said and peer.dead:
                    return peer.death()
            time.sleep(0.01)
        return None

    def _fail(self, failure: RankError) -> None:
        """The engine is over: end all ranks, and whatever waits for them."""
        with self._news:
            if self.failure is not None or self._leaving:
                return
            self.failure = failure
            self._news.notify_all()
        _log.error("%s; all ranks of this engine end", failure)
        for peer in self._peers:
            peer.end(0.0)
            if peer.process is None:
                peer.connection.close()  # all that can be done to it from here
        if self._group is not None:
            self._group.abort()


class Peer:
    """One other rank.

    Args:
        rank: its number.
        connection: to it.
        pid: its process id.
        process: None where somebody else has started it.

    Attributes:
        heard: monotonic seconds of its last sign of life.
        left: its connection is closed.
        stages: what it has reached.
    """

    def __init__(
        self,
        rank: int,
        connection: Connection,
        pid: int,
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self.rank, self.connection, self.pid, self.process = rank, connection, pid, process
        self.heard = time.monotonic()
        self.stopped = StopClock(pid, _PAUSE_S)
        self.left = False
        self.stages: set[str] = set()

    @property
    def silence(self) -> float:
        """Seconds since its last sign of life."""
        return time.monotonic() - self.heard

    @property
    def dead(self) -> bool:
        """Whether it was started here and a signal has ended it."""
        return self.process is not None and (self.process.poll() or 0) < 0

    def death(self) -> RankError:
        """What it died of."""
        if self.process is None:
            return RankError(f"rank {self.rank} is gone")
        try:
            code = self.process.wait(_HEAR_S)
        except subprocess.TimeoutExpired:
            return RankError(f"rank {self.rank} closed its connection")
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return RankError(f"rank {self.rank} {how}", killed=code in _FROM_OUTSIDE)

    def end(self, patience_s: float) -> None:
        """See to it that the rank has ended, if this process has started it."""
        if self.process is not None:
            try:
                self.process.wait(patience_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
