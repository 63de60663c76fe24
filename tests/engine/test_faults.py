"""What runs out of memory, or is interrupted, ends alone and leaves nothing behind."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dllmserve import LLM, SamplingParams
from dllmserve.core.plan import StepPlan
from dllmserve.core.rows import RowInit
from dllmserve.errors import EngineError, OutOfMemoryError
from dllmserve.runtime.platform import first_line, is_out_of_memory
from dllmserve.runtime.runner import StepHandle
from tests import helpers
from tests.conftest import Engines

GREEDY = SamplingParams(
    temperature=0.0, gen_length=8, steps=4, block_length=4, cache="dual", ignore_eos=True
)
CUDA_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")


@pytest.fixture
def llm(engines: Engines, checkpoints: dict[str, Path]) -> LLM:
    return engines(checkpoints["llada"])


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (CUDA_FULL, True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory\nsecond line"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: no memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_which_errors_are_out_of_memory(error: Exception, known: bool) -> None:
    assert is_out_of_memory(error) is known
    assert first_line(error) == (str(error).splitlines() or ["MemoryError"])[0]


class FullPool:
    """Graphs whose capture finds no memory."""

    def __init__(self) -> None:
        self.asked = 0

    def wanted(self, _: object) -> bool:
        self.asked += 1
        return True

    def run(self, *_: object) -> Any:
        raise CUDA_FULL


def test_a_graph_without_memory_is_done_without(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = helpers.answer(llm, [1, 2, 3], GREEDY)
    pool = FullPool()
    monkeypatch.setattr(llm._engine._runner, "graphs", pool)
    assert helpers.answer(llm, [1, 2, 3], GREEDY) == expected
    assert pool.asked == 2  # the reuse step of each block


def test_a_python_memory_error_has_a_message(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: StepPlan) -> StepHandle:
        raise MemoryError

    monkeypatch.setattr(llm._engine._runner, "execute", full)
    with pytest.raises(OutOfMemoryError, match=r"\(MemoryError\): reduce max_model_len"):
        helpers.answer(llm, [1, 2, 3], GREEDY)
    helpers.check_idle(llm)


def test_out_of_memory_at_admission(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once is forgiven; for good, the request ends and the others do not."""
    engine = llm._engine
    expected = helpers.answer(llm, [1, 2], GREEDY)
    admit = engine._runner.admit
    tries: list[int] = []

    def tight(init: RowInit) -> None:
        if len(init.ids) > 9 or len(tries) == 0:
            tries.append(init.row)
            raise CUDA_FULL
        admit(init)

    monkeypatch.setattr(engine._runner, "admit", tight)
    assert helpers.answer(llm, [1, 2], GREEDY) == expected
    assert len(tries) == 1
    other = engine.make_request([1, 2], GREEDY)
    engine.add(other)
    with pytest.raises(OutOfMemoryError, match=r"at admission .*Tried to allocate 1 GiB"):
        helpers.answer(llm, list(range(1, 20)), GREEDY)
    answers: dict[int, list[int]] = {}
    while engine.has_work:
        answers |= {r.id: o.token_ids for r, o in engine.step().finished}
    assert answers[other.id] == expected
    helpers.check_idle(llm)


def test_an_interrupt_inside_admission(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C stays Ctrl-C, and everybody else is told."""
    expected = helpers.answer(llm, [1, 2], GREEDY)
    paused = llm.stream([1, 2, 3], GREEDY)
    next(paused)
    scheduler = llm._engine.scheduler

    def interrupted(_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(scheduler.storage, "fits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5], [6], [7]], GREEDY, use_tqdm=False)
    monkeypatch.undo()
    with pytest.raises(EngineError, match="KeyboardInterrupt"):
        list(paused)
    helpers.check_idle(llm)
    assert helpers.answer(llm, [1, 2], GREEDY) == expected


def test_a_split_step_keeps_what_watchers_see(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves may replay one graph, which overwrites the proposals of the first."""
    execute = llm._engine._runner.execute
    handles: list[StepHandle] = []

    def tight(plan: StepPlan) -> StepHandle:
        if len(plan.entries) > 1:
            raise CUDA_FULL
        with torch.inference_mode():
            for earlier in handles:  # as the replay of a graph would
                original[id(earlier)].tokens.fill_(0)
        handle = execute(plan)
        original[id(handle)] = handle.proposals
        handles.append(handle)
        return handle

    original: dict[int, Any] = {}
    alone = [step.token_ids for step in llm.stream([1, 2, 3], GREEDY)]
    monkeypatch.setattr(llm._engine._runner, "execute", tight)
    stream = llm.stream([1, 2, 3], GREEDY)
    other = llm._engine.make_request([4, 5], GREEDY)
    llm._engine.add(other)
    assert [step.token_ids for step in stream] == alone
    while llm._engine.has_work:
        llm._engine.step()
    helpers.check_idle(llm)
