"""The whole engine on Triton kernels, under the interpreter (a GPU runs tests/gpu)."""

import random
from pathlib import Path
from typing import Any

import pytest

from dllmserve import LLM, SamplingParams, SparseConfig
from tests import helpers
from tests.conftest import Engines
from tests.infilling import random_row, template
from tests.rehearsal import rehearsing

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.fixture
def interpreter() -> None:
    helpers.need_interpreter()


def variants() -> list[tuple[dict[str, Any], SparseConfig | None]]:
    return [
        ({"cache": "dual", "steps": 4}, None),
        ({"steps": 4}, SparseConfig(default_block_len=4)),
        ({"cache": "prefix", "unmask": "threshold", "threshold": 0.2, "cfg_scale": 0.7}, None),
        ({"steps": 3, "temperature": 0.9, "seed": 5}, SparseConfig(head_select=False)),
        ({"steps": 3, "top_p": 0.8, "temperature": 1.0, "seed": 6}, None),
    ]


@pytest.mark.parametrize("name", ["llada-odd", "dream"])
def test_the_same_tokens(engines: Engines, checkpoints: dict[str, Path], name: str) -> None:
    """Mixed in one batch; one reference engine runs each request alone."""
    options = {"page_size": 8, "kv_pages": 40, "max_num_seqs": 8, "max_model_len": 64}
    triton = LLM(
        str(checkpoints[name]), device="cpu", attention="triton", kernels="triton", **options
    )
    torch = engines(checkpoints[name])
    jobs = []
    for number, (given, sparse) in enumerate(variants()):
        base = {"temperature": 0.0, "gen_length": 8, "block_length": 4, "ignore_eos": True}
        jobs.append(
            (helpers.random_prompt(number, 5 + number), SamplingParams(**base | given), sparse)
        )
    prompts, params, sparse_configs = (list(column) for column in zip(*jobs, strict=True))
    outputs = triton.generate(prompts, params, sparse_configs, use_tqdm=False)
    assert [o["token_ids"] for o in outputs] == [helpers.answer(torch, *job) for job in jobs]
    helpers.check_idle(triton)


def test_the_same_in_holes(engines: Engines, checkpoints: dict[str, Path]) -> None:
    """Ends count in the last hole alone, if it may end early."""
    options = {"page_size": 8, "kv_pages": 40, "max_num_seqs": 8, "max_model_len": 64}
    folder, dice = checkpoints["llada-eos"], random.Random(2)
    triton = LLM(str(folder), device="cpu", attention="triton", kernels="triton", **options)
    templates, params = [], []
    padded = {"early_end": True, "end_padding": True, "cfg_scale": 0.5}
    for number, extra in enumerate(
        ({}, {"early_end": True}, padded, {"cfg_scale": 0.5}, {"cache": "dual"})
    ):
        fill = ("exact", "up_to")[number % 2]
        templates.append(template(*random_row(dice, 9), fill=fill))
        how = {"temperature": 0.0, "block_length": 7, "steps_per_block": 2, "seed": number}
        params.append(SamplingParams(**how, **extra))
    expected = engines(folder).infill(templates, params, use_tqdm=False)
    assert triton.infill(templates, params, use_tqdm=False) == expected


# padding tokens hold whatever lay in the memory, which numpy complains about
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_padded_steps_in_flight(
    engines: Engines, checkpoints: dict[str, Path], kernels: str
) -> None:
    """What graphs replay: padded shapes, rehearsed on padding alone, four steps in flight."""
    llm, pool = rehearsing(
        checkpoints["llada"],
        depth=4,
        kernels=kernels,
        max_model_len=64,
        max_num_seqs=6,
        page_size=3,
        kv_pages=80,
        max_logit_rows=3,
    )
    torch = engines(checkpoints["llada"])
    base = {"temperature": 0.0, "gen_length": 8, "block_length": 4, "cache": "dual"}
    params = [
        SamplingParams(steps=4, ignore_eos=True, **base),
        SamplingParams(**{**base, "gen_length": 1}, steps=1),
        SamplingParams(unmask="threshold", threshold=0.2, cfg_scale=0.5, **base),
        SamplingParams(**{**base, "temperature": 0.8, "block_length": 9}, steps=4, seed=3),
    ]
    prompts = [helpers.random_prompt(n, 1 + 2 * n) for n in range(len(params))]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    expected = [helpers.answer(torch, p, one) for p, one in zip(prompts, params, strict=True)]
    assert [o["token_ids"] for o in outputs] == expected
    assert pool.replays > 0
    helpers.check_idle(llm)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_padded_steps_that_keep_something(engines: Engines, checkpoints: dict[str, Path]) -> None:
    """Queries picked on the device, shadows, distributions and credits, in padded shapes."""
    llm, pool = rehearsing(
        checkpoints["dream"],
        kernels="torch",
        max_model_len=32,
        max_num_seqs=6,
        page_size=3,
        kv_pages=80,
    )
    torch = engines(checkpoints["dream"])
    base = {"temperature": 0.0, "gen_length": 8, "block_length": 4, "ignore_eos": True}
    params = [
        SamplingParams(unmask="klass", threshold=0.2, kl_threshold=2.0, cache="delayed", **base),
        SamplingParams(unmask="credit", threshold=0.3, cache="drift", refresh_every=2, **base),
        SamplingParams(unmask="wino", threshold=0.2, threshold_back=0.5, cache="dual", **base),
        SamplingParams(steps=8, cache="rolling", cfg_scale=0.5, **base),
        SamplingParams(steps=4, cache="delayed", cfg_scale=0.5, **base),
    ]
    prompts = [helpers.random_prompt(n, 1 + 2 * n) for n in range(len(params))]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    expected = [helpers.answer(torch, p, one) for p, one in zip(prompts, params, strict=True)]
    assert [o["token_ids"] for o in outputs] == expected
    assert pool.replays > 0
    helpers.check_idle(llm)
