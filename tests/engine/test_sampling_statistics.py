"""Sampled tokens follow softmax(z / T), filtered or not. Seeds are fixed, so runs are equal."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from scipy.stats import chisquare

from dllmserve import SamplingParams
from tests.conftest import Engines

LOGITS = [1.5, 0.3, -0.7, 2.0, 0.9, -1.5, 0.0, 1.1, -40.0]  # the last id is the mask
DRAWS = 3000


def expected(temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """Probability of every id that may be drawn."""
    weights = {i: math.exp(z / temperature) for i, z in enumerate(LOGITS[:-1])}
    ranked = sorted(weights, key=lambda i: -weights[i])
    total = sum(weights.values())
    kept: list[int] = []
    for i in ranked:
        if sum(weights[j] for j in kept) / total <= top_p or top_p == 1.0:
            kept.append(i)
    kept = kept[: top_k or None]
    left = sum(weights[i] for i in kept)
    return {i: weights[i] / left for i in kept}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.3, 0, 0.6), (0.8, 5, 0.9)],
)
@pytest.mark.parametrize("across", ["seeds", "positions"])
def test_frequencies(
    engines: Engines,
    constant_checkpoint: Callable[[list[float]], Path],
    temperature: float,
    top_k: int,
    top_p: float,
    across: str,
) -> None:
    llm = engines(constant_path(constant_checkpoint), max_num_seqs=256)
    length = 1 if across == "seeds" else 500
    params = [
        SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            gen_length=length,
            steps=1,
            seed=seed,
            ignore_eos=True,
        )
        for seed in range(DRAWS // length)
    ]
    outputs = llm.generate([[1]] * len(params), params, use_tqdm=False)
    seen = Counter(token for output in outputs for token in output["token_ids"])
    wanted = expected(temperature, top_k, top_p)
    assert set(seen) <= set(wanted)
    ids = sorted(wanted)
    result = chisquare([seen[i] for i in ids], [DRAWS * wanted[i] for i in ids])
    assert result.pvalue > 0.01


PATHS: list[Path] = []


def constant_path(make: Callable[[list[float]], Path]) -> Path:
    """The one checkpoint of this module."""
    if not PATHS:
        PATHS.append(make(LOGITS))
    return PATHS[0]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-10, 1e-3])
def test_a_tiny_temperature_is_greedy(
    engines: Engines, constant_checkpoint: Callable[[list[float]], Path], temperature: float
) -> None:
    llm = engines(constant_path(constant_checkpoint), max_num_seqs=256)
    for options in ({}, {"top_p": 0.9}, {"top_k": 3}, {"top_p": 0.5, "schedule": "dream"}):
        params = SamplingParams(temperature=temperature, gen_length=8, steps=2, seed=1, **options)
        assert llm.generate([[1]], params, use_tqdm=False)[0]["token_ids"] == [3] * 8


@pytest.mark.parametrize("temperature", [1e6, 1e300])
def test_a_huge_temperature_is_uniform(
    engines: Engines, constant_checkpoint: Callable[[list[float]], Path], temperature: float
) -> None:
    llm = engines(constant_path(constant_checkpoint), max_num_seqs=256)
    params = SamplingParams(
        temperature=temperature, gen_length=800, steps=1, seed=2, ignore_eos=True
    )
    seen = Counter(llm.generate([[1]], params, use_tqdm=False)[0]["token_ids"])
    assert set(seen) == set(range(8))
    assert chisquare([seen[i] for i in range(8)]).pvalue > 0.01
