"""Oracles of models with experts, and of loops over blocks, against upstream's own outputs."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.oracles import block_loops, dinfer, experts, fast_dllm, llada
from tests.oracles.block_loops import Answer, Canvas
from tests.oracles.block_rules import Settings
from tests.oracles.experts import ExpertModel, Router

GOLDEN = Path(__file__).parent / "golden"
LLADA2 = ("llada2-g4e8", "llada21-g4e12", "llada2-maskprop")
LLADA_MOE = ("llada-moe-e8", "llada-moe-variant")
QWEN = ("sdarmoe-kv2of4", "qwen3moe-kv2of4")
Golden = dict[str, Any]


@cache
def model(name: str) -> ExpertModel:
    return experts.load(GOLDEN / name)


@cache
def cases(name: str) -> list[Golden]:
    loaded: list[Golden] = json.loads((GOLDEN / name / "cases.json").read_text())["cases"]
    return loaded


def every(*kinds: str, names: tuple[str, ...] = (*LLADA2, *LLADA_MOE, *QWEN)) -> list[Any]:
    """Golden cases of some kinds as arguments of a test."""
    return [
        pytest.param(name, case, id=f"{name}-{index}-{case['kind']}")
        for name in names
        for index, case in enumerate(cases(name))
        if case["kind"] in kinds
    ]


@pytest.mark.parametrize(("name", "case"), every("forward", "sdar-forward", "ar-forward"))
def test_forward(name: str, case: Golden) -> None:
    if name in LLADA_MOE:
        z = model(name)(torch.tensor([case["tokens"]]))[0]
    else:
        z = model(name).block_causal(case["tokens"], case.get("block_length", 1))
    rows = z[case.get("logits_rows") or case["rows"], :24]
    assert float((rows - torch.tensor(case["logits"])).abs().max()) < 1e-4
    assert z.argmax(dim=-1).tolist() == case["argmax"]


@pytest.mark.parametrize(("name", "case"), every("router"))
def test_router(name: str, case: Golden) -> None:
    x, layer = torch.tensor(case["input"]), case["layer"]
    ids, weights = model(name).routed(x, layer)
    by_id = ids.sort(dim=1)
    assert by_id.values.tolist() == case["topk_idx_sorted"]
    expected = torch.tensor(case["topk_weight"])
    torch.testing.assert_close(weights.gather(1, by_id.indices), expected, atol=1e-5, rtol=0)
    out = model(name).experts(x, layer)
    if name in LLADA2:  # whose block has the shared expert in it
        out = out + model(name).shared(x, layer)
    expected = torch.tensor(case["moe_output_first8"])
    torch.testing.assert_close(out[:, :8], expected, atol=1e-4, rtol=0)


#: upstream's names of a case's settings that say nothing here, or are given otherwise
DROPPED = ("temperature", "sampling_method", "block_length", "top_p", "top_k", "mask_id")
UNUSED_BY_21 = ("steps", "minimal_topk")
LOOPS: dict[str, Callable[..., Answer]] = {
    "llada2.0": block_loops.llada20,
    "llada2.1": block_loops.llada21,
    "diffusers-llada2": block_loops.diffusers_llada2,
    "sglang-low-confidence": block_loops.low_confidence,
    "sglang-joint-threshold": block_loops.joint_threshold,
}


def settings_of(name: str, case: Golden) -> tuple[int, Golden]:
    """Block length and arguments of a case's loop."""
    given = dict(case["params"])
    if case["kind"].startswith("sglang"):
        eos = -1 if given["ignore_eos"] else EOS[name]
        own = {"length": given["max_new_tokens"], "eos_id": eos}
        return given["block_size"], own | given["algorithm_config"]
    own = {key: v for key, v in given.items() if key not in DROPPED}
    if case["kind"] == "llada2.1":
        own = {key: v for key, v in own.items() if key not in UNUSED_BY_21}
    if case["kind"] == "diffusers-llada2":
        own["eos_id"] = own.pop("eos_token_id")
        own.pop("mask_token_id")
    return given["block_length"], own


EOS = {
    name: json.loads((GOLDEN / name / "config.json").read_text())["eos_token_id"]
    for name in (*LLADA2, *LLADA_MOE, *QWEN)
}


