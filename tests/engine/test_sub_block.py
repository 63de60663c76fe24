"""Fast-dLLM v2's block cache: its forwards, and a plain loop for other models and lengths."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dllmserve import LLM, SamplingParams
from dllmserve.core.plan import Mask, Part, Span, StepPlan
from dllmserve.core.request import Request
from tests import helpers
from tests.conftest import Engines
from tests.engine.test_block_causal import FAST_DLLM, sampling
from tests.engine.test_growth import count_taken, run
from tests.oracles import models
from tests.oracles.windows import BlockCacheLoop
from tests.paged import paged_request

NUMBERS = itertools.count(2 * 10**6)


def kind(span: Span, window: int) -> str:
    """What a forward is for."""
    if span.head == Part.NONE:
        return "store"
    if span.blk_start == span.q_start + span.q_len:
        return "store, and what follows"
    return "small" if span.mask == Mask.FULL and span.q_len < window else "whole"


@contextmanager
def counted(llm: LLM, window: int) -> Iterator[Counter[str]]:
    """Counts forwards by kind."""
    runner, counts = llm._engine._runner, Counter[str]()
    execute = runner.execute

    def spy(plan: StepPlan) -> Any:
        counts.update(kind(entry.span, window) for entry in plan.entries)
        return execute(plan)

    runner.execute = spy  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        runner.execute = execute  # type: ignore[method-assign]


@pytest.mark.parametrize("name", FAST_DLLM)
def test_forwards_are_upstreams(engines: Engines, name: str) -> None:
    """Forwards over the window and over a sub-block; those that store may decide a token, too."""
    llm, found = engines(helpers.GOLDEN / name), 0
    for case in helpers.golden_raw(name):
        if case["kind"] != "fdv2-generate" or not case["settings"]["use_block_cache"]:
            continue
        params = sampling(case, 0)
        assert params is not None and params.cache == "sub_block"
        with counted(llm, case["settings"]["block_size"]) as counts:
            assert helpers.answer(llm, case["prompt_ids"], params) == case["expected_trimmed"]
        forwards = case["forwards"]
        assert counts["whole"] == forwards["denoise_full"], case["prompt_ids"]
        assert counts["small"] == forwards["denoise_small"], case["prompt_ids"]
        found += 1
    assert found > 5


def request(prompt: list[int], shifted: bool, **given: Any) -> Request:
    params = SamplingParams(temperature=0.0, ignore_eos=True, **given)
    return paged_request(next(NUMBERS), prompt, params, seed=5, shift=int(shifted))


def jobs(shifted: bool) -> list[Request]:
    """Windows, sub-blocks and prompts of many lengths; sub-blocks of one and of a whole window."""
    dice, made = random.Random(7), []
    for i in range(14):
        window, part = dice.choice([(4, 2), (8, 2), (8, 4), (12, 3), (8, 1), (8, 8), (16, 4)])
        given = {
            "block_length": window,
            "sub_block_length": part,
            "gen_length": dice.choice([3, 17, 40]),
        }
        prompt = helpers.random_prompt(i, dice.choice([1, window - 1, window, window + 2, 45]))
        given |= {"unmask": "threshold_strict", "threshold": dice.choice([0.1, 0.3, 1.0])}
        made.append(request(prompt, shifted, cache="sub_block", **given))
    return made


@pytest.mark.parametrize("name", ["llada-kv2of4", "dream-kv2of4"])
def test_against_the_plain_loop(engines: Engines, name: str) -> None:
    """Alone with the same forwards; together, in small steps, beside requests whose pages grow."""
    model = models.load(helpers.GOLDEN / name)
    llm, expected = engines(helpers.GOLDEN / name), []
    exact = 0
    for one in jobs(model.shifted):
        params, window = one.params, one.params.block_length or 0
        part = params.sub_block_length or 0
        loop = BlockCacheLoop(model, one.prompt_ids, window, part, params.threshold)
        expected.append(loop.decode(params.gen_length))
        exact += _without_cache(llm, one, model.shifted) == expected[-1]
        with counted(llm, window) as counts:
            [(ids, _)] = run(llm, [one])
        assert ids == expected[-1], params
        ended = (one.canvas.start + params.gen_length) % window == 0
        assert counts["whole"] == loop.whole or not ended, params
        assert counts["small"] == loop.small or not ended, params
    assert exact < len(expected)  # what is out of date does move tokens
    for options in ({}, {"max_num_batched_tokens": 32, "page_size": 4, "max_logit_rows": 5}):
        other = engines(helpers.GOLDEN / name, **options)
        mixed = in_turns(jobs(model.shifted), growing(model.shifted))
        found = run(other, mixed)
        assert [ids for ids, _ in found[::2]] == expected, options


def _without_cache(llm: LLM, one: Request, shifted: bool) -> list[int]:
    given = {"block_length", "sub_block_length", "gen_length", "unmask", "threshold"}
    params = {name: getattr(one.params, name) for name in given}
    return run(llm, [request(one.prompt_ids, shifted, **params)])[0][0]


def in_turns(first: list[Request], second: list[Request]) -> list[Request]:
    return [one for pair in zip(first, second, strict=True) for one in pair]


def growing(shifted: bool) -> list[Request]:
    """As many requests that may have to give their pages back."""
    return [
        request(helpers.random_prompt(50 + i, 5 + 3 * i), shifted, gen_length=20, block_length=4)
        for i in range(14)
    ]


def test_keeps_its_pages_where_others_lose_theirs(engines: Engines) -> None:
    """K,V that are out of date cannot be computed anew."""
    name = "llada-kv2of4"
    expected = [run(engines(helpers.GOLDEN / name), [one])[0] for one in jobs(False)]
    others = [run(engines(helpers.GOLDEN / name), [one])[0] for one in growing(False)]
    llm = engines(helpers.GOLDEN / name, kv_pages=24, page_size=4, max_num_seqs=7)
    mixed = in_turns(growing(False), jobs(False))
    taken = count_taken(llm)
    found = run(llm, mixed)
    assert found[1::2] == expected
    assert found[::2] == others
    assert taken and not {one.id for one in mixed[1::2]} & set(taken)


def test_any_rule_and_draws(engines: Engines) -> None:
    """A schedule's steps are not launched ahead, because spans follow what is written."""
    llm = engines(helpers.GOLDEN / "fdv2-kv2of4")
    base = {"gen_length": 40, "ignore_eos": True, "cache": "sub_block", "sub_block_length": 8}
    variants: list[dict[str, Any]] = [
        {"temperature": 0.0, "steps_per_block": 16},
        {"temperature": 0.0, "unmask": "sequential"},
        {"temperature": 0.9, "seed": 4},
        {"temperature": 0.0, "unmask": "dynamic", "threshold": 0.4},
        {"temperature": 0.0, "unmask": "klass", "threshold": 0.2, "kl_threshold": 0.3},
        {"temperature": 0.7, "unmask": "factor", "seed": 2, "cache": "none"},
    ]
    params = [SamplingParams(**{**base, **given}) for given in variants]
    prompts = [helpers.random_prompt(i, 4 + 11 * i) for i in range(len(params))]
    alone = [helpers.answer(llm, *pair) for pair in zip(prompts, params, strict=True)]
    together = llm.generate(prompts, params, use_tqdm=False)
    helpers.check_idle(llm)
    assert [output["token_ids"] for output in together] == alone
