"""Upstream's own outputs, token for token, through the whole engine."""

import random

import pytest
import torch

from dllmserve import Hole, SamplingParams
from tests import helpers
from tests.conftest import Engines
from tests.oracles import dinfer, experts

CASES = [
    pytest.param(name, index, id=f"{name}-{index}-{case.kind}")
    for name in (*helpers.MODELS, *helpers.EXPERTS)
    for index, case in enumerate(helpers.golden(name))
]
#: engine options that must change nothing
OPTIONS = {
    "defaults": {},
    "two-logit-rows": {"max_logit_rows": 2},
    "seven-logit-rows": {"max_logit_rows": 7},
    "small-steps": {"max_num_batched_tokens": 180},
    "page-of-one": {"page_size": 1},
    "page-of-seven": {"page_size": 7, "max_num_batched_tokens": 700},
    "two-rows": {"max_num_seqs": 2},
    "few-pages": {"kv_pages": 6, "max_num_seqs": 16},
    "short-model": {"max_model_len": 160, "max_logit_rows": 33},
}


@pytest.mark.parametrize(("name", "index"), CASES)
def test_alone(engines: Engines, name: str, index: int) -> None:
    case = helpers.golden(name)[index]
    llm = engines(helpers.GOLDEN / name)
    output = llm.generate([case.prompt], case.params, case.sparse, use_tqdm=False)[0]
    assert output["token_ids"] == case.output
    assert output["text"] == ""
    whole = len(case.output) == case.params.gen_length
    assert output["finish_reason"] == ("length" if whole else "stop")
    assert output["usage"]["prompt_tokens"] == len(case.prompt)
    assert output["usage"]["completion_tokens"] == len(case.output)


@pytest.mark.parametrize("name", [*helpers.MODELS, "llada-moe-e8"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_mixed(engines: Engines, name: str, options: dict[str, int]) -> None:
    order = random.Random(str(options))
    cases = helpers.golden(name)
    cases = order.sample(cases, len(cases) // (3 if options else 1))
    llm = engines(helpers.GOLDEN / name, **options)
    assert helpers.run_cases(llm, cases) == [c.output for c in cases]


@pytest.mark.parametrize("name", helpers.MODELS)
def test_what_was_in_the_pages_before_does_not_matter(engines: Engines, name: str) -> None:
    llm = engines(helpers.GOLDEN / name)
    kv = llm._engine._runner.kv
    for side in (*kv.k, *kv.v):
        side.fill_(float("nan"))
    cases = helpers.golden(name)
    assert helpers.run_cases(llm, cases) == [c.output for c in cases]


def test_dinfers_ends(engines: Engines) -> None:
    """dInfer takes end ids out of its answer, which goes on behind the first of them."""
    llm = engines(helpers.GOLDEN / "llada-moe-e8")
    found = [c for c in helpers.golden_raw("llada-moe-e8") if c["kind"] == "dinfer-threshold"]
    (case,) = (c for c in found if c["params"]["early_stop"])
    params = helpers.dinfer_case(case).params
    [output] = llm.generate([case["prompt_ids"]], params, use_tqdm=False)
    *ids, end = output["token_ids"]
    assert output["finish_reason"] == "stop" and end == case["params"]["eos_id"]
    assert len(ids) > 8 and ids == case["output"][: len(ids)]
    assert output["usage"]["forward_passes"] <= case["forwards"]


def test_blocks_from_position_0(engines: Engines) -> None:
    """dInfer's start_block_align: the first block holds the end of the prompt."""
    found = [c for c in helpers.golden_raw("llada-moe-e8") if "params" in c]
    (case,) = (c for c in found if c["params"].get("start_block_align"))
    params = helpers.dinfer_case(case).params
    hole = Hole(len(case["output"]))
    llm = engines(helpers.GOLDEN / "llada-moe-e8")
    [output] = llm.infill([[case["prompt_ids"], hole]], params, use_tqdm=False)
    assert output["token_ids"] == case["prompt_ids"] + case["output"]


def test_end_padding(engines: Engines) -> None:
    """As the oracle of dInfer's early_stop, with an end id that is written often."""
    folder, end = helpers.GOLDEN / "llada-moe-e8", 87
    llm, model = engines(folder, eos_ids=(end,)), experts.load(folder)
    prompts, params, expected, shorter = [], [], [], 0
    for seed in range(12):
        prompt = helpers.random_prompt(seed, 3 + seed)
        options = {"gen_length": 24, "block_length": 12, "threshold": 0.2 + 0.05 * seed}
        row = dinfer.Row(lambda ids: model(torch.tensor([ids]))[0], 150, list(prompt))
        ids = dinfer.fast_dllm(row, steps=24, early_stop=True, eos_id=end, **options)
        expected.append(ids[: ids.index(end) + 1] if end in ids else ids)
        prompts.append(prompt)
        padded = {"early_end": True, "end_padding": True, "unmask": "threshold", **options}
        params.append(SamplingParams(temperature=0.0, **padded))
        shorter += 1 < len(expected[-1]) < 24
    assert shorter > 3
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == expected
