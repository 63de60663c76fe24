"""The floor of a run, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dllmserve import LLM, SamplingParams
from dllmserve.core.model_spec import AttentionSpec, ExpertSpec
from dllmserve.core.plan import Mask, Part, Span, StepEntry, StepPlan, Store
from dllmserve.models.loader import count_weights
from dllmserve.parallel.partition import Partition
from dllmserve.tools.bench.roofline import (
    AttentionCost,
    Ceilings,
    Floor,
    ModelCost,
    attended_keys,
    attended_pairs,
    cached_keys,
    head_rows,
    measure_ceilings,
)
from tests.helpers import GOLDEN, PLAIN

SPEC = replace(
    PLAIN,
    vocab_size=30,
    embedding_size=32,
    num_layers=2,
    mlp_size=16,
    max_model_len=64,
    mask_id=29,
    eos_ids=(28,),
)
#: a layer's matrices: q, k, v [8 + 4 + 4, 8], out [8, 8], gate and up [32, 8], down [8, 16]
LAYERS = 2 * (16 * 8 + 8 * 8 + 32 * 8 + 8 * 16)
HEAD = 32 * 8
#: K and V of two layers, one head of 4
KV = 2 * 2 * 4
COST = ModelCost.of(SPEC, weight_bytes=2)


def span(q_start: int, q_len: int, ctx_len: int, store: Store, row: int = 0) -> Span:
    return Span(row, q_start, q_len, ctx_len, store, 0, 0, min(q_len, 4))


def step(*spans: Span, masks: int, guided: bool = False) -> StepPlan:
    entries = [StepEntry(s, s._replace(row=9) if guided else None, masks, "steps") for s in spans]
    return StepPlan(tuple(entries))


REFRESH = step(span(0, 10, 0, Store.POSITIONS), masks=4)
REUSE = step(span(4, 4, 10, Store.POSITIONS), masks=2)


def test_costs_of_the_model() -> None:
    assert (LAYERS, HEAD) == (1152, 256)
    assert ModelCost(LAYERS, HEAD, (AttentionCost(0, 4 * 2 * 4 * 2, KV),), 2, 2) == COST
    norms = 8 * (2 * 2 + 1)
    assert count_weights(Partition(SPEC)) == LAYERS + 2 * HEAD + norms


@pytest.mark.parametrize(
    ("shape", "keys"),
    [
        (span(0, 10, 0, Store.NONE), 10),  # no cache
        (span(0, 10, 0, Store.SELECT_PER_HEAD), 10),
        (span(6, 4, 6, Store.NONE), 10),  # prefix: the cache ends where the span begins
        (span(3, 4, 10, Store.POSITIONS), 10),  # dual, in the middle: 4 slots are overwritten
        (span(6, 4, 10, Store.POSITIONS), 10),  # dual, last block
        (span(6, 4, 8, Store.POSITIONS), 10),  # overwrites the context's end and goes on behind it
        (span(6, 4, 5, Store.NONE), 9),  # sparse: 5 kept tokens, whatever their slots
        (span(0, 4, 5, Store.NONE), 9),  # sparse at the canvas's start
    ],
)
def test_attended_keys(shape: Span, keys: int) -> None:
    assert attended_keys(shape) == keys


def stair(q_start: int, q_len: int, block: int, head: int = Part.NONE) -> Span:
    return Span(
        0, q_start, q_len, q_start, Store.POSITIONS, head=head, mask=Mask.STAIR, mask_arg=block
    )


@pytest.mark.parametrize(("q_start", "q_len"), [(0, 12), (8, 8), (3, 9), (5, 2), (4, 3), (7, 1)])
@pytest.mark.parametrize("block", [1, 4, 5])
def test_pairs_of_a_stair(q_start: int, q_len: int, block: int) -> None:
    last = q_start + q_len
    seen = [
        (q, k)
        for q in range(q_start, last)
        for k in range(last)
        if k < q_start or k // block <= q // block
    ]
    assert attended_pairs(stair(q_start, q_len, block)) == len(seen)


@pytest.mark.parametrize(("q_start", "q_len"), [(0, 12), (8, 8), (3, 2), (2, 4), (3, 9), (7, 1)])
@pytest.mark.parametrize("window", [1, 4, 20])
def test_pairs_in_a_window(q_start: int, q_len: int, window: int) -> None:
    last = q_start + q_len
    pairs = [(q, k) for q in range(q_start, last) for k in range(last)]
    causal = [(q, k) for q, k in pairs if q - window < k <= q]
    assert attended_pairs(stair(q_start, q_len, 1), window) == len(causal)
    # a canvas sees all of itself, and the window's positions before it
    canvas = [(q, k) for q, k in pairs if k > q_start - window]
    assert attended_pairs(span(q_start, q_len, q_start, Store.NONE), window) == len(canvas)
    keys = {k for _, k in canvas if k < q_start}
    assert cached_keys(span(q_start, q_len, q_start, Store.NONE), window) == len(keys)


def test_layers_with_windows() -> None:
    wide = AttentionSpec(num_kv_heads=1, head_dim=4)
    near = AttentionSpec(num_kv_heads=2, head_dim=8, window=3)
    cost = ModelCost.of(replace(SPEC, attention=(near, wide)), weight_bytes=2)
    assert cost.attention == (AttentionCost(0, 4 * 2 * 4, 8), AttentionCost(3, 4 * 2 * 8, 32))
    canvas = step(span(6, 4, 6, Store.NONE), masks=0)
    assert cost.bytes_read(canvas) == (cost.layer_weights + 6 * 8 + 2 * 32) * 2
    attention = 32 * 4 * 10 + 64 * 4 * 6
    assert cost.flop(canvas) == 2 * 4 * cost.layer_weights + attention


def test_keys_that_are_stored_ahead_are_seen_once() -> None:
    assert attended_pairs(span(2, 3, 10, Store.AHEAD)) == 3 * 10


def test_flop() -> None:
    # 10 tokens through the layers, 4 rows through the head, 10 x 10 pairs
    assert COST.flop(REFRESH) == 2 * (10 * 1152 + 4 * 256) + 64 * 100 == 31488
    assert COST.flop(REUSE) == 2 * (4 * 1152 + 2 * 256) + 64 * 4 * 10 == 12800


def test_experts() -> None:
    """Of 6 experts of 10 a token takes 2, in the second of two layers; a shared one of 10."""
    experts = ExpertSpec(layers=(False, True), count=6, per_token=2, size=10, shared_size=10)
    spec = replace(SPEC, architecture="LLaDA2MoeModelLM", experts=replace(experts, bias="choice"))
    cost, each = ModelCost.of(spec, weight_bytes=2), 3 * 8 * 10
    dense = LAYERS - 3 * 8 * 16 + 6 * 8 + each  # router and shared expert in place of an MLP
    assert cost == ModelCost(dense, HEAD, COST.attention, 2, 2, 1, 6, 2, each)
    assert cost.flop(REUSE) == 2 * (4 * (dense + 2 * each) + 2 * 256) + 64 * 4 * 10
    assert cost.uniform_experts(1) == pytest.approx(2)
    assert cost.uniform_experts(4) == pytest.approx(6 * (1 - (2 / 3) ** 4))
    read = (dense + HEAD + 6 * KV) * 2
    assert cost.bytes_read(REUSE) == read + 2 * round(cost.uniform_experts(4) * each)
    assert cost.bytes_read(REUSE, {4: 2.5, 5: 6.0}) == read + 2 * 600
    floor = Floor(cost, Ceilings(1.0, 1e12, 0, 0), {4: 2.5})
    assert floor.seconds([REUSE]) == read + 1200
    assert floor.experts([REUSE, REUSE], {4: 2.5}) == 2.5
    assert Floor(COST, floor.ceilings, {}).experts([REUSE], {}) is None


def test_matrices_in_eight_bits() -> None:
    """A byte each, and products at a rate of their own; LM head, K,V and scores stay."""
    cost = ModelCost.of(SPEC, 2, "fp8")
    assert cost.flop(REUSE) == COST.flop(REUSE)
    assert cost.bytes_read(REUSE) == COST.bytes_read(REUSE) - LAYERS
    ceilings = Ceilings(1e12, 1.0, 0, 0, scaled_flop_per_second=2.0)
    layers = 2 * 4 * LAYERS
    assert cost.layer_flop(REUSE) == layers
    assert cost.floor_seconds([REUSE], ceilings) == cost.flop(REUSE) - layers / 2


def test_guidance_counts_twice() -> None:
    guided = step(span(4, 4, 10, Store.POSITIONS), masks=2, guided=True)
    assert head_rows(guided) == 4
    assert COST.flop(guided) == 2 * 12800
    assert COST.bytes_read(guided) == COST.bytes_read(REUSE) + 6 * KV * 2


def test_bytes() -> None:
    assert COST.bytes_read(REFRESH) == (1152 + 256) * 2 == 2816
    # 10 cached tokens, of which the span overwrites 4
    assert COST.bytes_read(REUSE) == 2816 + 6 * KV * 2 == 3008
    assert COST.bytes_read(step(*REUSE.spans, *REUSE.spans, masks=2)) == 2816 + 2 * 192
    assert COST.bytes_read(step(span(0, 10, 0, Store.POSITIONS), masks=0)) == 1152 * 2


def test_floor_is_the_longer_time_of_each_step() -> None:
    ceilings = Ceilings(
        bytes_per_second=1504.0, flop_per_second=10_000.0, copy_bytes=0, matrix_size=0
    )
    # the refresh is bound by arithmetic, 3.1488 s against 1.87 s; the reuse by what it reads,
    # 2 s against 1.28 s
    assert COST.floor_seconds([REFRESH], ceilings) == pytest.approx(3.1488)
    assert COST.floor_seconds([REUSE], ceilings) == pytest.approx(2.0)
    assert COST.floor_seconds([REFRESH, REUSE, REUSE], ceilings) == pytest.approx(7.1488)
    assert COST.floor_seconds([], ceilings) == 0


def test_ceilings_are_plausible() -> None:
    found = measure_ceilings(torch.device("cpu"), torch.float32)
    assert 1e8 < found.bytes_per_second < 1e13
    assert 1e8 < found.flop_per_second < 1e15
    assert found.matrix_size == 1024 and found.copy_bytes == 128 * 1024**2


def spans_of(name: str, prompt: int, params: SamplingParams) -> list[StepPlan]:
    """The steps of one request of a golden model, as the engine launches them."""
    llm = LLM(str(GOLDEN / name), device="cpu")
    plans: list[StepPlan] = []
    with llm.observe(plans.append):
        llm.generate([list(range(1, prompt + 1))], params, use_tqdm=False)
    return plans


def test_steps_of_a_block_causal_model() -> None:
    """Blocks of 4 in 2 forwards each: the head on masks alone, a finished block's K,V beside the
    next block's first forward."""
    params = SamplingParams(
        temperature=0.0, gen_length=12, block_length=4, steps_per_block=2, ignore_eos=True
    )
    plans = spans_of("sdar-kv2of4", 8, params)
    # tokens, rows of the head, cached keys, pairs
    figures = [
        (p.tokens, head_rows(p), cached_keys(p.spans[0]), attended_pairs(p.spans[0])) for p in plans
    ]
    assert figures == [
        (12, 4, 0, 4 * 4 + 4 * 8 + 4 * 12),  # the prompt, and the first block
        (4, 2, 8, 4 * 12),
        (8, 4, 8, 4 * 12 + 4 * 16),  # the first block is stored, the second begins
        (4, 2, 12, 4 * 16),
        (8, 4, 12, 4 * 16 + 4 * 20),
        (4, 2, 16, 4 * 20),
    ]


def test_steps_of_an_autoregressive_model() -> None:
    """A prompt and then one token a step, each with one row of the head."""
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    plans = spans_of("qwen3-kv2of4", 6, params)
    assert [(p.tokens, head_rows(p), cached_keys(p.spans[0])) for p in plans] == [
        (6, 1, 0),
        *((1, 1, cached) for cached in (6, 7, 8)),
    ]
    assert [attended_pairs(p.spans[0]) for p in plans] == [21, 7, 8, 9]
