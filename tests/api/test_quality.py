"""Presets fill what is not given; what they need is there, and short answers stay cheap."""

import pickle
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dllmserve import LLM, SamplingParams, SparseConfig
from dllmserve.core.plan import StepPlan
from dllmserve.errors import CapacityError, InvalidParameterError
from dllmserve.presets import PRESETS
from dllmserve.process.messages import plain
from tests.checkpoints import Shape, write_random
from tests.conftest import Engines
from tests.helpers import check_idle, random_prompt

MESSAGES = [{"role": "user", "content": "Repeat 5 times: blue"}]


def values(params: SamplingParams) -> dict[str, Any]:
    return {f.name: getattr(params, f.name) for f in fields(params)}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_what_is_not_given(name: str) -> None:
    params = SamplingParams(quality=name, temperature=0.0, gen_length=50)
    for field, value in PRESETS[name].items():
        assert getattr(params, field) == value, field
    assert params.gen_length == 50 and params.temperature == 0.0
    assert values(SamplingParams(gen_length=50, temperature=0.0)) != values(params)


@pytest.mark.parametrize("name", ["balanced", "fast"])
def test_edits_beside_a_preset(name: str) -> None:
    edited = SamplingParams(quality=name, edit_threshold=0.5)
    assert (edited.unmask, edited.early_end, edited.cache) == ("threshold_strict", False, "dual")
    assert edited.threshold == PRESETS[name]["threshold"]
    joint = SamplingParams(quality=name, unmask="joint")
    assert (joint.threshold, joint.edit_threshold) == (0.5, 0.0)
    with pytest.raises(InvalidParameterError, match=r"edit_threshold=0\.5 works with unmask="):
        SamplingParams(quality="exact", edit_threshold=0.5)


@pytest.mark.parametrize(
    ("length", "block", "steps"), [(64, 32, 64), (50, 32, 64), (7, 32, 7), (20, 6, 24)]
)
def test_exact_is_one_token_a_step(length: int, block: int, steps: int) -> None:
    params = SamplingParams(quality="exact", gen_length=length, block_length=block)
    assert (params.steps, params.unmask, params.cache) == (steps, "steps", "none")
    assert SamplingParams(quality="exact").steps == 128
    assert SamplingParams(quality="exact", steps=5).steps == 5
    assert SamplingParams(quality="exact", gen_length=9, block_length=None).steps == 9


def test_what_is_given_stays_even_if_it_is_the_default() -> None:
    params = SamplingParams(quality="fast", cache="none", threshold=0.95, early_end=False)
    assert (params.cache, params.threshold, params.early_end) == ("none", 0.95, False)
    assert params.suffix_window == PRESETS["fast"]["suffix_window"]
    positional = SamplingParams(0.0, 64, False, 40, quality="balanced")
    assert positional.gen_length == 40 and positional.unmask == "threshold"


def test_what_is_given_rules_parts_of_a_preset_out() -> None:
    assert not SamplingParams(quality="fast", ignore_eos=True).early_end
    assert not SamplingParams(quality="balanced", unmask="wino").early_end
    assert SamplingParams(quality="fast", unmask="wino").cache == "dual"
    assert SamplingParams(quality="balanced", unmask="steps", gen_length=1024).steps == 1024
    assert SamplingParams(quality="exact", gen_length=8192, block_length=100).steps == 8192


def test_copies_keep_their_values() -> None:
    params = SamplingParams(quality="fast", unmask="steps", steps=4, early_end=False)
    assert pickle.loads(pickle.dumps(params)) == params
    longer = replace(params, gen_length=200)
    assert (longer.unmask, longer.cache, longer.gen_length) == ("steps", "rolling", 200)
    sent = msgspec.msgpack.encode(params, enc_hook=plain)
    assert msgspec.msgpack.decode(sent, type=SamplingParams) == params  # as another process has it


def test_a_preset_and_sparse_attention_exclude_each_other(engines: Engines) -> None:
    llm = engines("tiny")
    with pytest.raises(InvalidParameterError, match="exclude each other"):
        llm.generate(["x"], SamplingParams(quality="balanced"), SparseConfig(), use_tqdm=False)


def test_revoking_and_sparse_attention_exclude_each_other(engines: Engines) -> None:
    with pytest.raises(InvalidParameterError, match="does not work with sparse attention"):
        engines("tiny").generate(
            ["x"], SamplingParams(unmask="wino"), SparseConfig(), use_tqdm=False
        )


def computed(llm: LLM, params: SamplingParams) -> tuple[str, int, int]:
    """Text, forwards and query tokens of one answer."""
    tokens = 0

    def count(plan: StepPlan) -> None:
        nonlocal tokens
        tokens += plan.tokens

    llm._engine.observers.append(count)
    [output] = llm.chat(MESSAGES, params, use_tqdm=False)
    llm._engine.observers.remove(count)
    return output["text"], output["usage"]["forward_passes"], tokens


@pytest.mark.parametrize("name", ["balanced", "fast"])
def test_gen_length_is_an_upper_bound_that_costs_nothing(engines: Engines, name: str) -> None:
    """However much room an answer has, a short one costs the same."""
    llm = engines("tiny")
    short, *longer = (
        computed(llm, SamplingParams(quality=name, temperature=0.0, gen_length=length))
        for length in (64, 256, 1024)
    )
    assert short[0] == "blue, blue, blue, blue, blue"
    assert longer == [short, short]


def test_kept_distributions_are_limited(tmp_path: Path) -> None:
    """What never fits is refused; what does not fit now waits."""
    folder = write_random(tmp_path / "model", Shape(family="llada"))
    llm = LLM(str(folder), device="cpu", max_history_rows=10)
    prompts = [random_prompt(i, 5) for i in range(6)]

    def params(block: int) -> SamplingParams:
        return SamplingParams(
            temperature=0.0, gen_length=16, block_length=block, unmask="klass", threshold=0.3
        )

    with pytest.raises(CapacityError, match=r"12 positions.*max_history_rows=10"):
        llm.generate(prompts, params(12), use_tqdm=False)
    alone = [llm.generate([p], params(8), use_tqdm=False)[0] for p in prompts]
    assert llm.generate(prompts, params(8), use_tqdm=False) == alone
    assert llm._engine.scheduler.storage.history.num_free == 10
    check_idle(llm)


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_streams_of_a_revoking_rule_never_take_anything_back(tmp_path: Path, cache: str) -> None:
    """Ids are given out when their block is done, and are the answer's."""
    folder = write_random(tmp_path / "model", Shape(family="llada", seed=3))
    llm = LLM(str(folder), device="cpu")
    params = SamplingParams(
        temperature=0.0,
        gen_length=24,
        block_length=8,
        unmask="wino",
        threshold=0.3,
        threshold_back=0.6,
        cache=cache,
        ignore_eos=True,
    )
    engine = llm._engine
    revoked = 0
    for seed in range(4):
        request = engine.make_request(random_prompt(seed, 7), params, stream=True, watch=True)
        engine.add(request)
        streamed: list[int] = []
        answer: list[int] = []
        before = [False] * 24
        while engine.has_work:
            events = engine.step()
            for _, ids, _ in events.streamed:
                streamed += ids
                assert len(streamed) % 8 == 0
            for _, canvas in events.watched:
                lost = [i for i in range(24) if before[i] and not canvas.committed[i]]
                revoked += len(lost)
                assert all(i >= len(streamed) for i in lost)
                before = canvas.committed
            for _, output in events.finished:
                answer = output.token_ids
        assert len(answer) == 24 and answer[: len(streamed)] == streamed
    assert revoked > 0
    check_idle(llm)
