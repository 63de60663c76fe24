"""The number of ranks changes no token, and where the order of sums is ours no bit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dllmserve import LLM, SamplingParams, SparseConfig
from tests import helpers
from tests.checkpoints import Shape, write_random
from tests.conftest import Engines
from tests.engine.test_fewer_forwards import cases, sampling
from tests.engine.test_invariance import jobs, run
from tests.helpers import random_prompt
from tests.infilling import template, truths
from tests.models.test_causal_forward import load
from tests.ordered import use_ordered_products
from tests.parallel.threads import on_all, thread_groups, threaded_llm

#: sizes that every product cuts at a multiple of 16, as real ones do
ALIGNED = {
    "llada": Shape(family="llada", kv_heads=4, head_dim=16, mlp=128, vocab=512, mask_id=511),
    "llada-tied": Shape(
        family="llada", kv_heads=4, head_dim=16, mlp=64, vocab=300, mask_id=0, tied=True, seed=1
    ),
    "llada-rows": Shape(
        family="llada", heads=8, head_dim=16, mlp=96, vocab=200, mask_id=199, extra_rows=30, seed=2
    ),
    "dream": Shape(
        family="dream", heads=8, kv_heads=4, head_dim=16, mlp=64, vocab=1000, mask_id=999, seed=5
    ),
}
SPARSE: list[SparseConfig | None] = [
    None,
    SparseConfig(default_block_len=4),
    SparseConfig(default_block_len=4, head_select=False),
    SparseConfig(default_block_len=4, head_select=False, score="attention", min_keep=3),
]
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "margin": {"temperature": 0.0, "confidence": "margin"},
    "entropy": {"temperature": 0.9, "confidence": "neg_entropy"},
    "drawn": {"temperature": 1.1},
    "filtered": {"temperature": 0.9, "top_p": 0.8, "top_k": 40},
    "dream": {"temperature": 0.7, "schedule": "dream", "top_p": 0.95},
    "guided": {"temperature": 0.0, "cfg_scale": 0.7},
    "biased": {"temperature": 0.5, "logit_bias": {5: 3.0, 60: -100.0, 190: 2.5}},
    "klass": {"temperature": 0.0, "unmask": "klass", "kl_threshold": 0.5, "threshold": 0.1},
    "credit": {"temperature": 0.0, "unmask": "credit", "threshold": 0.1},
    "wino": {"temperature": 0.0, "unmask": "wino", "threshold": 0.1, "threshold_back": 0.1},
    "wino-filtered": {"unmask": "wino", "threshold": 0.1, "threshold_back": 0.05, "top_p": 0.9},
    "drift": {"temperature": 0.0, "cache": "drift"},
}


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("aligned")
    return {name: write_random(base / name, shape) for name, shape in ALIGNED.items()}


def pictures(llm: LLM, params: SamplingParams, sparse: SparseConfig | None) -> list[Any]:
    """Every confidence of every step, and the answer."""
    steps = list(llm.stream(random_prompt(3, 11), params, sparse))
    output = steps[-1].output
    assert output is not None
    return [*((s.token_ids, s.confidence) for s in steps), output.token_ids]


@pytest.mark.parametrize("name", ALIGNED)
def test_the_same_bits(
    engines: Engines,
    aligned: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """With products of a fixed order, as on a GPU; see tests/gpu for the kernels' own."""
    size = ALIGNED[name].kv_heads  # as many ranks as can share them
    folder = aligned[name]
    one = engines(folder)
    several, runner, _ = threaded_llm(monkeypatch, str(folder), size)
    use_ordered_products(monkeypatch)
    for kind, given in PARAMS.items():
        params = SamplingParams(gen_length=16, steps=8, block_length=8, seed=7, **given)
        for sparse in SPARSE if kind in ("greedy", "drawn") else [None]:
            assert pictures(several, params, sparse) == pictures(one, params, sparse), (
                kind,
                sparse,
            )
    tables = [one.table for one in runner.runners]
    for other in tables[1:]:  # every rank has come to the same answers by itself
        assert torch.equal(tables[0].tokens[:, :-1], other.tokens[:, :-1])
        assert torch.equal(tables[0].masked[:, :-1], other.masked[:, :-1])


