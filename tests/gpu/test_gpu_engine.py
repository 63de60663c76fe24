"""Upstream's outputs and the slow decoder's, through the engine on a CUDA device."""

import random
from functools import cache
from pathlib import Path

import pytest

from dllmserve import LLM, SamplingParams, SparseConfig
from tests import helpers
from tests.conftest import SHAPES
from tests.oracles import models
from tests.reference import decode

CACHES: dict[str, SparseConfig | None] = {
    "none": None,
    "prefix": None,
    "dual": None,
    "sparse": SparseConfig(default_block_len=6),
    "shared": SparseConfig(default_block_len=8, head_select=False),
}


@cache
def expected(name: str) -> list[list[int]]:
    """Answers of all golden cases.

    Where upstream's sparse selection is tied it depends on torch.topk on a CPU, so those cases
    are decoded anew with ties by position, which is what the engine does on a device.
    """
    oracle = models.load(helpers.GOLDEN / name)
    return [
        case.output
        if case.sparse is None
        else decode(oracle, case.prompt, case.params, case.sparse, ties="position").ids
        for case in helpers.golden(name)
    ]


@pytest.mark.parametrize("name", helpers.MODELS)
def test_golden_alone(golden_engines: dict[str, LLM], name: str) -> None:
    llm = golden_engines[name]
    for case, ids in zip(helpers.golden(name), expected(name), strict=True):
        assert helpers.answer(llm, case.prompt, case.params, case.sparse) == ids, case.params


@pytest.mark.parametrize("name", helpers.MODELS)
def test_golden_mixed(golden_engines: dict[str, LLM], name: str) -> None:
    llm = golden_engines[name]
    pairs = list(zip(helpers.golden(name), expected(name), strict=True))
    for seed in range(2):
        random.Random(seed).shuffle(pairs)
        assert helpers.run_cases(llm, [c for c, _ in pairs]) == [ids for _, ids in pairs]


@pytest.mark.parametrize("name", helpers.MODELS)
def test_golden_in_small_steps(name: str) -> None:
    llm = LLM(
        str(helpers.GOLDEN / name),
        device="cuda",
        dtype="float32",
        max_num_batched_tokens=400,
        max_logit_rows=50,
        max_num_seqs=5,
        page_size=7,
        kv_pages=90,
    )
    assert helpers.run_cases(llm, helpers.golden(name)) == expected(name)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(checkpoints: dict[str, Path], name: str, cache: str) -> None:
    sparse = CACHES[cache]
    policy = "none" if sparse else cache
    llm = LLM(str(checkpoints[name]), device="cuda", dtype="float32", kv_pages=100, page_size=5)
    oracle = models.load(checkpoints[name])
    shared = {"gen_length": 20, "cache": policy, "ignore_eos": True}
    params = [
        SamplingParams(temperature=0.0, steps=11, block_length=7, **shared),
        SamplingParams(temperature=0.0, steps=8, cfg_scale=0.6, **shared),
        SamplingParams(temperature=0.9, steps=9, seed=3, top_p=0.9, top_k=20, **shared),
        SamplingParams(temperature=0.0, unmask="factor", block_length=9, **shared),
        SamplingParams(temperature=0.0, steps=9, schedule="dream", confidence="margin", **shared),
    ]
    prompts = [helpers.random_prompt(i, 3 + 5 * i) for i in range(len(params))]
    outputs = llm.generate(prompts, params, sparse, use_tqdm=False)
    for prompt, one, output in zip(prompts, params, outputs, strict=True):
        assert output["token_ids"] == decode(oracle, prompt, one, sparse, ties="position").ids, one


def test_batches_do_not_matter(golden_engines: dict[str, LLM]) -> None:
    llm = golden_engines["llada-kv2of4"]
    jobs = [
        (
            helpers.random_prompt(i, 4 + 9 * i % 40),
            SamplingParams(
                temperature=1.0 if i % 2 else 0.0,
                seed=i,
                gen_length=12 + i,
                steps=8,
                block_length=9,
                cfg_scale=0.5 * (i % 3 == 0),
                cache=("none", "dual", "prefix")[i % 3],
                ignore_eos=True,
            ),
        )
        for i in range(24)
    ]
    alone = [helpers.answer(llm, *job) for job in jobs]
    order = random.Random(5).sample(range(24), 24)
    outputs = llm.generate([jobs[i][0] for i in order], [jobs[i][1] for i in order], use_tqdm=False)
    assert [o["token_ids"] for o in outputs] == [alone[i] for i in order]
    helpers.check_idle(llm)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(dtype: str) -> None:
    """Rounding may choose other tokens, but as many, and none of them the mask."""
    llm = LLM(str(helpers.GOLDEN / "llada-kv2of4"), device="cuda", dtype=dtype, kv_pages=400)
    for ids, case in zip(
        helpers.run_cases(llm, helpers.golden("llada-kv2of4")),
        helpers.golden("llada-kv2of4"),
        strict=True,
    ):
        assert len(ids) == case.params.gen_length
        assert llm.spec.mask_id not in ids
