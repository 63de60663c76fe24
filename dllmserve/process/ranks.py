"""Ranks: the other ranks of an engine, as rank 0 sees them.

Each rank is a worker. A thread starts and watches them on an event loop of its own. When a rank
ends, fails, or is stopped or silent for too long, the thread ends all ranks and wakes rank 0 if it
waits for them. Whatever rank 0 does next raises a RankError.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from dllmserve.cores import THREAD_VARIABLES
from dllmserve.errors import RankError
from dllmserve.parallel.torch_group import TorchGroup
from dllmserve.process.channel import Channel, ChannelClosed
from dllmserve.process.messages import Crashed, FromWorker, Join, Reached, Stop, ToWorker, encode
from dllmserve.process.worker import COMMAND, STOP_S, Cause, Death, Worker
from dllmserve.runtime.platform import first_line

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_log = logging.getLogger("dllmserve.ranks")

#: seconds of silence after which a rank that is not stopped counts as dead; it is long because C
#: code may keep the heartbeat's thread from running
SILENCE_S = 120.0
#: seconds after which an exchange between ranks, or a step, counts as failed
EXCHANGE_S = 600.0
#: seconds to wait for the news of a rank's death, and of another death that caused it
_HEAR_S, _REASON_S = 3.0, 0.25
#: seconds that the watching thread gets to notice that all ranks have ended
_JOIN_S = 1.0


class Ranks:
    """Ranks 1 to N - 1.

    Args:
        size: ranks, this one included.
        options: fields of EngineConfig.
        threads: of a rank, for torch on a CPU.

    Attributes:
        failure: why the engine cannot go on; None while it can.

    Raises:
        RankError: they could not be started.
    """

    def __init__(self, size: int, options: Mapping[str, Any], *, threads: int) -> None:
        self.size = size
        self.failure: RankError | None = None
        self._options, self._threads = dict(options), threads
        self._store, self._port = make_store(size)
        self._group: TorchGroup | None = None
        self._workers: list[Worker] = []
        self._channels: list[Channel] = []
        self._reached: Counter[str] = Counter()
        self._news = threading.Condition()
        self._sending = threading.Lock()
        # whether the ranks were told to end; whether all have ended
        self._leaving = self._over = False
        self._thread = threading.Thread(target=self._watch, name="dllmserve-ranks", daemon=True)
        self._thread.start()
        try:
            self._hear_until(lambda: bool(self._workers))
        except BaseException:
            self.stop()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the other ranks."""
        return [worker.pid for worker in self._workers]

    def check(self) -> None:
        """Raise RankError if a rank is gone."""
        if self.failure is not None:
            failure = self.failure
            raise RankError(str(failure), killed=failure.killed, stopped=failure.stopped)

    def wait_for(self, stage: str) -> None:
        """Wait until all have :class:`Reached` a stage. Raises RankError if one will not."""
        self._hear_until(lambda: self._reached[stage] == self.size - 1)

    def group(self, device: torch.device) -> TorchGroup:
        """Connect the group that exchanges tensors; all ranks must have started.

        Raises:
            RankError: a rank is gone. The thread that connects stays behind then.
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

    def send(self, message: ToWorker) -> None:
        """Send a message to all ranks, from any thread. Raises RankError if one is gone."""
        self.check()
        data = encode(message)
        try:
            with self._sending:
                for channel in self._channels:
                    channel.send(data)
        except ChannelClosed as error:
            raise self.explain(error) from error

    def explain(self, error: BaseException) -> RankError:
        """The RankError for an error in the middle of a step: a rank is gone, or rank 0 failed.

        Either way the ranks are out of step, so all of them are ended.
        """
        with self._news:
            self._news.wait_for(lambda: self.failure is not None, timeout=_HEAR_S)
        self.give_up(error)
        return self.failure or RankError("the engine is being closed")

    def give_up(self, error: BaseException) -> None:
        """End the engine, because rank 0 left a step in its middle."""
        self._fail(RankError(f"rank 0 failed: {type(error).__name__}: {first_line(error)}"))

    def await_event(self, event: torch.cuda.Event) -> None:
        """Wait for the device. Raises RankError if a rank is gone, or after EXCHANGE_S seconds."""
        began = time.monotonic()
        while not event.query():  # type: ignore[no-untyped-call]
            if self.failure is not None:
                break
            if time.monotonic() - began > EXCHANGE_S:
                self._fail(RankError(f"a step did not end within {EXCHANGE_S:g} s"))
            time.sleep(2e-5)
        self.check()

    def stop(self) -> None:
        """Ask the ranks to end, and kill those that do not. Safe to call again."""
        if self._over:
            return
        self._leaving = True
        clean = self.failure is None
        with suppress(RankError):
            self.send(Stop())
        self._end(STOP_S)
        with self._news:
            self.failure = self.failure or RankError("the engine has been closed")
            self._over = True
            self._news.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)
        for channel in self._channels:
            channel.close()
        if self._group is not None and clean:
            self._group.abort()  # the other ranks have ended, so there is nothing to finish

    def _end(self, patience_s: float) -> None:
        """Wait for all processes to end, and kill those that take longer than ``patience_s``."""
        until = time.monotonic() + patience_s
        for worker in self._workers:
            try:
                worker.process.wait(max(until - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.process.wait()

    def _watch(self) -> None:
        """Start the ranks, then listen to them until all have ended.

        One thread does both, because Linux kills a child when the thread that started it ends.
        The loop is always a SelectorEventLoop, whatever kind the program has chosen for its own.
        """
        loop = asyncio.SelectorEventLoop()
        try:
            loop.run_until_complete(self._start_and_follow())
        except Exception as error:
            what = "watched" if self._workers else "started"
            self._fail(RankError(f"the ranks could not be {what}: {first_line(error)}"))
        finally:
            loop.close()

    async def _start_and_follow(self) -> None:
        workers: list[Worker] = []
        environment = dict.fromkeys(THREAD_VARIABLES, str(self._threads))
        try:
            for rank in range(1, self.size):
                worker = Worker(f"rank {rank}", COMMAND, environment=environment, log=_log)
                workers.append(worker)
                # a blocking channel of its own, because rank 0 sends from the thread that steps
                self._channels.append(Channel(worker.socket.dup(), EXCHANGE_S))
                with suppress(ChannelClosed):  # it is dead; _follow() will notice
                    self._channels[-1].send(
                        encode(Join(self._options, rank, self.size, self._port))
                    )
                await worker.open()
        except BaseException:
            for worker in workers:
                worker.kill()
            raise
        with self._news:
            self._workers = workers
            self._news.notify_all()
        if self._leaving:  # stop() was called meanwhile
            self._end(0.0)
        await asyncio.gather(*map(self._follow, workers))

    async def _follow(self, worker: Worker) -> None:
        """Listen to a rank until it ends, then end the others."""
        loop = asyncio.get_running_loop()

        def hear(message: FromWorker) -> None:
            if isinstance(message, Reached):
                with self._news:
                    self._reached[message.stage] += 1
                    self._news.notify_all()
            elif isinstance(message, Crashed) and worker.noted is not None:
                loop.call_later(_REASON_S, self._lose, worker.noted)

        death = await worker.run(hear, SILENCE_S)
        if death.cause is Cause.CRASHED:
            # another rank's death may be the cause, and the news of it may still arrive
            await asyncio.sleep(_REASON_S)
        self._lose(death)

    def _lose(self, death: Death) -> None:
        """Note that a rank has died, or is about to."""
        killed = death.cause in (Cause.KILLED, Cause.HUNG)
        self._fail(RankError(death.text, killed=killed, stopped=death.frozen))

    def _fail(self, failure: RankError) -> None:
        """End the engine: note the failure, end all ranks, and wake what waits for them."""
        with self._news:
            if self.failure is not None or self._leaving:
                return
            self.failure = failure
            self._news.notify_all()
        _log.error("%s; all ranks of this engine end", failure)
        self._end(0.0)
        if self._group is not None:
            self._group.abort()


def make_store(size: int) -> tuple[Store, int]:
    """A store for the ranks of one engine, at a free port that only this host can reach."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port: int = listening.getsockname()[1]
        return open_store(port, size, listening.detach()), port


def open_store(port: int, size: int, listening: int | None = None) -> Store:
    """The store at a port; the descriptor of the listening socket makes it."""
    from torch import distributed as public

    distributed: Any = public  # much of it has no types
    store: Store = distributed.TCPStore(
        "127.0.0.1",
        port,
        size,
        is_master=listening is not None,
        timeout=timedelta(seconds=EXCHANGE_S),
        wait_for_workers=False,
        master_listen_fd=listening,
        use_libuv=False,  # the other kind takes no descriptor
    )
    return store