#: relative and absolute; float32 products of some 100 terms, in another order
NEAR = {"rel": 1e-4, "abs": 1e-6}


@pytest.mark.parametrize("name", ALIGNED)
def test_the_librarys_products(
    engines: Engines, aligned: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On a CPU a product's last bits depend on its size: the same tokens, and near numbers."""
    one = engines(aligned[name])
    several, _, _ = threaded_llm(monkeypatch, str(aligned[name]), 2)
    for kind, given in PARAMS.items():
        params = SamplingParams(gen_length=16, steps=8, block_length=8, seed=7, **given)
        *found, ids = pictures(several, params, None)
        *expected, wanted = pictures(one, params, None)
        assert ids == wanted, kind
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected], kind
        for (_, numbers), (_, other) in zip(found, expected, strict=True):
            assert numbers == [n if n is None else pytest.approx(n, **NEAR) for n in other], kind


@pytest.mark.parametrize("name", [*helpers.MODELS, *helpers.EXPERTS])
@pytest.mark.parametrize("logit_rows", [1024, 7])
def test_golden_mixed(monkeypatch: pytest.MonkeyPatch, name: str, logit_rows: int) -> None:
    size = 4 if name in ("llada-kv4of4", "llada-moe-e8") and logit_rows > 7 else 2
    llm, _, _ = threaded_llm(
        monkeypatch, str(helpers.GOLDEN / name), size, max_logit_rows=logit_rows
    )
    golden = helpers.golden(name)
    assert helpers.run_cases(llm, golden) == [case.output for case in golden]


