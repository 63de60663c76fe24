"""What admission expects a request to cost is what the engine then computes."""

from typing import Any

import pytest

from dllmserve import LLM, SamplingParams
from dllmserve.core.plan import StepPlan
from dllmserve.core.work import forwards_of, work_of
from tests import helpers
from tests.conftest import Engines

FULL: list[dict[str, Any]] = [
    {"steps": 16, "gen_length": 16},
    {"steps": 6, "gen_length": 12, "block_length": 4},
    {"steps": 8, "gen_length": 8, "cfg_scale": 0.5},
]
BLOCKS: list[dict[str, Any]] = [
    {},
    {"steps_per_block": 2},
    {"sub_block_length": 2},
    {"sub_block_length": 1},
    {"block_length": 2},
    {"block_length": 1},
]


def computed(llm: LLM, prompt: list[int], params: SamplingParams) -> tuple[int, int, int, int]:
    """Tokens and forwards that are expected, and those that are counted."""
    engine, plans = llm._engine, list[StepPlan]()
    request = engine.make_request(prompt, params)
    engine.observers.append(plans.append)
    engine.add(request)
    forwards = 0
    while engine.has_work:
        for _, output in engine.step().finished:
            forwards = output.forward_passes
    engine.observers.remove(plans.append)
    tokens = sum(plan.tokens for plan in plans)
    return work_of(request), forwards_of(request), tokens, forwards


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        ("llada-kv2of4", FULL),
        ("sdar-kv2of4", BLOCKS),
        ("fdv2-kv2of4", [{"block_length": 8, **given} for given in BLOCKS]),
        ("qwen3-kv2of4", [{"max_tokens": 9}, {"max_tokens": 1}]),
    ],
)
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 64}])
def test_work_is_what_is_computed(
    engines: Engines, name: str, variants: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    """Whatever the chunks of the prompt; every answer here ends where its last block ends."""
    llm = engines(helpers.GOLDEN / name, prefix_caching=False, **options)
    for given in variants:
        for length in (1, 8, 19) if "llada" in name else (1, 5, 8, 75):
            sizes = (
                {} if {"gen_length", "max_tokens"} & set(given) else {"gen_length": 24 - length % 8}
            )
            params = SamplingParams(temperature=0.0, ignore_eos=True, **given, **sizes)
            prompt = helpers.random_prompt(3, length)
            work, most, tokens, forwards = computed(llm, prompt, params)
            assert (work, most) == (tokens, forwards), (given, length)


@pytest.mark.parametrize("name", ["sdar-kv2of4", "fdv2-kv2of4", "qwen3-kv2of4"])
def test_less_is_expected_of_an_answer_that_ends_early(engines: Engines, name: str) -> None:
    """What it has taken when it ends is work_of() its forwards and tokens, but for a window."""
    llm = engines(helpers.GOLDEN / name)
    params = SamplingParams(temperature=0.0, gen_length=200, ignore_eos=True)
    ids = helpers.answer(llm, [5, 6, 7], params)
    early = SamplingParams(
        temperature=0.0, gen_length=200, ignore_eos=True, stop_token_ids=[ids[40]]
    )
    request = llm._engine.make_request([5, 6, 7], early)
    _, _, tokens, forwards = computed(llm, [5, 6, 7], early)
    expected = work_of(request, forwards, ids.index(ids[40]) + 1)
    assert abs(expected - tokens) <= request.canvas.window
    assert expected < work_of(request)
