"""Requests that begin alike share K,V: the same tokens, computed once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dllmserve import LLM, SamplingParams
from dllmserve.core.plan import Kind, StepPlan
from tests import helpers
from tests.conftest import Engines
from tests.engine.test_block_causal import FAST_DLLM, SDAR, cases
from tests.helpers import answers

PAGE = 4
MODELS = (*SDAR, *FAST_DLLM, "qwen3-kv2of4", "llama3rope-tied-kv2of6", "qwen2-tied-kv1of6")


@contextmanager
def watched(llm: LLM) -> Iterator[list[StepPlan]]:
    """Plans of the steps inside."""
    plans: list[StepPlan] = []
    llm._engine.observers.append(plans.append)
    yield plans
    llm._engine.observers.remove(plans.append)


def stored(plans: list[StepPlan]) -> int:
    """Tokens of forwards that store a prompt."""
    return sum(e.tokens for plan in plans for e in plan.entries if e.kind is Kind.STORE)


def params(**given: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "gen_length": 8, "ignore_eos": True, **given})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"kv_pages": 90, "max_num_batched_tokens": 70}])
def test_goldens_on_a_warm_cache(engines: Engines, name: str, options: dict[str, Any]) -> None:
    """Upstream's tokens, whatever others have left in pages, or taken from them."""
    llm = engines(helpers.GOLDEN / name, page_size=PAGE, **options)
    batch = cases(name)
    expected = [case[2] for case in batch]
    assert answers(llm, batch) == expected
    before = llm._engine.scheduler.storage.cached
    # backwards, since few pages keep what came last
    assert answers(llm, batch[::-1]) == expected[::-1]
    assert llm._engine.scheduler.storage.cached > before


@pytest.mark.parametrize("name", ["sdar-kv2of4", "fdv2-kv2of4", "qwen3-kv2of4"])
def test_goldens_without_it(engines: Engines, name: str) -> None:
    llm = engines(helpers.GOLDEN / name, page_size=PAGE, prefix_caching=False)
    batch = cases(name)
    for _ in range(2):
        assert answers(llm, batch) == [case[2] for case in batch]
    assert llm._engine.scheduler.storage.cached == 0


@pytest.mark.parametrize(
    ("name", "cached"), [("sdar-kv2of4", 40), ("fdv2-kv2of4", 32), ("qwen3-kv2of4", 36)]
)
def test_what_is_counted(engines: Engines, name: str, cached: int) -> None:
    """Full pages of whole windows; what the first token is read at is computed again."""
    prompt = helpers.random_prompt(9, 40)
    llm = engines(helpers.GOLDEN / name, page_size=PAGE)
    first, again = (llm.generate([prompt], params(), use_tqdm=False)[0] for _ in range(2))
    assert first["usage"]["cached_tokens"] == 0
    assert again["usage"]["cached_tokens"] == cached
    assert first["token_ids"] == again["token_ids"]


def test_full_attention_shares_nothing(engines: Engines) -> None:
    llm = engines(helpers.GOLDEN / "llada-kv2of4", page_size=PAGE)
    prompt = helpers.random_prompt(9, 40)
    for _ in range(2):
        [output] = llm.generate([prompt], params(cache="dual"), use_tqdm=False)
        assert output["usage"]["cached_tokens"] == 0


@pytest.mark.parametrize("name", ["sdar-kv2of4", "qwen3-kv2of4"])
def test_a_conversation_goes_on_from_its_pages(engines: Engines, name: str) -> None:
    """Answers are found too, and are no different from a prompt that was stored in chunks."""
    llm = engines(helpers.GOLDEN / name, page_size=PAGE)
    cold = engines(helpers.GOLDEN / name, page_size=PAGE, prefix_caching=False)
    history = helpers.random_prompt(4, 21)
    for turn in range(4):
        length = len(history)
        [output] = llm.generate([history], params(gen_length=24), use_tqdm=False)
        [other] = cold.generate([history], params(gen_length=24), use_tqdm=False)
        assert output["token_ids"] == other["token_ids"]
        if turn:  # all but the end of the turn before, whose K,V nothing needed
            assert output["usage"]["cached_tokens"] >= length - 7 - 2 * PAGE
        history = [*history, *output["token_ids"], *helpers.random_prompt(50 + turn, 7)]


def test_requests_at_once_compute_a_common_prompt_once(engines: Engines) -> None:
    """Those that come in the same step wait for the one that stores what they need."""
    llm = engines(helpers.GOLDEN / "sdar-kv2of4", page_size=PAGE, max_num_seqs=16)
    system = helpers.random_prompt(77, 120)
    prompts = [[*system, *helpers.random_prompt(i, 9)] for i in range(16)]
    with watched(llm) as plans:
        outputs = llm.generate(prompts, params(), use_tqdm=False)
    assert stored(plans) <= len(system) + 16 * 16
    assert sum(output["usage"]["cached_tokens"] >= 120 for output in outputs) == 15


def test_the_least_recently_used_goes_first(engines: Engines) -> None:
    """Pages for three prompts: the one that was used again stays, the oldest other one goes."""
    llm = engines(helpers.GOLDEN / "qwen3-kv2of4", page_size=PAGE, kv_pages=36)

    def cached(index: int) -> int:
        prompt = helpers.random_prompt(index, 41)
        [output] = llm.generate([prompt], params(gen_length=2), use_tqdm=False)
        tokens: int = output["usage"]["cached_tokens"]
        return tokens

    assert [cached(1), cached(2), cached(3)] == [0, 0, 0]
    assert cached(1) == 40
    assert cached(4) == 0  # takes the place of 2
    assert cached(1) == 40
    assert cached(2) < 40


def test_pages_of_one_owner_are_not_shown_to_another(engines: Engines) -> None:
    """With prefix_isolation; without it, they are."""
    for isolated in (False, True):
        llm = engines(helpers.GOLDEN / "qwen3-kv2of4", page_size=PAGE, prefix_isolation=isolated)
        engine, prompt, found = llm._engine, helpers.random_prompt(123, 40), []
        for owner in ("alice", "bob", "bob"):
            engine.add(engine.make_request(prompt, params(), owner=owner))
            while engine.has_work:
                found += [output.cached_tokens for _, output in engine.step().finished]
        assert found == ([0, 0, 36] if isolated else [0, 36, 36])


def test_an_aborted_request_leaves_what_it_has_stored_and_nothing_else(engines: Engines) -> None:
    llm = engines(helpers.GOLDEN / "sdar-kv2of4", page_size=PAGE, max_num_batched_tokens=32)
    engine, prompt = llm._engine, helpers.random_prompt(321, 100)
    aborted = engine.make_request(prompt, params())
    engine.add(aborted)
    engine.step()
    engine.step()
    engine.abort(aborted)
    helpers.check_idle(llm)
    [output] = llm.generate([prompt], params(), use_tqdm=False)
    assert output["usage"]["cached_tokens"] == 64
    cold = engines(helpers.GOLDEN / "sdar-kv2of4", prefix_caching=False)
    assert output["token_ids"] == cold.generate([prompt], params(), use_tqdm=False)[0]["token_ids"]
