"""The oracles against upstream's own outputs: every golden case, token for token."""

import ast
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracles import dream, fast_dllm, llada, models, rules, sparse_dllm
from tests.oracles.models import OracleModel
from tests.oracles.sampling import Step, gumbel
from tests.oracles.sparse_dllm import Eviction

GOLDEN = Path(__file__).parent / "golden"
MODELS = ("llada-kv4of4", "llada-kv2of4", "dream-kv2of4")
GENERATE: dict[str, Callable[..., Tensor]] = {
    "llada": llada.generate,
    "dream": dream.generate,
    "fast-dllm": fast_dllm.generate,
    "sparse-dllm": sparse_dllm.generate,
}
# Constant over the goldens and not a parameter of that kind's oracle, or needed beside its own.
DROPPED = {
    "llada": set(),
    "dream": {"temperature"},
    "fast-dllm": {"remasking"},
    "sparse-dllm": {"remasking"},
}
ADDED: dict[str, dict[str, Any]] = {"sparse-dllm": {"cache_block_len": 32}}


@cache
def model(name: str) -> OracleModel:
    return models.load(GOLDEN / name)


@cache
def cases(name: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((GOLDEN / name / "cases.json").read_text())["cases"]
    return loaded


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    """The golden's parameters as its oracle's keywords."""
    kind = case["kind"]
    kept = {key: v for key, v in case["params"].items() if key not in DROPPED[kind]}
    return kept | ADDED.get(kind, {})


def generation_cases() -> list[Any]:
    return [
        pytest.param(name, index, id=f"{name}-{index}-{case['kind']}")
        for name in MODELS
        for index, case in enumerate(cases(name))
        if case["kind"] != "forward"
    ]


def prompts(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 317, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
def test_forward(name: str) -> None:
    (case,) = (c for c in cases(name) if c["kind"] == "forward")
    z = model(name)(torch.tensor([case["tokens"]]))[0]
    expected = torch.tensor(case["logits"])  # [rows, 24]
    assert (z[case["logits_rows"], :24] - expected).abs().max() < 1e-4
    assert z.argmax(dim=-1).tolist() == case["argmax"]


@pytest.mark.parametrize(("name", "index"), generation_cases())
def test_generation(name: str, index: int) -> None:
    case = cases(name)[index]
    trace: list[Step] = []
    prompt = torch.tensor([case["prompt"]])
    out = GENERATE[case["kind"]](model(name), prompt, trace=trace, **arguments(case))
    assert out.tolist() == [case["output"]]
    revealed = sum(int(step.selected.sum()) for step in trace)
    assert revealed == len(case["output"])  # no golden ever writes the mask id


def test_head_selection() -> None:
    for case in json.loads((GOLDEN / "head_select.json").read_text())["cases"]:
        how = Eviction(case["retention_ratio"], case["pool_kernel"], head_select=True)
        chosen = sparse_dllm.select(torch.tensor(case["q"]), torch.tensor(case["k"]), how)
        assert chosen == case["selected_per_kv_head"]


def test_ties_by_position_differ_from_topk_only_inside_the_cut() -> None:
    scores = sparse_dllm.max_pool(torch.randn(64, generator=torch.manual_seed(1)).tolist(), 3)
    by_position = sparse_dllm.greatest(scores, 20, "position")
    by_topk = sparse_dllm.greatest(scores, 20, "topk")
    assert sorted(scores[i] for i in by_position) == sorted(scores[i] for i in by_topk)
    cut = min(scores[i] for i in by_position)
    equal = [i for i, score in enumerate(scores) if score == cut]
    assert [i for i in by_position if scores[i] == cut] == equal[: len(set(equal) & set(by_topk))]


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
def test_max_pool_is_upstreams(kernel: int) -> None:
    scores = torch.randn(1, 17, generator=torch.manual_seed(kernel))
    expected = torch.nn.functional.max_pool1d(scores, kernel, 1, kernel // 2)[0, :17]
    assert sparse_dllm.max_pool(scores[0].tolist(), kernel) == expected.tolist()


@pytest.mark.parametrize("name", MODELS)
def test_cached_forward_equals_the_whole(name: str) -> None:
    tokens = prompts(2, 24)
    whole = model(name).forward(tokens)
    past = [(k[:, :, :10], v[:, :, :10]) for k, v in whole.kv]
    tail = model(name).forward(tokens[:, 10:], torch.arange(10, 24), past)
    torch.testing.assert_close(tail.logits, whole.logits[:, 10:], atol=1e-4, rtol=0)
    stale = [(k.clone(), v.clone()) for k, v in whole.kv]
    for k, v in stale:
        k[:, :, 8:16], v[:, :, 8:16] = 7.0, 7.0
    middle = model(name).forward(tokens[:, 8:16], torch.arange(8, 16), stale, overwrite_at=8)
    torch.testing.assert_close(middle.logits, whole.logits[:, 8:16], atol=1e-4, rtol=0)
    assert bool((stale[0][0][:, :, 8:16] == 7.0).all())  # the caller's cache is left alone


@pytest.mark.parametrize("name", ["llada-kv2of4", "dream-kv2of4"])
def test_tied_and_wide_embeddings(name: str) -> None:
    config = json.loads((GOLDEN / name / "config.json").read_text())
    weights = dict(model(name).weights)
    names = model(name).names
    embed = names["embed"] + ".weight"
    weights[embed] = torch.cat([weights[embed], torch.zeros(8, weights[embed].shape[1])])
    del weights[names["head"] + ".weight"]
    config |= {"weight_tying": True, "tie_word_embeddings": True, "embedding_size": 328}
    z = OracleModel(config, weights)(prompts(1, 12))
    assert z.shape == (1, 12, 328)
    assert bool((z[..., 320:] == 0).all())


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_llada_batch_equals_single_rows(remasking: str, temperature: float) -> None:
    def noise(row: int, position: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed((ids[row] * 1000 + position) * 1000 + step)
        return torch.rand(320, dtype=torch.float64, generator=generator)

    def scalar(row: int, position: int, step: int) -> float:
        return float(noise(row, position, step)[0])

    kwargs: dict[str, Any] = {"steps": 12, "gen_length": 16, "block_length": 8, "cfg_scale": 0.5}
    kwargs |= {"temperature": temperature, "uniform": noise, "remasking": remasking}
    kwargs["confidence_noise"] = scalar if remasking == "random" else None
    rows = prompts(3, 9)
    ids = [0, 1, 2]
    together = llada.generate(model("llada-kv2of4"), rows, **kwargs)
    for index in range(3):
        ids = [index]
        alone = llada.generate(model("llada-kv2of4"), rows[index : index + 1], **kwargs)
        assert alone[0].tolist() == together[index].tolist()


def test_gumbel_equals_its_log_form() -> None:
    generator = torch.manual_seed(3)
    z = torch.randn(320, generator=generator)
    u = torch.rand(320, dtype=torch.float64, generator=generator)
    for temperature in (0.3, 1.0, 1.7):
        log_form = z.double() - temperature * (-u.log()).log()
        assert int(gumbel(z, temperature, u).argmax()) == int(log_form.argmax())


@pytest.mark.parametrize("uncached", ["none", "prefix", "dual"])
def test_fast_dllm_factor_runs_to_the_end(uncached: str) -> None:
    out = fast_dllm.generate(
        model("llada-kv4of4"),
        prompts(2, 9),
        steps=32,
        gen_length=32,
        block_length=16,
        cache=uncached,
        factor=1.0,
    )
    assert out.shape == (2, 32)
    assert not bool((out == model("llada-kv4of4").mask_id).any())


def test_sparse_late_delay_is_plain_llada() -> None:
    kwargs: dict[str, Any] = {"steps": 16, "gen_length": 32, "block_length": 16}
    rows = prompts(2, 11)
    plain = llada.generate(model("llada-kv2of4"), rows, **kwargs)
    for head_select in (False, True):
        sparse = sparse_dllm.generate(
            model("llada-kv2of4"), rows, delay_step=7, head_select=head_select, **kwargs
        )
        assert sparse.tolist() == plain.tolist()


def test_sparse_without_loss_at_step_zero_is_dual() -> None:
    kwargs: dict[str, Any] = {"steps": 32, "gen_length": 32, "block_length": 16}
    rows = prompts(2, 11)
    dual = fast_dllm.generate(model("llada-kv2of4"), rows, cache="dual", **kwargs)
    for head_select in (False, True):
        sparse = sparse_dllm.generate(
            model("llada-kv2of4"),
            rows,
            delay_step=0,
            retention_ratio=1.0,
            head_select=head_select,
            **kwargs,
        )
        assert sparse.tolist() == dual.tolist()


def test_dream_filters() -> None:
    z = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    lowest = torch.finfo(z.dtype).min
    assert (dream.filtered(z, 0.6, None) > lowest).tolist() == [[True, True, False, False]]
    assert (dream.filtered(z, 0.1, None) > lowest).tolist() == [[True, False, False, False]]
    assert (dream.filtered(z, None, 3) > lowest).tolist() == [[True, True, True, False]]
    assert (dream.filtered(z, 0.9, 2) > lowest).tolist() == [[True, True, False, False]]


def test_split() -> None:
    assert rules.split(32, 8) == [4] * 8
    assert rules.split(30, 8) == [4, 4, 4, 4, 4, 4, 3, 3]
    assert rules.split(5, 8) == [1, 1, 1, 1, 1, 0, 0, 0]


def test_dream_counts() -> None:
    assert rules.dream_counts(32, 8) == [3, 4, 4, 4, 4, 4, 4, 5]
    assert rules.dream_counts(16, 16) == [0, *[1] * 14, 2]
    assert rules.dream_counts(64, 32) == [1, *[2] * 30, 3]


@pytest.mark.parametrize(
    ("confidence", "count"),
    [
        ([0.99, 0.98, 0.9, 0.5], 4),
        ([0.99, 0.9, 0.2], 3),
        ([0.3], 1),
        ([0.3, 0.2], 2),
        ([0.99] * 6, 6),
        ([0.4, 0.9, 0.1, 0.2], 1),
        ([0.1, 0.4, 0.2], 1),
        ([], 0),
    ],
)
def test_factor(confidence: list[float], count: int) -> None:
    best = sorted(sorted(range(len(confidence)), key=lambda i: -confidence[i])[:count])
    assert rules.factor(confidence, [True] * len(confidence), 1.0) == best


@pytest.mark.parametrize(
    ("entropy", "chosen"),
    [
        ([0.01, 0.05, 0.2, 1.0], [0, 1, 2]),
        ([1.0, 0.2, 0.05, 0.01], [1, 2, 3]),
        ([0.4, 0.5], [0]),
        ([0.0, 0.0, 0.1, 0.1], [0, 1, 2, 3]),
    ],
)
def test_entropy_bound(entropy: list[float], chosen: list[int]) -> None:
    assert rules.entropy_bound(entropy, [True] * len(entropy), 0.15) == chosen


def test_rules_see_masked_slots_only_and_break_ties_by_position() -> None:
    scores = [0.9, 0.5, 0.9, 0.9, 0.2]
    masked = [False, True, True, True, True]
    assert rules.steps(scores, masked, 1) == [2]
    assert rules.steps(scores, masked, 9) == [1, 2, 3, 4]
    assert rules.steps(scores, masked, 0) == []
    assert rules.threshold(scores, masked, 0.5) == [1, 2, 3]
    assert rules.threshold(scores, masked, 0.95) == [2]
    assert rules.factor(scores, masked, 1.0) == [2, 3]
    assert rules.entropy_bound([0.0, 0.3, 0.3, 0.1, 0.3], masked, 0.4) == [1, 2, 3]
    for rule in (rules.threshold, rules.factor, rules.entropy_bound):
        assert rule(scores, [False] * 5, 0.5) == []


def test_oracles_import_nothing_of_the_package() -> None:
    allowed = sys.stdlib_module_names | {"torch", "safetensors"}
    for path in (Path(__file__).parent / "oracles").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in allowed for alias in node.names), path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] in allowed, path