@pytest.mark.parametrize("name", ["llada-kv2of4", "llada-kv4of4"])
def test_upstreams_infilling(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    llm, _, _ = threaded_llm(monkeypatch, str(helpers.GOLDEN / name), 2, max_logit_rows=16)
    cases = [case for case in truths(name) if case["same_as_llada_split"]]
    params = [
        SamplingParams(
            temperature=0.0,
            block_length=case["params"]["block_size"],
            steps_per_block=case["steps_per_block"],
            cfg_scale=case["params"]["cfg_scale"],
        )
        for case in cases
    ]
    templates = [template(case["tokens"], case["holes"]) for case in cases]
    found = llm.infill(templates, params, use_tqdm=False)
    assert [one["token_ids"] for one in found] == [case["expected"] for case in cases]


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_every_rule_and_policy(
    engines: Engines,
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    one = engines(checkpoints[name])
    two, _, _ = threaded_llm(monkeypatch, str(checkpoints[name]), 2, max_num_batched_tokens=300)
    assert run(two, jobs()) == run(one, jobs())
    every = cases(early=False)
    prompts = [random_prompt(place, 1 + 5 * place % 17) for place in range(len(every))]
    params = [sampling(options) for _, _, options in every]
    assert two.generate(prompts, params, use_tqdm=False) == one.generate(
        prompts, params, use_tqdm=False
    )


@pytest.mark.parametrize("divided", [False, True])
def test_experts_give_the_same_bits(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, divided: bool
) -> None:
    """Whether ranks cut each expert or divide them; with a shared expert and a dense layer."""
    folder = helpers.GOLDEN / "llada-moe-variant"
    one = engines(folder)
    two, _, _ = threaded_llm(monkeypatch, str(folder), 2, expert_parallel=divided)
    use_ordered_products(monkeypatch)
    for given in (
        {"temperature": 0.0},
        {"temperature": 1.1},
        {"temperature": 0.0, "cache": "dual"},
    ):
        params = SamplingParams(gen_length=16, steps=8, block_length=8, seed=7, **given)
        assert pictures(two, params, None) == pictures(one, params, None), given


@pytest.mark.parametrize("divided", [False, True])
def test_experts_in_half_precision(monkeypatch: pytest.MonkeyPatch, divided: bool) -> None:
    """Sums over ranks of half precision: near what one rank computes."""
    folder = helpers.GOLDEN / "llada2-g4e8"
    layers = [load(folder, dtype=torch.bfloat16).blocks[1].mlp]
    x = torch.randn(9, 64, generator=torch.manual_seed(0)).bfloat16()
    whole = layers[0](x)
    groups = thread_groups(2)
    ranks = [
        load(folder, group, dtype=torch.bfloat16, exact=False, expert_parallel=divided).blocks[1]
        for group in groups
    ]
    found = on_all([lambda rank=rank: rank.mlp(x) for rank in ranks])  # type: ignore[misc]
    for got in found:
        torch.testing.assert_close(got, whole, atol=0.05, rtol=0.05)
    sums = [shape for kind, shape, _ in groups[0].exchanged if kind == "reduce"]
    assert sums == [(9, 64)] * (2 if divided else 1)  # a shared expert beside divided ones


def test_half_precision_sums_over_ranks(
    aligned: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two exchanges of [tokens, hidden size] a layer, and one of the embedding."""
    shape = ALIGNED["llada"]
    llm, _, groups = threaded_llm(monkeypatch, str(aligned["llada"]), 2, dtype="bfloat16")
    for group in groups:
        group.exchanged.clear()
    params = SamplingParams(temperature=0.0, gen_length=8, steps=1)
    llm.generate([random_prompt(1, 6)], params, use_tqdm=False)
    sums = [shape_ for kind, shape_, _ in groups[0].exchanged if kind == "reduce"]
    # after the last layer's attention only the rows that the LM head reads are left
    assert sums == [(14, shape.width)] * (2 * shape.layers - 1) + [(8, shape.width)] * 2
    assert groups[0].exchanged == groups[1].exchanged


def test_only_statistics_of_logits_cross_ranks(
    aligned: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is exchanged for a row of logits does not grow with the vocabulary."""
    llm, _, groups = threaded_llm(monkeypatch, str(aligned["dream"]), 2, dtype="bfloat16")
    groups[0].exchanged.clear()
    params = [
        SamplingParams(gen_length=8, steps=1, temperature=t, confidence="margin", seed=1)
        for t in (0.0, 1.0)
    ]
    llm.generate([random_prompt(1, 6)] * 2, params, use_tqdm=False)
    gathered = [shape for kind, shape, _ in groups[0].exchanged if kind == "gather"]
    assert gathered
    vocabulary = ALIGNED["dream"].vocab
    assert all(torch.Size(shape).numel() < 8 * vocabulary // 4 for shape in gathered), gathered


@pytest.fixture(scope="module", params=["llada-kv2of4", "dream-kv2of4"])
def processes(request: pytest.FixtureRequest) -> Iterator[tuple[str, LLM]]:
    """Two ranks as real processes, which exchange through gloo."""
    with LLM(str(helpers.GOLDEN / request.param), device="cpu", tensor_parallel_size=2) as llm:
        yield request.param, llm


def test_divided_experts_on_two_processes() -> None:
    folder = str(helpers.GOLDEN / "llada-moe-e8")
    with LLM(folder, device="cpu", tensor_parallel_size=2, expert_parallel=True) as llm:
        golden = helpers.golden("llada-moe-e8")
        assert helpers.run_cases(llm, golden) == [case.output for case in golden]


def test_golden_alone_on_two_processes(processes: tuple[str, LLM]) -> None:
    name, llm = processes
    for case in helpers.golden(name)[::9]:  # all of them follow, mixed
        assert helpers.answer(llm, case.prompt, case.params, case.sparse) == case.output, case


def test_golden_mixed_on_two_processes(processes: tuple[str, LLM]) -> None:
    name, llm = processes
    golden = helpers.golden(name)
    assert helpers.run_cases(llm, golden) == [case.output for case in golden]