@cache
def run(name: str, index: int, sane: bool = False) -> Answer:
    """A case's loop."""
    case = cases(name)[index]
    block, own = settings_of(name, case)
    whole = model(name)

    def logits(ids: list[int]) -> torch.Tensor:
        return whole.block_causal(ids, block)

    row = Canvas(logits, whole.mask_id, block, case["prompt_ids"], sane)
    return LOOPS[case["kind"]](row, **own)


def numbers(*kinds: str) -> list[Any]:
    """The same with the case's place in its file."""
    return [
        pytest.param(name, index, id=f"{name}-{index}-{case['kind']}")
        for name in LLADA2
        for index, case in enumerate(cases(name))
        if case["kind"] in kinds
    ]


@pytest.mark.parametrize(("name", "index"), numbers(*LOOPS))
def test_block_loops(name: str, index: int) -> None:
    case, answer = cases(name)[index], run(name, index)
    assert answer.ids == case["output"]
    assert answer.forwards == case["forwards"]
    if "canvas_after_prompt" in case:
        size = len(case["canvas_after_prompt"])
        assert answer.canvas[:size] == case["canvas_after_prompt"]
    if "output_untrimmed" in case:
        assert answer.canvas[: len(case["output_untrimmed"])] == case["output_untrimmed"]
    if "trace" in case:
        width = len(case["trace"][0]) if case["trace"] else 0  # 2.0's trace has no edits
        assert [step[:width] for step in answer.trace] == case["trace"]


@pytest.mark.parametrize(("name", "index"), numbers(*LOOPS)[::2])
def test_sane_loops(name: str, index: int) -> None:
    """They never write the mask id, are cut, and are upstream's where upstream does the same."""
    answer, upstream, case = run(name, index, sane=True), run(name, index), cases(name)[index]
    given = case["params"]
    length = given.get("gen_length") or given["max_new_tokens"]
    eos = settings_of(name, case)[1]["eos_id"]
    assert model(name).mask_id not in answer.ids
    assert answer.ids[-1] == eos or len(answer.ids) == length
    assert eos not in answer.ids[:-1]
    quirk = name == "llada2-maskprop" or eos in case["prompt_ids"] or case["forwards"] == 0
    if not quirk:
        assert answer.ids == upstream.ids[:length]


@pytest.mark.parametrize(("name", "case"), every("sdar"))
def test_sdar(name: str, case: Golden) -> None:
    given, whole = case["settings"], model(name)
    stops = given.get("stopping_criteria_idx") or []
    row = Canvas(
        lambda ids: whole.block_causal(ids, given["block_length"]),
        whole.mask_id,
        given["block_length"],
        case["prompt_ids"],
    )
    answer = block_loops.sdar(
        row,
        gen_length=given["gen_length"],
        denoising_steps=given["denoising_steps"],
        remasking_strategy=given["remasking_strategy"],
        confidence_threshold=given["confidence_threshold"],
        stop_ids=stops,
    )
    assert answer.ids == case["expected_trimmed"]
    assert answer.forwards == case["forwards"]["denoise"]


@pytest.mark.parametrize(("name", "case"), every("ar-greedy"))
def test_greedy(name: str, case: Golden) -> None:
    given, whole = case["settings"], model(name)
    stops = given["eos_token_id"]
    ids = block_loops.greedy(
        lambda ids: whole.block_causal(ids, 1),
        case["prompt_ids"],
        given["max_new_tokens"],
        [stops] if isinstance(stops, int) else stops or [],
    )
    assert ids == case["expected_trimmed"]


def full(name: str) -> Callable[[list[int]], torch.Tensor]:
    """Logits [n, V] of a row under full attention."""
    return lambda ids: model(name)(torch.tensor([ids]))[0]


@pytest.mark.parametrize(("name", "case"), every("llada", "fast-dllm"))
def test_full_attention_loops(name: str, case: Golden) -> None:
    given = {key: v for key, v in case["params"].items() if key != "temperature"}
    loop: Callable[..., torch.Tensor] = llada.generate
    if case["kind"] == "fast-dllm":
        loop = fast_dllm.generate
    out = loop(model(name), torch.tensor([case["prompt_ids"]]), **given)
    assert out.tolist() == [case["output"]]


DINFER = ("dinfer-threshold", "dinfer-hierarchy", "dinfer-credit", "dinfer-fastdllm")


