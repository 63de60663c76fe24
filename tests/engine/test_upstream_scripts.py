"""The oracles' own loops, run on settings that have no golden, against the engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dllmserve import SamplingParams, SparseConfig
from tests.conftest import Engines
from tests.helpers import DREAM_CONFIDENCE, answer, random_prompt
from tests.oracles import dream, fast_dllm, llada, models, sparse_dllm
from tests.reference import position_uniform, uniforms

SEEDS = (11, 12, 13)
VOCAB = 61


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **options})


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
def test_llada_with_the_engines_noise(
    engines: Engines,
    checkpoints: dict[str, Path],
    seed: int,
    remasking: str,
    temperature: float,
    cfg_scale: float,
) -> None:
    prompt = random_prompt(seed, 9)
    shared = {"steps": 12, "gen_length": 18, "block_length": 9, "remasking": remasking}
    shared |= {"temperature": temperature, "cfg_scale": cfg_scale}

    def tokens(_row: int, position: int, step: int) -> Tensor:
        u = uniforms(seed, position, step, VOCAB)
        u[60] = 0.0  # -ln 0 is infinite: the engine never proposes the mask id
        return u

    def positions(_row: int, position: int, step: int) -> float:
        return position_uniform(seed, position, step)

    expected = llada.generate(
        models.load(checkpoints["llada"]),
        torch.tensor([prompt]),
        uniform=tokens,
        confidence_noise=positions if remasking == "random" else None,
        **shared,
    )
    llm = engines(checkpoints["llada"])
    assert answer(llm, prompt, greedy(seed=seed, **shared)) == expected[0].tolist()


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("name", ["llada", "llada-odd", "llada-bias"])
def test_fast_dllm(engines: Engines, checkpoints: dict[str, Path], name: str, cache: str) -> None:
    oracle, llm = models.load(checkpoints[name]), engines(checkpoints[name])
    shared = {"steps": 24, "gen_length": 24, "block_length": 8, "cache": cache}
    for rule in ({"factor": 1.0}, {"factor": 2.5}, {"threshold": 0.4}, {"threshold": 0.0}):
        prompt = random_prompt(len(str(rule)), 13)
        expected = fast_dllm.generate(oracle, torch.tensor([prompt]), **shared, **rule)
        params = greedy(unmask=next(iter(rule)), **shared, **rule)
        assert answer(llm, prompt, params) == expected[0].tolist()


@pytest.mark.parametrize("alg", dream.ALGORITHMS)
@pytest.mark.parametrize("name", ["dream", "dream-odd", "dream-tied"])
def test_dream_filters(engines: Engines, checkpoints: dict[str, Path], name: str, alg: str) -> None:
    oracle, llm = models.load(checkpoints[name]), engines(checkpoints[name])
    confidence = DREAM_CONFIDENCE[alg]
    for steps, filters in (
        (20, {}),
        (7, {"top_p": 0.6}),
        (9, {"top_k": 4}),
        (13, {"top_p": 0.9, "top_k": 11}),
        (6, {"top_k": 1000}),
    ):
        prompt = random_prompt(steps, 8)
        expected = dream.generate(
            oracle, torch.tensor([prompt]), steps=steps, gen_length=20, alg=alg, **filters
        )
        params = greedy(
            steps=steps, gen_length=20, schedule="dream", confidence=confidence, **filters
        )
        assert answer(llm, prompt, params) == expected[0].tolist(), (steps, filters)


@pytest.mark.parametrize("head_select", [True, False])
@pytest.mark.parametrize("delay_step", [0, 1, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_sparse_dllm(
    engines: Engines,
    checkpoints: dict[str, Path],
    head_select: bool,
    delay_step: int,
    kernel: int,
) -> None:
    oracle, llm = models.load(checkpoints["llada"]), engines(checkpoints["llada"])
    prompt = random_prompt(kernel, 17)
    for ratio, window in ((0.5, 8), (0.25, 12)):
        expected = sparse_dllm.generate(
            oracle,
            torch.tensor([prompt]),
            steps=18,
            gen_length=24,
            block_length=8,
            retention_ratio=ratio,
            pool_kernel=kernel,
            delay_step=delay_step,
            head_select=head_select,
            ties="topk",
            cache_block_len=window,
        )
        sparse = SparseConfig(True, ratio, delay_step, window, head_select, kernel)
        params = greedy(steps=18, gen_length=24, block_length=8)
        assert answer(llm, prompt, params, sparse) == expected[0].tolist()
