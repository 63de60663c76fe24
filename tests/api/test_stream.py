"""stream(): an event per forward pass, commits that only grow, and a tidy end."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dllmserve import LLM, CanvasStep, SamplingParams, SparseConfig
from dllmserve.core.plan import StepPlan
from dllmserve.runtime.runner import StepHandle
from tests.conftest import Engines
from tests.helpers import answer, check_idle, random_prompt

WAYS: list[tuple[dict[str, Any], SparseConfig | None]] = [
    ({"temperature": 0.0, "steps": 9, "block_length": 8}, None),
    ({"temperature": 1.0, "seed": 1, "steps": 20, "cache": "dual", "block_length": 6}, None),
    ({"temperature": 0.0, "unmask": "factor", "cfg_scale": 0.5}, None),
    ({"temperature": 0.0, "unmask": "entropy_bound", "entropy_bound": 1.0}, None),
    ({"temperature": 0.0, "steps": 12}, SparseConfig(default_block_len=7)),
]


@pytest.fixture(scope="module")
def llm(engines: Engines, checkpoints: dict[str, Path]) -> LLM:
    return engines(checkpoints["llada"])


@pytest.mark.parametrize(("options", "sparse"), WAYS, ids=lambda v: str(v)[:30])
def test_events(llm: LLM, options: dict[str, Any], sparse: SparseConfig | None) -> None:
    params = SamplingParams(gen_length=20, ignore_eos=True, **options)
    prompt = random_prompt(4, 7)
    steps = list(llm.stream(prompt, params, sparse))
    check_idle(llm)
    (expected,) = llm.generate([prompt], params, sparse, use_tqdm=False)
    assert [s.forward_passes for s in steps] == list(range(1, len(steps) + 1))
    assert [s.output for s in steps[:-1]] == [None] * (len(steps) - 1)
    assert steps[-1].output is not None
    assert steps[-1].output.as_dict() == expected
    assert steps[-1].committed == [True] * 20
    assert steps[-1].token_ids == expected["token_ids"]
    before: list[bool] = [False] * 20
    for step in steps:
        check_event(step, before, expected["token_ids"])
        before = step.committed


def check_event(step: CanvasStep, before: list[bool], final: list[int]) -> None:
    """One event against the one before it and the answer that comes of it."""
    assert len(step.token_ids) == len(step.committed) == len(step.confidence) == 20
    start, end = step.block
    assert 0 <= start < end <= 20
    assert sum(step.committed) > sum(before)
    for place in range(20):
        assert step.committed[place] or not before[place]
        proposed = start <= place < end and not before[place]
        assert (step.confidence[place] is not None) == proposed
        if step.committed[place]:
            assert step.token_ids[place] == final[place]
            assert before[place] or proposed
        else:
            assert (step.token_ids[place] is not None) == proposed
            assert step.token_ids[place] != llm_mask()


def llm_mask() -> int:
    return 60


def test_leaving_early_frees_everything(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, gen_length=20, steps=20)
    expected = answer(llm, [5, 6], params)
    events = llm.stream([5, 6], params)
    next(events)
    events.close()
    check_idle(llm)
    for _ in llm.stream([5, 6], params):
        break
    del events
    check_idle(llm)
    assert answer(llm, [5, 6], params) == expected


def shown(step: CanvasStep) -> tuple[Any, ...]:
    """All of an event but its confidences, whose last digits depend on the batch's shape."""
    return step.token_ids, step.committed, step.block, step.forward_passes, step.output


def test_streams_and_batches_side_by_side(llm: LLM) -> None:
    """Every stream sees its own events only, also those of steps that others have run."""
    params = [
        SamplingParams(temperature=1.0, seed=s, gen_length=10 + s, steps=10, ignore_eos=True)
        for s in range(3)
    ]
    alone = [list(llm.stream([s + 1], p)) for s, p in enumerate(params)]
    streams = [llm.stream([s + 1], p) for s, p in enumerate(params)]
    seen: list[list[CanvasStep]] = [[next(stream)] for stream in streams]
    batch = llm.generate([[1], [2]], params[:2], use_tqdm=False)
    for place, stream in enumerate(streams):
        seen[place] += stream
    assert [list(map(shown, steps)) for steps in seen] == [list(map(shown, s)) for s in alone]
    for output, steps in zip(batch, alone, strict=False):
        assert steps[-1].output is not None
        assert output == steps[-1].output.as_dict()
    check_idle(llm)


def test_threads_share_an_engine(llm: LLM) -> None:
    params = [
        SamplingParams(temperature=1.0, seed=s, gen_length=12, steps=6, ignore_eos=True)
        for s in range(6)
    ]
    expected = [answer(llm, [s + 1, 7], p) for s, p in enumerate(params)]
    got: dict[int, list[int]] = {}

    def work(place: int) -> None:
        if place % 2:
            got[place] = answer(llm, [place + 1, 7], params[place])
        else:
            last = list(llm.stream([place + 1, 7], params[place]))[-1].output
            assert last is not None
            got[place] = last.token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(6)] == expected
    check_idle(llm)


def test_a_stream_that_ends_inside_a_step_disturbs_nobody(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Garbage collection may close an abandoned stream at any moment."""
    params = SamplingParams(temperature=0.0, gen_length=8, steps=8, ignore_eos=True)
    expected = llm.generate([[3, 4]], params, use_tqdm=False)
    stream = llm.stream([5, 6, 7], params)
    next(stream)
    execute = llm._engine._runner.execute

    def closing(plan: StepPlan) -> StepHandle:
        stream.close()
        return execute(plan)

    monkeypatch.setattr(llm._engine._runner, "execute", closing)
    assert llm.generate([[3, 4]], params, use_tqdm=False) == expected
    assert not llm._shared._live
    llm._engine.scheduler.check_integrity()
    assert not llm._engine.has_work


def test_a_slow_reader_gets_the_last_canvas(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, gen_length=8, steps=8, ignore_eos=True)
    stream = llm.stream([5, 6, 7], params)
    first = next(stream)
    llm.generate([[3, 4]] * 3, params, use_tqdm=False)
    rest = list(stream)
    assert first.output is None
    assert rest[-1].output is not None
    assert all(rest[-1].committed)


def test_a_failing_step_is_told_to_everybody(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is cut short ends all requests; the engine goes on with new ones."""
    from dllmserve.errors import EngineError

    params = SamplingParams(temperature=0.0, gen_length=10, steps=10)
    paused = llm.stream([1], params)
    next(paused)

    def broken(_: object) -> None:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(llm._engine._runner, "execute", broken)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        answer(llm, [2], params)
    monkeypatch.undo()
    with pytest.raises(EngineError, match="a kernel failed"):
        list(paused)
    check_idle(llm)
    assert answer(llm, [2], params)


def test_an_answer_that_is_complete_survives_a_failing_step(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was finished in a step before, but its caller has not come for it yet."""
    done = llm.stream([1], SamplingParams(temperature=0.0, gen_length=4, steps=1))
    assert next(done).output is not None

    def broken(_: object) -> None:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(llm._engine._runner, "execute", broken)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        answer(llm, [2], SamplingParams(temperature=0.0, gen_length=4, steps=1))
    assert list(done) == []
    check_idle(llm)


def test_the_mode_in_which_an_engine_is_made_does_not_matter(checkpoints: dict[str, Path]) -> None:
    with torch.inference_mode():
        made = LLM(str(checkpoints["llada"]), device="cpu")
        params = SamplingParams(temperature=0.0, gen_length=6, steps=3, cache="dual")
        inside = answer(made, [1, 2], params)
    assert answer(made, [1, 2], params) == inside
