"""Prompts and sizes of a workload; counts of requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dllmserve import SamplingParams
from dllmserve.errors import (
    ConfigError,
    ContextLengthError,
    WeightsError,
)
from dllmserve.models.loader import find_model, read_config, read_spec, require_weights
from dllmserve.tools.bench.workload import Workload
from dllmserve.tools.text import numbers
from tests.bench.test_roofline import SPEC


def workload(**values: Any) -> Workload:
    params = SamplingParams(gen_length=values.pop("gen_length", 16))
    rest = {"prompt_len": 20, "seed": 0, "runs": 1, "warmup": 0, **values}
    return Workload(params=params, **rest)


def test_prompts_are_seeded_and_without_special_ids() -> None:
    prompts = workload(prompt_len=200).prompts(3, SPEC)
    assert [len(p) for p in prompts] == [200] * 3
    assert set().union(*prompts) == set(range(30)) - {SPEC.mask_id, *SPEC.eos_ids}
    assert prompts == workload(prompt_len=200).prompts(3, SPEC)
    assert prompts != workload(prompt_len=200, seed=1).prompts(3, SPEC)
    assert len(set(map(tuple, prompts))) == 3


def test_fewer_prompts_are_the_first_of_more() -> None:
    work = workload()
    assert work.prompts(5, SPEC)[:2] == work.prompts(2, SPEC)


@pytest.mark.parametrize(
    ("prompt", "answer", "limit", "expected"),
    [(256, 128, 131072, 512), (128, 128, 131072, 256), (1, 1, 4096, 256), (280, 20, 320, 320)],
)
def test_engine_is_as_long_as_needed(prompt: int, answer: int, limit: int, expected: int) -> None:
    work = workload(prompt_len=prompt, gen_length=answer)
    assert work.max_model_len(replace(SPEC, max_model_len=limit)) == expected


def test_too_long_for_the_model() -> None:
    with pytest.raises(ContextLengthError, match="66 tokens together, over the model's 64"):
        workload(prompt_len=50).max_model_len(SPEC)


@pytest.mark.parametrize("values", [{"prompt_len": 0}, {"runs": 0}, {"warmup": -1}])
def test_bad_numbers(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        workload(**values)


def test_counts() -> None:
    assert numbers("requests", "1, 16,64", int, "integers >= 1") == [1, 16, 64]
    for text in ("", "0", "1,,2", "-1", "1.5", "x", "²", "1_0", "1 2"):
        with pytest.raises(ConfigError, match="requests must be integers >= 1"):
            numbers("requests", text, int, "integers >= 1")


@pytest.mark.parametrize(
    ("name", "architecture", "parameters", "positions"),
    [
        ("llada-8b", "LLaDAModelLM", 8_015_581_184, 4096),
        ("dream-7b", "DreamModel", 7_615_616_512, 131072),
        ("illada-8b", "ILLaDAForCausalLM", 7_615_025_152, 8192),
        ("sdar-4b", "SDARForCausalLM", 4_411_424_256, 32768),
        ("sdar-8b", "SDARForCausalLM", 8_190_735_360, 32768),
        ("fast-dllm-v2-7b", "Fast_dLLM_QwenForCausalLM", 7_615_616_512, 32768),
        ("qwen3-8b", "Qwen3ForCausalLM", 8_190_735_360, 40960),
        ("llada2-mini", "LLaDA2MoeModelLM", 16_255_643_392, 16384),
        ("llada-moe-7b", "LLaDAMoEModelLM", 7_356_880_896, 8192),
        ("sdar-30b-a3b", "SDARMoeForCausalLM", 30_532_122_624, 32768),
        ("qwen3-30b-a3b", "Qwen3MoeForCausalLM", 30_532_122_624, 40960),
        ("diffusion-gemma-26b", "DiffusionGemmaForBlockDiffusion", 25_250_986_812, 262144),
    ],
)
def test_shapes_of_public_checkpoints(
    name: str, architecture: str, parameters: int, positions: int
) -> None:
    spec = read_spec(read_config(find_model(name)))
    assert (spec.architecture, spec.parameters()) == (architecture, parameters)
    assert (spec.max_model_len, spec.dtype) == (positions, "bfloat16")


def test_shapes_have_no_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"shapes of a public checkpoint .* load_format='dummy'"):
        require_weights(find_model("llada-8b"))
    require_weights(find_model("tiny"))
    named = tmp_path / "llada-8b"  # somebody's own directory of that name
    named.mkdir()
    require_weights(named)
