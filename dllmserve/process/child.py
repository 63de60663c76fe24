"""The engine process: one thread that takes messages, steps the engine and reports.

    python -m dllmserve.process.child SOCKET

It lives as long as its owner: it ends when the socket closes, and on Linux the kernel
kills it when the owner dies, even in the middle of a step.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

from dllmserve.config import EngineConfig
from dllmserve.core.plan import StepPlan
from dllmserve.core.request import Request
from dllmserve.engine.core import EngineCore, StepEvents
from dllmserve.engine.setup import EnginePlan
from dllmserve.engine.start import build_engine
from dllmserve.errors import DllmServeError, RankError
from dllmserve.process.channel import Channel, ChannelClosed
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
    FromEngine,
    NotLoaded,
    Ready,
    Report,
    Stop,
    Submit,
    decode_to_engine,
    encode,
)
from dllmserve.ranks.daemon import prepare_process
from dllmserve.runtime.platform import first_line
from dllmserve.sampling_params import SamplingParams
from dllmserve.sparse.state import SparseConfig

#: longest silence of a healthy engine, in seconds, but for a step that takes longer
HEARTBEAT_S = 0.5
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
                message = decode_to_engine(data)
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

    def _take(self, message: Submit | Abort | Configure) -> None:
        if isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Abort):
            for name in message.ids:
                request = self._requests.get(name)
                if request is not None:
                    self._engine.abort(request)
                    self._forget(request)

    def _submit(self, message: Submit) -> None:
        params: dict[str, Any] = dict(message.params)
        sparse: dict[str, Any] | None = message.sparse
        try:
            request = self._engine.make_request(
                message.prompt_ids,
                SamplingParams(**params),
                None if sparse is None else SparseConfig(**sparse),
                watch=message.watch,
                stream=message.stream,
                owner=message.owner,
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
        committed = [Committed(names[r], ids) for r, ids in events.streamed if r in names]
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
        free = scheduler.allocator.num_free
        return Counters(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            pages_used=(pages - free) / pages if pages else 0.0,
            steps=self._steps,
            spans=self._spans,
            positions=self._positions,
            committed=self._committed,
            busy=self._busy,
        )

    def _count(self, plan: StepPlan) -> None:
        self._steps += 1
        self._spans += len(plan.entries)
        self._positions += sum(entry.span.blk_len for entry in plan.entries)

    def _tell_admitted(self, requests: list[Request]) -> None:
        self._send(Admitted([self._names[r] for r in requests]))

    def _send(self, message: FromEngine) -> None:
        self._channel.send(encode(message))


def serve(channel: Channel) -> int:
    """Load the engine that the owner asks for, serve it, and return the exit code."""
    options = _configuration(channel)
    try:
        engine, plan = build_engine(EngineConfig.from_options("LLM", options))
    except DllmServeError as error:
        stopped = isinstance(error, RankError) and error.stopped
        channel.send(encode(NotLoaded(type(error).__name__, str(error), stopped)))
        return NOT_LOADED
    channel.send(encode(Ready(engine_info(plan))))
    try:
        EngineLoop(engine, channel).run()
    except ChannelClosed:
        return STOPPED
    except RankError as error:
        channel.send(encode(Crashed(str(error), killed=error.killed)))
        return CRASHED
    except Exception as error:
        # its rows and pages cannot be trusted any more: a new process starts clean
        channel.send(encode(Crashed(f"{type(error).__name__}: {first_line(error)}")))
        raise
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


def _configuration(channel: Channel) -> dict[str, Any]:
    while True:
        for data in channel.receive(HEARTBEAT_S):
            message = decode_to_engine(data)
            if isinstance(message, Configure):
                return dict(message.options)


def main() -> int:
    """Entry point: the socket's path and the owner's process id are the arguments."""
    path, owner = sys.argv[1:3]
    prepare_process(int(owner))
    try:
        channel = Channel(path, int(owner))
        return serve(channel)
    except ChannelClosed:
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
