"""log_likelihood against slow loops over the naive models."""

import math
import random
from array import array
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from dllmserve import LLM, SamplingParams
from dllmserve.core.likelihood import sample_masks
from dllmserve.core.plan import StepPlan
from dllmserve.errors import (
    ContextLengthError,
    InvalidParameterError,
    InvalidRequestError,
    PromptError,
)
from tests import helpers
from tests.conftest import Engines
from tests.oracles import models
from tests.oracles.likelihood import block_bound, bound
from tests.oracles.windows import pieces

TOLERANCE = 2e-4


def key_of(seed: int, prompt: list[int], part: int = 0) -> str:
    """What the draws of a part of an answer depend on."""
    return f"{seed} {sha256(array('q', prompt).tobytes()).hexdigest()} {part}"


def each_sample(length: int, samples: int, key: str) -> list[tuple[int, ...]]:
    """The masks of every sample; those that mask the same come as often as their weight says."""
    found = []
    for masks, weight in sample_masks(length, samples, key).items():
        times = weight * samples * len(masks) / length
        assert times == pytest.approx(round(times)) and round(times) >= 1
        found += [masks] * round(times)
    assert len(found) == samples
    return found


def test_masks_are_spread_as_upstreams() -> None:
    for length, samples in ((1, 5), (3, 4), (7, 128), (100, 32), (128, 128), (5, 1)):
        seen = Counter[tuple[int, ...]]()
        for seed in range(30):
            masks = each_sample(length, samples, str(seed))
            assert all(m == tuple(sorted(set(m))) for m in masks)
            counts = sorted(map(len, masks))
            # upstream: round(linspace(k, k + (b - 1) n / b, b)), counted around from 1 to n
            ways = []
            for k in range(1, length + 1):
                steps = [round(Fraction(k) + Fraction(j * length, samples)) for j in range(samples)]
                ways.append(sorted((x - 1) % length + 1 for x in steps))
            assert counts in ways
            seen.update(masks)
        if length == 3:  # every position is as likely to be masked
            each = [sum(n for m, n in seen.items() if p in m) for p in range(3)]
            assert max(each) < 1.5 * min(each)


def test_common_random_numbers() -> None:
    """Answers of one length mask alike; a longer one's ranks begin with a shorter one's."""
    assert sample_masks(9, 64, "a") == sample_masks(9, 64, "a") != sample_masks(9, 64, "b")
    for number in range(40):
        (short,), (long,) = (sample_masks(n, 1, str(number)) for n in (8, 16))
        low = set(long) & set(range(8))
        assert low <= set(short) or set(short) <= low


