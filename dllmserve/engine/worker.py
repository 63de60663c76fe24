"""The worker: a process that is an engine, or another rank of one, as its first message says.

    python -m dllmserve.engine.worker DESCRIPTOR OWNER

It lives as long as its owner: it ends when the socket closes, and on Linux the kernel
kills it when the owner dies, even in the middle of a step.

An engine has one thread that takes messages, steps and reports. Its reports are its heartbeats,
so that a step that never ends is noticed. A rank waits for others in the middle of its steps, so a
thread sends its heartbeats; rank 0's engine notices a step that never ends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, NoReturn

from dllmserve.config import EngineConfig
from dllmserve.core.plan import Kind, StepPlan
from dllmserve.core.request import Request
from dllmserve.engine.core import EngineCore, StepEvents
from dllmserve.engine.setup import EnginePlan
from dllmserve.engine.start import build_engine
from dllmserve.errors import DllmServeError, RankError
from dllmserve.process.channel import Channel, ChannelClosed
from dllmserve.process.child import HEARTBEAT_S, exit_now, prepare_process, start_heartbeat
from dllmserve.process.messages import (
    Abort,
    Admitted,
    Canvas,
    Committed,
    Configure,
    Counters,
    Crashed,
    EngineInfo,
    Failed,
    Finished,
    FromWorker,
    Join,
    NotLoaded,
    Ready,
    Report,
    Stop,
    Submit,
    ToWorker,
    decode_to_worker,
    encode,
)
from dllmserve.runtime.platform import first_line

#: exit codes
STOPPED, NOT_LOADED, CRASHED = 0, 65, 70


class EngineLoop:
    """Messages in, steps, reports out.

    Args:
        engine: the engine.
        channel: the owner.
    """

    def __init__(self, engine: EngineCore, channel: Channel) -> None:
        self._engine, self._channel = engine, channel
        self._requests: dict[int, Request] = {}
        self._names: dict[Request, int] = {}
        self._steps = self._spans = self._positions = self._committed = 0
        self._busy = 0.0
        self._reported = 0.0
        self._early: list[Failed] = []
        engine.observers.append(self._count)
        engine.on_admitted = self._tell_admitted

    def run(self) -> None:
        """Serve until told to stop, or until the owner is gone."""
        while True:
            idle = not self._engine.has_work and not self._early
            for data in self._channel.receive(HEARTBEAT_S if idle else 0.0):
                message = decode_to_worker(data)
                if isinstance(message, Stop):
                    return
                self._take(message)
            events = StepEvents()
            if self._engine.has_work:
                started = time.monotonic()
                events = self._engine.step()
                self._busy += time.monotonic() - started
                self._committed += events.committed
            self._report(events)

    def _take(self, message: ToWorker) -> None:
        if isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Abort):
            for name in message.ids:
                request = self._requests.get(name)
                if request is not None:
                    self._engine.abort(request)
                    self._forget(request)

    def _submit(self, message: Submit) -> None:
        try:
            request = self._engine.make_request(
                message.prompt_ids,
                message.params,
                holes=message.holes,
                watch=message.watch,
                stream=message.stream,
                owner=message.owner,
                grammars=message.grammars,
                candidates=message.candidates,
                trace=message.trace,
                canvas=message.canvas,
            )
            self._engine.add(request)
        except DllmServeError as error:  # the owner checks the same, before it submits
            self._early.append(Failed(message.id, type(error).__name__, str(error)))
            return
        self._requests[message.id] = request
        self._names[request] = message.id

    def _forget(self, request: Request) -> int:
        name = self._names.pop(request)
        del self._requests[name]
        return name

    def _report(self, events: StepEvents) -> None:
        """Say what came of a step; at least every HEARTBEAT_S seconds, even if nothing did."""
        names = self._names
        committed = [
            Committed(names[r], ids, logprobs) for r, ids, logprobs in events.streamed if r in names
        ]
        canvases = [
            # the output comes in a message of its own
            Canvas(names[r], replace(step, output=None))
            for r, step in events.watched
            if r in names
        ]
        finished = [Finished(self._forget(r), o) for r, o in events.finished if r in names]
        failed, self._early = self._early, []
        for request in events.failed:
            if request in names:
                error = request.error or RuntimeError("no reason was given")
                failed.append(Failed(self._forget(request), type(error).__name__, str(error)))
        now = time.monotonic()
        quiet = not (committed or canvases or finished or failed)
        if quiet and now - self._reported < HEARTBEAT_S:
            return
        self._reported = now
        self._send(Report(self._counters(), committed, canvases, finished, failed))

    def _counters(self) -> Counters:
        scheduler = self._engine.scheduler
        pages = scheduler.limits.num_pages
        free = scheduler.storage.pages.num_free
        return Counters(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            pages_used=(pages - free) / pages if pages else 0.0,
            steps=self._steps,
            spans=self._spans,
            positions=self._positions,
            committed=self._committed,
            busy=self._busy,
            preempted=scheduler.storage.preempted,
            prompts=scheduler.storage.prompts,
            cached=scheduler.storage.cached,
        )

    def _count(self, plan: StepPlan) -> None:
        self._steps += 1
        self._spans += sum(entry.kind is Kind.FILL for entry in plan.entries)
        self._positions += sum(entry.span.blk_len for entry in plan.entries)

    def _tell_admitted(self, requests: list[Request]) -> None:
        self._send(Admitted([self._names[r] for r in requests]))

    def _send(self, message: FromWorker) -> None:
        self._channel.send(encode(message))


def serve(options: dict[str, Any], channel: Channel) -> int:
    """Load an engine, serve it, and return the exit code."""
    try:
        engine, plan = build_engine(EngineConfig.from_options("LLM", options))
    except DllmServeError as error:
        stopped = isinstance(error, RankError) and error.stopped
        channel.send(encode(NotLoaded(type(error).__name__, str(error), stopped)))
        return NOT_LOADED
    channel.send(encode(Ready(engine_info(plan))))
    try:
        with last_words(channel):
            EngineLoop(engine, channel).run()
    except RankError:
        return CRASHED
    finally:
        engine.close()
    return STOPPED


def engine_info(plan: EnginePlan) -> EngineInfo:
    """What the owner needs to know of a loaded engine."""
    return EngineInfo(
        directory=str(plan.directory),
        spec=plan.spec,
        limits=plan.limits,
        device=plan.devices,
        dtype=str(plan.dtype).removeprefix("torch."),
        memory=plan.memory.equation(),
    )


@contextmanager
def last_words(channel: Channel) -> Iterator[None]:
    """Tell the owner what went wrong; rows and pages cannot be trusted any more after it."""
    try:
        yield
    except ChannelClosed:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {first_line(error)}"
        killed = False
        if isinstance(error, RankError):
            text, killed = str(error), error.killed
        channel.send(encode(Crashed(text, killed)))
        raise


def be_rank(join: Join, channel: Channel) -> NoReturn:
    """Load a rank and follow rank 0 until it says stop, or is gone."""
    from dllmserve.engine.ranks import follow, load_rank  # an engine needs none of it

    start_heartbeat(channel)
    with suppress(ChannelClosed), last_words(channel):
        follow(load_rank(join, channel), channel)
    exit_now()


def first_message(channel: Channel) -> ToWorker:
    """What this worker is to be. Nothing that may be sent before it is ready needs an answer."""
    while not (found := channel.receive(None)):
        continue  # a part of it
    return decode_to_worker(found[0])


def main() -> int:
    """Entry point: the socket's descriptor and the owner's process id are the arguments."""
    descriptor, owner = map(int, sys.argv[1:3])
    prepare_process(owner)
    channel = Channel.inherited(descriptor)
    try:
        message = first_message(channel)
        if isinstance(message, Join):
            be_rank(message, channel)
        if isinstance(message, Configure):
            return serve(dict(message.options), channel)
    except ChannelClosed:
        return STOPPED
    raise TypeError(f"{type(message).__name__} says not what this worker is to be")


if __name__ == "__main__":
    sys.exit(main())
