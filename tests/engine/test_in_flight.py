"""Steps in flight, and running out of memory, without a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dllmserve import LLM, SamplingParams
from dllmserve.core.plan import StepPlan
from dllmserve.errors import OutOfMemoryError
from dllmserve.runtime.runner import StepHandle
from tests import helpers
from tests.conftest import Engines
from tests.engine.test_invariance import jobs, run

GREEDY = SamplingParams(temperature=0.0, gen_length=12, steps=6, block_length=6, ignore_eos=True)


@pytest.fixture
def deep(engines: Engines, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> LLM:
    """An engine that keeps four steps in flight, as on a GPU."""
    llm = engines(checkpoints["llada"])
    monkeypatch.setattr(llm._engine, "_depth", 4)
    return llm


def test_depth_changes_no_answer(
    engines: Engines, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("llada", "dream", "llada-eos"):
        llm = engines(checkpoints[name])
        expected = run(llm, jobs())
        with monkeypatch.context() as patch:
            patch.setattr(llm._engine, "_depth", 4)
            assert run(llm, jobs()) == expected


@pytest.mark.parametrize("name", helpers.MODELS)
def test_golden_in_flight(engines: Engines, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engines(helpers.GOLDEN / name)
    monkeypatch.setattr(llm._engine, "_depth", 3)
    cases = helpers.golden(name)
    assert helpers.run_cases(llm, cases) == [c.output for c in cases]


def test_fixed_schedules_are_launched_before_the_first_report(
    deep: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    execute, result = deep._engine._runner.execute, StepHandle.result

    def launched(plan: StepPlan) -> StepHandle:
        log.append("launch")
        return execute(plan)

    def landed(handle: StepHandle) -> Any:
        log.append("report")
        return result(handle)

    monkeypatch.setattr(deep._engine._runner, "execute", launched)
    monkeypatch.setattr(StepHandle, "result", landed)
    helpers.answer(deep, [1, 2, 3], GREEDY)
    assert log[:6] == ["launch"] * 4 + ["report", "launch"]
    assert log.count("launch") == log.count("report") == 6
    log.clear()
    adaptive = SamplingParams(temperature=0.0, gen_length=6, unmask="threshold", threshold=1.0)
    helpers.answer(deep, [1, 2, 3], adaptive)
    assert log[:4] == ["launch", "report", "launch", "report"]


def test_a_watched_answer_is_not_run_ahead(deep: LLM) -> None:
    seen = [step.forward_passes for step in deep.stream([1, 2, 3], GREEDY)]
    assert seen == [1, 2, 3, 4, 5, 6]


def test_out_of_memory_splits_the_step(deep: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits by itself is answered; what does not fails alone."""
    prompts = [helpers.random_prompt(i, 5 + i) for i in range(6)]
    expected = [helpers.answer(deep, p, GREEDY) for p in prompts]
    execute = deep._engine._runner.execute
    sizes: list[int] = []

    def tight(plan: StepPlan) -> StepHandle:
        sizes.append(plan.tokens)
        if plan.tokens > 50:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return execute(plan)

    monkeypatch.setattr(deep._engine._runner, "execute", tight)
    outputs = deep.generate(prompts, GREEDY, use_tqdm=False)
    assert [o["token_ids"] for o in outputs] == expected
    assert max(sizes) > 50
    long = helpers.random_prompt(9, 80)
    others = [deep._engine.make_request(p, GREEDY) for p in prompts[:3]]
    for other in others:
        deep._engine.add(other)
    with pytest.raises(OutOfMemoryError, match=r"a step of 92 tokens .*reduce max_model_len"):
        deep.generate([long], GREEDY, use_tqdm=False)
    answers: dict[int, list[int]] = {}
    while deep._engine.has_work:
        answers |= {r.id: o.token_ids for r, o in deep._engine.step().finished}
    # some had ended while the failing call was stepping the engine
    assert answers.items() <= {r.id: e for r, e in zip(others, expected, strict=False)}.items()
    assert all(r.finish_reason == "length" for r in others)
    helpers.check_idle(deep)


def test_a_step_that_was_split_is_reported_whole_before_the_next_is_planned(
    deep: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last part may hold only what can be foreseen, an earlier part may not."""
    adaptive = SamplingParams(
        temperature=0.0, gen_length=8, block_length=1, unmask="threshold", ignore_eos=True
    )
    asked = [([1, 2], adaptive), *((helpers.random_prompt(i, 9), GREEDY) for i in range(3))]
    expected = [helpers.answer(deep, *one) for one in asked]
    execute = deep._engine._runner.execute

    def tight(plan: StepPlan) -> StepHandle:
        if len(plan.entries) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return execute(plan)

    monkeypatch.setattr(deep._engine._runner, "execute", tight)
    prompts, params = zip(*asked, strict=True)
    outputs = deep.generate(list(prompts), list(params), use_tqdm=False)
    assert [o["token_ids"] for o in outputs] == expected


def test_observers_see_every_plan(deep: LLM) -> None:
    plans: list[StepPlan] = []
    with deep.observe(plans.append):
        helpers.answer(deep, [1, 2, 3], GREEDY)
    helpers.answer(deep, [1, 2, 3], GREEDY)
    assert [p.tokens for p in plans] == [15] * 6
