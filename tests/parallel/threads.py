"""Ranks as threads of one process: the arithmetic of several ranks without their processes.

All exchange through a list and a barrier, on any device, also on one GPU that they share.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dllmserve.engine.setup as setup
from dllmserve import LLM
from dllmserve.config import EngineConfig
from dllmserve.core.plan import StepPlan
from dllmserve.core.rows import RowInit
from dllmserve.engine.core import EngineCore
from dllmserve.engine.setup import EnginePlan, Loaded, build_runner, plan_engine
from dllmserve.engine.start import engine_of
from dllmserve.parallel.group import Group
from dllmserve.runtime.platform import on_device
from dllmserve.runtime.runner import ModelRunner, StepHandle
from dllmserve.runtime.state_table import StateTable

PATIENCE = 60.0


class ThreadGroup(Group):
    """A group whose ranks are threads.

    Attributes:
        exchanged: tensors that this rank has given, for tests that count them.
    """

    captures = False

    def __init__(self, rank: int, size: int, slots: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, size)
        self._slots, self._barrier = slots, barrier
        self.exchanged: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def all_gather(self, x: Tensor) -> Tensor:
        self.exchanged.append(("gather", tuple(x.shape), x.dtype))
        return self._exchange(x)

    def all_reduce(self, x: Tensor) -> Tensor:
        self.exchanged.append(("reduce", tuple(x.shape), x.dtype))
        return self._exchange(x).sum(dim=0)

    def _exchange(self, x: Tensor) -> Tensor:
        self._slots[self.rank] = x
        self._barrier.wait(PATIENCE)
        shapes = {(tuple(y.shape), y.dtype) for y in self._slots}
        assert len(shapes) == 1, f"ranks are out of step: {shapes}"
        out = torch.stack(self._slots)
        self._barrier.wait(PATIENCE)
        return out


def thread_groups(size: int) -> list[ThreadGroup]:
    """The groups of all ranks."""
    slots, barrier = [None] * size, threading.Barrier(size)
    return [ThreadGroup(rank, size, slots, barrier) for rank in range(size)]


def on_all(works: list[Callable[[], Any]]) -> list[Any]:
    """Run one function for each rank at the same time; results in the order of ranks."""
    results: list[Any] = [None] * len(works)
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with torch.inference_mode():
                results[rank] = works[rank]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    if errors:
        raise next(
            (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
        )
    return results


class ThreadedRunner:
    """Rank 0's runner in the caller's thread, the others in theirs.

    Attributes:
        runners: of all ranks.
    """

    recovers = False

    def __init__(self, runners: list[ModelRunner]) -> None:
        self.runners = runners
        self._queues: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in runners[1:]]
        for runner, jobs in zip(runners[1:], self._queues, strict=True):
            threading.Thread(target=self._follow, args=(runner, jobs), daemon=True).start()

    @property
    def spec(self) -> Any:
        return self.runners[0].spec

    @property
    def table(self) -> StateTable:
        return self.runners[0].table

    def admit(self, init: RowInit) -> None:
        self._tell(init)
        self.runners[0].admit(init)

    def execute(self, plan: StepPlan) -> StepHandle:
        self._tell(plan)
        return self.runners[0].execute(plan)

    def close(self) -> None:
        self._tell(None)

    def _tell(self, job: Any) -> None:
        for jobs in self._queues:
            jobs.put(job)

    @staticmethod
    def _follow(runner: ModelRunner, jobs: "queue.SimpleQueue[Any]") -> None:
        with on_device(runner.table.device):
            while (job := jobs.get()) is not None:
                if isinstance(job, StepPlan):
                    runner.follow(job)
                else:
                    runner.admit(job)


def threaded_llm(
    monkeypatch: pytest.MonkeyPatch, model: str, size: int, **options: Any
) -> tuple[LLM, ThreadedRunner, list[ThreadGroup]]:
    """An LLM whose ranks are threads and share one device."""
    groups = thread_groups(size)
    made: list[ThreadedRunner] = []

    def build(config: EngineConfig) -> tuple[EngineCore, EnginePlan]:
        plans = [plan_engine(config, rank) for rank in range(size)]

        def load(rank: int) -> Loaded:
            return build_runner(plans[rank], groups[rank])

        loaded = on_all([lambda rank=rank: load(rank) for rank in range(size)])  # type: ignore[misc]
        made.append(ThreadedRunner([one.runner for one in loaded]))
        plan = loaded[0].plan
        return engine_of(made[0], plan), plan

    device = torch.device(options.pop("device", "cpu"))
    monkeypatch.setattr(setup, "choose_device", lambda *_: device)
    monkeypatch.setattr("dllmserve.llm.build_engine", build)
    llm = LLM(model, tensor_parallel_size=size, **options)
    return llm, made[0], groups
