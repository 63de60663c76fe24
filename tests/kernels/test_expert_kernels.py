"""The kernels of a mixture of experts against the torch operations that they replace."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dllmserve.core.model_spec import ExpertSpec
from dllmserve.kernels import missing
from dllmserve.layers.ops import LayerOps, Routed
from dllmserve.layers.triton import TritonOps
from tests.kernels.test_layer_kernels import DEVICE, HAS_CUDA, close, random, same_bits

pytestmark = [
    pytest.mark.skipif(bool(missing(DEVICE)), reason="; ".join(missing(DEVICE))),
    # numpy warns of what the interpreter computes on huge numbers, and on those that are none
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

#: Triton's interpreter multiplies the bit patterns of bfloat16 as if they were integers
HALF = torch.bfloat16 if HAS_CUDA else torch.float16


def experts(count: int, per_token: int, **more: Any) -> ExpertSpec:
    return ExpertSpec(layers=(True,), count=count, per_token=per_token, size=24, **more)


CHOICE = {"score": "sigmoid", "bias": "choice"}
SPECS = [
    experts(
        12, 4, score="sigmoid", bias="choice", groups=4, top_groups=2, normalize=True, scale=2.5
    ),
    experts(8, 2),
    experts(6, 1, bias="weights", scale=0.5),
    experts(5, 5, score="sigmoid", normalize=True),
]
#: pairs of an expert, on average, for which tilings differ
PAIRS = (5, 15, 30, 60, 120, 500)
PLAIN, FUSED = (kind(8, 100.0, 8, DEVICE) for kind in (LayerOps, TritonOps))


def routed(
    spec: ExpertSpec, x: Tensor, ops: LayerOps, held: range, factors: Tensor | None = None
) -> Routed:
    gate = random(spec.count, x.shape[1], dtype=x.dtype, seed=1) * 0.2
    bias = random(spec.count, seed=2) * 0.1 if spec.bias else None
    return ops.route(x, gate, bias, spec, held, factors=factors)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("tokens", [0, 1, 19])
def test_route(spec: ExpertSpec, tokens: int) -> None:
    x = random(tokens, 40)
    held = range(1, spec.count + (spec.count == 12))  # with the shared one, or without
    factors = random(spec.count, seed=5) if spec.normalize else None
    found, expected = (routed(spec, x, ops, held, factors) for ops in (FUSED, PLAIN))
    assert torch.equal(found.ids, expected.ids)
    close(found.weights, expected.weights, 20)
    for place, expert in enumerate(held):
        assert found.counts is not None and found.order is not None
        own = found.order[place, : int(found.counts[place])]
        wanted = (expected.ids.flatten() == expert).nonzero()[:, 0]
        assert own.sort().values.tolist() == wanted.tolist()


def test_equal_scores_go_to_the_first() -> None:
    x = torch.zeros(3, 40, device=DEVICE)
    found = FUSED.route(x, random(8, 40), None, SPECS[1], range(8))
    assert found.ids.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("spec", SPECS)
def test_rows_that_are_no_numbers_harm_no_others(spec: ExpertSpec) -> None:
    x = random(19, 40)
    good = routed(spec, x, FUSED, range(spec.count))
    x[3] = torch.nan
    found = routed(spec, x, FUSED, range(spec.count))
    assert all(len(set(ids)) == spec.per_token for ids in found.ids.tolist())
    assert found.weights[3].isnan().all()
    others = torch.arange(19) != 3
    assert torch.equal(found.ids[others], good.ids[others])


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("tokens", "held"), [(19, range(13)), (19, range(3, 9)), (70, range(13))])
def test_products(dtype: torch.dtype, tokens: int, held: range) -> None:
    spec, (depth, size) = SPECS[0], (40, 24)
    x = random(tokens, depth, dtype=dtype)
    gate_up = random(len(held), 2 * size, depth, dtype=dtype, seed=3) * 0.2
    down = random(len(held), depth, size, dtype=dtype, seed=4) * 0.2
    to = routed(spec, x, FUSED, held)
    mine = ((to.ids >= held.start) & (to.ids < held.stop)).flatten()
    for activation in ("gelu_tanh", "silu"):
        inner = FUSED.expert_up(x, to, gate_up, activation)
        close(inner[mine], PLAIN.expert_up(x, to, gate_up, activation)[mine], 64)
    inner[~mine] = torch.nan  # undefined
    rows = FUSED.expert_down(inner, to, down)
    close(rows[mine], PLAIN.expert_down(inner, to, down)[mine], 64)
    rows[~mine] = torch.nan
    close(FUSED.combine(rows, to), PLAIN.combine(rows, to), 2)


def test_a_row_depends_on_no_other() -> None:
    spec, held = SPECS[0], range(13)
    x, gate_up, down = random(26, 40), random(13, 48, 40, seed=3), random(13, 40, 24, seed=4)

    def out(rows: Tensor) -> Tensor:
        to = routed(spec, rows, FUSED, held)
        return FUSED.combine(FUSED.expert_down(FUSED.expert_up(rows, to, gate_up), to, down), to)

    whole = out(x)
    for rows in (1, 2), (7, 24):
        same_bits(out(x[slice(*rows)].clone()), whole, slice(*rows), tile=1000)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("gated", [True, False])
def test_every_tiling(pairs: int, gated: bool) -> None:
    from dllmserve.kernels.experts import expert_product, tiling_for

    counts = torch.tensor([pairs, 0, 3 * pairs - 7, 1], dtype=torch.int32, device=DEVICE)
    tokens = 4 * pairs
    order = torch.zeros(4, tokens, dtype=torch.int32, device=DEVICE)
    places = random(tokens).argsort().int()
    depth, outs = (128, 128) if pairs > 20 else (120, 72)  # with parts of tiles, or without
    expected = torch.zeros(tokens, outs, device=DEVICE)
    x, weight = random(tokens, depth, dtype=HALF), random(4, 2 * outs, depth, seed=3) * 0.1
    weight = (weight if gated else weight[:, :outs].contiguous()).to(HALF)
    start = 0
    for expert, count in enumerate(counts.tolist()):
        own = places[start : start + count]
        order[expert, :count], start = own, start + count
        product = PLAIN.linear(x[own.long()], weight[expert], None)
        expected[own.long()] = (PLAIN.gated(product) if gated else product).float()
    found = expert_product(x, weight, counts, order, 1, 4, activation="silu" if gated else "")
    assert len({tiling_for(HALF, n, gated) for n in PAIRS}) == (6 if gated else 5)
    defined = places[:start].long()
    torch.testing.assert_close(found[defined].float(), expected[defined], atol=0.05, rtol=0.02)