def pairs_of(seed: int, lengths: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Some answers to each of a few prompts, as two lists."""
    dice = random.Random(seed)
    prompts, answers = [], []
    for number in range(3):
        prompt = helpers.random_prompt(seed + number, dice.randrange(1, 9))
        for length in lengths:
            prompts.append(prompt)
            answers.append(helpers.random_prompt(1000 * seed + len(prompts), length))
    return prompts, answers


@pytest.mark.parametrize("name", ["llada", "dream", "llada-odd"])
def test_masked_models(engines: Engines, checkpoints: dict[str, Path], name: str) -> None:
    """In small steps and chunks, and beside other requests."""
    model = models.load(checkpoints[name])
    prompts, answers = pairs_of(3, [1, 2, 5, 11])
    expected = [
        bound(model, p, a, each_sample(len(a), 16, key_of(5, p)))
        for p, a in zip(prompts, answers, strict=True)
    ]
    for options in ({}, {"max_logit_rows": 7, "max_num_batched_tokens": 64, "max_num_seqs": 3}):
        llm = engines(checkpoints[name], **options)
        found = llm.log_likelihood(prompts, answers, samples=16, seed=5, use_tqdm=False)
        assert found == pytest.approx(expected, abs=TOLERANCE)
        helpers.check_idle(llm)


def test_the_bound_is_unbiased(engines: Engines, checkpoints: dict[str, Path]) -> None:
    """Many samples come near the mean over all subsets, which one can count."""
    llm, model = engines(checkpoints["llada"]), models.load(checkpoints["llada"])
    prompt, answer = [5, 6, 7], [8, 9, 10]
    exact = (
        sum(bound(model, prompt, answer, list(combinations(range(3), n))) for n in (1, 2, 3)) / 3
    )
    (found,) = llm.log_likelihood([prompt], [answer], samples=20000, use_tqdm=False)
    assert found == pytest.approx(exact, abs=0.4)


def as_geometry(path: Path, **changed: Any) -> LLM:
    """The same weights with another geometry, which requests decide."""
    llm = LLM(str(path), device="cpu")
    validator = llm._engine._validator
    llm._engine._validator = replace(validator, spec=replace(validator.spec, **changed))
    return llm


@pytest.mark.parametrize("name", ["llada-kv2of4", "dream-kv2of4"])
@pytest.mark.parametrize("window", [4, 5])
def test_block_causal_models(name: str, window: int) -> None:
    """Behind prompts that end anywhere in a block, with answers that end anywhere in one."""
    path = helpers.GOLDEN / name
    llm, model = as_geometry(path, geometry="block", block_length=window), models.load(path)
    prompts, answers = pairs_of(8, [1, 3, 6, 10])
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        given, end = len(prompt), len(prompt) + len(answer)
        filled = -(-end // window) * window
        parts = pieces(given, filled, window, window, model.shifted)
        samples = [
            each_sample(min(part.stop, end) - part.start, 6, key_of(0, prompt, number))
            for number, part in enumerate(parts)
            if part.start < end
        ]
        expected.append(block_bound(model, prompt, answer, window, samples))
    found = llm.log_likelihood(prompts, answers, samples=6, use_tqdm=False)
    assert found == pytest.approx(expected, abs=TOLERANCE)
    helpers.check_idle(llm)


def test_autoregressive_models(engines: Engines) -> None:
    """The chain of the tokens' log-probabilities, whatever the samples; greedy ones are known."""
    path = helpers.GOLDEN / "dream-kv2of4"
    llm, model = as_geometry(path, geometry="causal", block_length=1), models.load(path)
    prompts, answers = pairs_of(2, [1, 4, 9])
    expected = [
        block_bound(model, p, a, 1, [[[0]]] * len(a)) for p, a in zip(prompts, answers, strict=True)
    ]
    for samples in (1, 128):
        found = llm.log_likelihood(prompts, answers, samples=samples, use_tqdm=False)
        assert found == pytest.approx(expected, abs=TOLERANCE)
    for name in ("qwen3-kv2of4", "llama-kv2of4", "qwen2-tied-kv1of6"):
        for options in ({}, {"prefix_caching": False}, {"max_num_batched_tokens": 32}):
            real = engines(helpers.GOLDEN / name, **options)
            params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
            prompts = [helpers.random_prompt(n, 5 + 20 * n) for n in range(3)]
            outputs = real.generate(prompts, params, use_tqdm=False)
            found = real.log_likelihood(
                prompts, [output["token_ids"] for output in outputs], use_tqdm=False
            )
            sums = [sum(e["logprob"] for e in output["logprobs"]) for output in outputs]
            assert found == pytest.approx(sums, abs=TOLERANCE)
            helpers.check_idle(real)


def test_what_masks_the_same_is_run_once(engines: Engines, checkpoints: dict[str, Path]) -> None:
    """A question whose answers have one token takes one forward."""
    llm = engines(checkpoints["llada"])
    plans: list[StepPlan] = []
    with llm.observe(plans.append):
        found = llm.log_likelihood([[1, 2]] * 4, [[3], [4], [5], [3]], use_tqdm=False)
    assert sum(len(plan.entries) for plan in plans) == 1 and found[0] == found[3]
    assert sum(map(math.exp, found[:3])) < 1
    plans.clear()
    with llm.observe(plans.append):
        llm.log_likelihood([[1, 2]] * 2, [[3, 4], [5, 6]], samples=50, use_tqdm=False)
    # of each answer either token, and both of both, which is one
    assert sum(len(plan.entries) for plan in plans) == 5


def test_texts(engines: Engines, byte_checkpoint: Path) -> None:
    llm = engines(byte_checkpoint, max_model_len=256)
    assert llm.tokenizer is not None
    prompt = llm.tokenizer.encode("ab")
    ids = [llm.tokenizer.encode(text, special=False) for text in ("cd", "efg")]
    of_ids = llm.log_likelihood([prompt] * 2, ids, samples=8, use_tqdm=False)
    assert llm.log_likelihood(["ab"] * 2, ["cd", "efg"], samples=8, use_tqdm=False) == of_ids
    assert llm.log_likelihood([], [], use_tqdm=False) == []


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (([[1]], [[]]), PromptError, r"answers\[0\] is empty"),
        (([[]], [[1]]), PromptError, r"prompts\[0\] is empty"),
        (([[1]], [[1], [2]]), InvalidRequestError, "answers has 2 entries for 1 prompts"),
        (("ab", "cd"), PromptError, "prompts must be a list"),
        (([[1]], [[1]], 0), InvalidParameterError, r"samples must be an integer >= 1, got 0"),
        (([[1]], [[1]], 1.5), InvalidParameterError, "samples must be"),
        (([[1]], [[1]], 1, -1), InvalidParameterError, "seed must be"),
        (([[1]], [[99999]]), PromptError, r"answers\[0\]\[0\] is 99999, outside"),
        (([[1] * 40], [[1] * 40]), ContextLengthError, "prompts.0. has 40 tokens"),
        (([[1]], [[1] * 9000]), InvalidRequestError, r"answers\[0\] has 9000 tokens, over"),
    ],
)
def test_bad_input(
    engines: Engines, checkpoints: dict[str, Path], given: Any, error: Any, words: str
) -> None:
    llm = engines(checkpoints["llada"], max_model_len=64)
    with pytest.raises(error, match=words):
        llm.log_likelihood(*given, use_tqdm=False)
    helpers.check_idle(llm)


def test_a_model_that_fills_blocks_as_a_whole_is_refused(checkpoints: dict[str, Path]) -> None:
    llm = as_geometry(checkpoints["dream"], geometry="block", block_length=4, causal_context=True)
    with pytest.raises(InvalidRequestError, match="fills a block as a whole"):
        llm.log_likelihood([[1]], [[2]], use_tqdm=False)


def test_with_other_requests(engines: Engines, checkpoints: dict[str, Path]) -> None:
    """The answers of others do not change, nor do the sums, to the tolerance of products."""
    llm = engines(checkpoints["llada"])
    engine, params = llm._engine, SamplingParams(temperature=0.9, seed=3, gen_length=24, steps=24)
    alone = llm.generate([[4, 5]], params, use_tqdm=False)[0]["token_ids"]
    sums = llm.log_likelihood([[1, 2, 3]], [[4, 5, 6]], samples=9, use_tqdm=False)
    other = engine.make_request([4, 5], params)
    engine.add(other)
    for _ in range(3):
        engine.step()
    found = llm.log_likelihood([[1, 2, 3]], [[4, 5, 6]], samples=9, use_tqdm=False)
    assert found == pytest.approx(sums, abs=TOLERANCE)
    done = None
    while engine.has_work:
        for request, output in engine.step().finished:
            done = output if request is other else done
    assert done is not None and done.token_ids == alone
