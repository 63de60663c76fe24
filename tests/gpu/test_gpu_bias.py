"""Logit bias on a CUDA device: graphs on and off, both kinds of kernels, and a CPU."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from dllmserve import LLM, SamplingParams
from tests import helpers
from tests.conftest import SHAPES
from tests.oracles import models
from tests.reference import decode

VARIANTS: list[dict[str, Any]] = [
    {"steps": 12, "block_length": 8},
    {"steps": 12, "block_length": 8, "cache": "prefix"},
    {"unmask": "threshold", "threshold": 0.3, "block_length": 8},
    {"unmask": "entropy_bound", "entropy_bound": 2.0, "block_length": 8},
    {"unmask": "factor", "confidence": "margin", "block_length": 8},
    {"steps": 12, "cfg_scale": 0.7, "block_length": 8},
    {"steps": 12, "temperature": 0.8, "block_length": 8},
    {"steps": 12, "temperature": 0.9, "top_p": 0.8, "top_k": 12, "block_length": 8},
    {"steps": 12, "block_length": 8, "confidence_eos_eot_inf": True},
    {"steps": 12, "block_length": 8, "confidence_eos_eot_inf": True, "confidence": "margin"},
    {"steps": 12, "temperature": 0.8, "block_length": 8, "logits_eos_inf": True},
]


def jobs() -> list[tuple[list[int], SamplingParams]]:
    """Two of each variant, every other one with a bias."""
    made = []
    for i in range(2 * len(VARIANTS)):
        options = {"temperature": 0.0, "cache": "dual", "seed": i, **VARIANTS[i % len(VARIANTS)]}
        bias = {(5 * i + 3 * k) % 60: (-100.0, 1.5, -2.0)[k % 3] for k in range(1 + i)}
        given = None if (i + i // len(VARIANTS)) % 2 else bias
        params = SamplingParams(gen_length=24, ignore_eos=True, logit_bias=given, **options)
        made.append((helpers.random_prompt(i, 3 + 7 * i % 29), params))
    return made


def run(llm: LLM) -> list[list[int]]:
    prompts, params = (list(column) for column in zip(*jobs(), strict=True))
    outputs = llm.generate(prompts, params, use_tqdm=False)
    helpers.check_idle(llm)
    return [output["token_ids"] for output in outputs]


@pytest.mark.parametrize("name", ["llada", "dream", "llada-eos"])
def test_graphs_kernels_and_devices_agree(checkpoints: dict[str, Path], name: str) -> None:
    oracle = models.load(checkpoints[name])
    ends = SHAPES[name].eos_ids
    expected = [decode(oracle, prompt, params, eos_ids=ends).ids for prompt, params in jobs()]
    options: dict[str, Any] = {"dtype": "float32", "kv_pages": 200, "page_size": 8}
    assert run(LLM(str(checkpoints[name]), device="cpu", **options)) == expected
    llm = LLM(str(checkpoints[name]), device="cuda", **options)
    for _ in range(3):  # shapes that come back are captured, then replayed
        assert run(llm) == expected
    graphs = llm._engine._runner.graphs
    assert graphs is not None
    assert any(s.edits for shape in graphs._graphs for s in shape.segments)
    assert any(s.last for shape in graphs._graphs for s in shape.segments)
    more: dict[str, Any]
    for more in ({"enforce_eager": True}, {"max_logit_rows": 7}):
        assert run(LLM(str(checkpoints[name]), device="cuda", **options, **more)) == expected, more
    # other kernels sum in another order, so a near tie may fall the other way
    plain = {"kernels": "torch", "attention": "sdpa"}
    got = run(LLM(str(checkpoints[name]), device="cuda", **options, **plain))
    assert sum(a == b for a, b in zip(got, expected, strict=True)) >= len(expected) - 1


def test_a_biased_step_never_waits_for_the_device(checkpoints: dict[str, Path]) -> None:
    llm = LLM(str(checkpoints["llada"]), device="cuda", dtype="float32", kv_pages=200)
    expected = run(llm)
    run(llm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert run(llm) == expected
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_bans_and_forces(
    checkpoints: dict[str, Path], dtype: str, kernels: str
) -> None:
    llm = LLM(str(checkpoints["llada"]), device="cuda", dtype=dtype, kernels=kernels, kv_pages=200)
    for options in VARIANTS:
        given = {"temperature": 0.0, "cache": "dual", "seed": 1, **options}
        base = {"gen_length": 24, "ignore_eos": True, **given}
        plain = helpers.answer(llm, [1, 2, 3], SamplingParams(**base))
        banned = SamplingParams(**base, logit_bias=dict.fromkeys(plain, -100))
        assert not set(plain) & set(helpers.answer(llm, [1, 2, 3], banned)), options
        forced = SamplingParams(**base, logit_bias={7: 100, 9: 100})
        assert set(helpers.answer(llm, [1, 2, 3], forced)) <= {7, 9}, options