@pytest.mark.parametrize(("name", "case"), every(*DINFER))
def test_dinfer(name: str, case: Golden) -> None:
    given, mask = dict(case["params"]), model(name).mask_id
    row = dinfer.Row(full(name), mask, list(case["prompt_ids"]))
    if case["kind"] == "dinfer-fastdllm":
        ids = dinfer.fast_dllm(row, eos_id=EOS[name], **given)
    else:
        tau, float64 = given.pop("threshold"), given.pop("use_float64")
        low = given.pop("low_threshold", 0.4)
        rule = case["kind"].removeprefix("dinfer-")

        def decoder(size: int) -> dinfer.Decide:
            if rule == "threshold":
                return dinfer.threshold(tau, mask, float64)
            settings = Settings(rule, threshold=tau, low_threshold=low)
            return dinfer.remembering(settings, size, mask)

        ids = dinfer.block_wise(row, decoder, **given)
    assert ids == case["output"]
    assert row.forwards == case["forwards"]


# -- choices by hand


@pytest.mark.parametrize(
    ("router", "scores", "chosen"),
    [
        (Router(2), [0.1, 0.4, 0.2, 0.3], [1, 3]),
        (Router(3), [0.2, 0.4, 0.2, 0.2], [1, 0, 2]),  # equal ones: the lower first
        (Router(1, groups=2, top_groups=1), [0.9, 0.0, 0.5, 0.5], [2]),  # two of a group count
        (Router(2, groups=2, top_groups=1), [0.5, 0.5, 0.1, 0.9], [0, 1]),  # equal groups
        (Router(2, groups=2, top_groups=2), [0.9, 0.0, 0.5, 0.6], [0, 3]),
        (Router(3, groups=2, top_groups=1), [-0.5, -0.2, -0.3, -9.0, 0.1, -0.9], [1, 2, 0]),
    ],
)
def test_choice_of_experts(router: Router, scores: list[float], chosen: list[int]) -> None:
    assert experts.choose(scores, router) == chosen


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bias", ["choice", "weights"])
def test_weights_of_experts(score: str, bias: str) -> None:
    x = torch.eye(2)
    gate = torch.tensor([[1.0, 0.0], [0.5, 3.0], [0.0, 1.0]])  # logits of tokens: its columns
    biases = torch.tensor([0.0, -5.0, 5.0])
    router = Router(2, score, bias, scale=2.0)
    ids, weights = experts.route(x, gate, biases, router)
    assert ids.tolist() == [[2, 0], [2, 0]]  # expert 1 never, for all its score
    p = gate.T.softmax(dim=1) if score == "softmax" else gate.T.sigmoid()
    own = (p + biases if bias == "weights" else p)[:, [2, 0]]
    torch.testing.assert_close(weights, 2 * own)
    normal = experts.route(x, gate, biases, router._replace(normalize=True))[1]
    torch.testing.assert_close(normal.sum(dim=1), torch.full((2,), 2.0))


def test_pool_of_a_window() -> None:
    """Two tokens of a window, and one of the next, which is not full."""
    router = Router(2, capacity=2, window=2)
    scores = [[0.9, 0.1, 0.3, 0.3], [0.1, 0.2, 0.8, 0.8], [0.0, 0.1, 0.0, 0.0]]
    struck = experts.pooled(scores, router)
    assert [experts.choose(row, router) for row in struck] == [[0, 2], [2, 0], [1, 0]]
    assert experts.pooled(scores, router._replace(capacity=4)) == scores


def test_block_routing_of_whole_windows() -> None:
    """A capacity of all experts is no bound; a small one keeps a window to so many of them."""
    plain = experts.load(GOLDEN / "llada2-g4e8", n_group=1, topk_group=1)
    tokens = cases("llada2-g4e8")[0]["tokens"]
    bounds = {"expert_capacity": 8, "block_size": 8, "n_group": 4}
    free = experts.load(GOLDEN / "llada2-g4e8", **bounds)
    assert torch.equal(free.block_causal(tokens, 8), plain.block_causal(tokens, 8))
    few = experts.load(GOLDEN / "llada2-g4e8", **bounds | {"expert_capacity": 3})
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    ids, _ = few.routed(x, 1)
    assert [len(set(ids[a : a + 8].flatten().tolist())) for a in (0, 8, 16)] == [3, 3, 3]
    whole = few.block_causal(tokens, 8)
    assert not torch.allclose(whole, plain.block_causal(tokens, 8), atol=1e-3)
    torch.testing.assert_close(few.block_causal(tokens[:16], 8), whole[:16], atol=1e-5, rtol=0)
