"""Rows in e4m3: the definition, and the kernels against plain torch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dllmserve.core.model_spec import ExpertSpec
from dllmserve.kernels import missing
from dllmserve.kernels.e4m3 import E4M3, Scaled, fill, scaled
from dllmserve.layers.ops import LayerOps
from tests.kernels.test_layer_kernels import DEVICE, HAS_CUDA, random

HALF = torch.bfloat16 if HAS_CUDA else torch.float16
fused = pytest.mark.skipif(bool(missing(DEVICE)), reason="; ".join(missing(DEVICE)))
#: the interpreter rounds to e4m3 in a way of its own
rounds = pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")


def triton_ops() -> Any:
    from dllmserve.layers.triton import TritonOps

    return TritonOps(8, 100.0, 8, DEVICE)


def near(found: Tensor, expected: Tensor, share: float = 5e-3) -> None:
    """As far as sums of e4m3 products go: matrix units keep some 13 bits of them."""
    gap = (found.float() - expected.float()).norm()
    assert float(gap) <= share * float(expected.float().norm())


def rows(*shape: int, seed: int = 0) -> Scaled:
    return scaled(random(*shape, seed=seed).to(HALF))


def test_definition() -> None:
    """Each row by itself: its largest number becomes 448, and is kept exactly."""
    x = random(5, 300) * torch.tensor([1e-3, 1.0, 40.0, 1e4, 0.0], device=DEVICE)[:, None]
    found = scaled(x)
    assert (found.data.dtype, found.dtype) == (E4M3, torch.float32)
    assert not bool(found.data[4].float().any())
    assert bool((found.data[:4].float().abs().amax(dim=1) == 448).all())
    torch.testing.assert_close(found.scale[:4], x[:4].abs().amax(dim=1) / 448)
    # half a step of three bits of mantissa, or of the smallest step there is
    error = (found.wide() - x).abs()
    assert bool((error <= x.abs() / 16 + found.scale[:, None] * 2.0**-10).all())


def test_what_is_no_number_stays_none() -> None:
    x = random(3, 40)
    x[1, 7] = torch.nan
    found = scaled(x).wide()
    assert bool(found[1].isnan().any())
    assert torch.equal(found[[0, 2]], scaled(x[[0, 2]]).wide())


def test_weights_are_scaled_into_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows at a time, of matrices and of stacked ones."""
    monkeypatch.setattr("dllmserve.kernels.e4m3._CHUNK", 100)
    for shape in ((7, 30), (3, 4, 30)):
        source = random(*shape).to(HALF)
        room = Scaled(
            torch.empty_like(source, dtype=E4M3), torch.empty(shape[:-1], device=DEVICE), HALF
        )
        fill(room, source)
        whole = scaled(source)
        assert torch.equal(room.wide(), whole.wide())


@pytest.mark.parametrize("bias", [False, True])
def test_plain_product(bias: bool) -> None:
    x, weight = rows(6, 48), rows(20, 48, seed=1)
    more = random(20, seed=2).to(HALF) if bias else None
    found = LayerOps(8, 100.0, 8, DEVICE).linear(x, weight, more)
    exact = x.wide().double() @ weight.wide().double().T
    if more is not None:
        exact += more.double()
    assert found.dtype == HALF
    torch.testing.assert_close(found.double(), exact, atol=5e-3, rtol=1e-2)


def test_plain_rows_have_no_product_with_weights_that_are_not_scaled() -> None:
    ops = LayerOps(8, 100.0, 8, DEVICE)
    with pytest.raises(TypeError, match="e4m3"):
        ops.linear(rows(2, 16), random(4, 16), None)


@fused
@pytest.mark.parametrize(
    ("count", "outs", "depth"), [(1, 64, 256), (17, 100, 300), (33, 9000, 512), (130, 48, 1040)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows(count: int, outs: int, depth: int, bias: bool) -> None:
    """One tile and several, sums cut in two and whole; twice, for counters go back to zero."""
    from dllmserve.kernels.parts import room_for_turns
    from dllmserve.kernels.scaled import few_rows_product

    x, weight = rows(count, depth), rows(outs, depth, seed=1)
    more = random(outs, seed=2).to(HALF) if bias else None
    turns = room_for_turns(DEVICE)
    expected = LayerOps(8, 100.0, 8, DEVICE).scaled_linear(x, weight, more)
    for _ in range(2):
        found = few_rows_product(x, weight, more, turns)
        near(found, expected)
        assert not bool(turns.any())


@fused
def test_more_tiles_than_counters() -> None:
    from dllmserve.kernels.scaled import few_rows_product

    x, weight = rows(320, 40), rows(72, 40, seed=1)
    room = torch.full((8,), 7, dtype=torch.int32, device=DEVICE)
    room[:4] = 0
    expected = LayerOps(8, 100.0, 8, DEVICE).scaled_linear(x, weight, None)
    near(few_rows_product(x, weight, None, room[:4]), expected)
    assert room.tolist() == [0] * 4 + [7] * 4


@fused
@pytest.mark.parametrize("pairs", [5, 30, 120])
def test_experts(pairs: int) -> None:
    spec = ExpertSpec(layers=(True,), count=6, per_token=2, size=24)
    tokens = pairs * spec.count // spec.per_token
    plain, ops = LayerOps(8, 100.0, 8, DEVICE), triton_ops()
    x = random(tokens, 40).to(HALF)
    routed = ops.route(x, random(6, 40, seed=1).to(HALF), None, spec, range(6))
    gate_up, down = rows(6, 48, 40, seed=3), rows(6, 40, 24, seed=4)
    inner = plain.expert_up(x, routed, gate_up)
    out = plain.expert_down(inner, routed, down)
    if HAS_CUDA:
        near(ops.expert_up(x, routed, gate_up), inner)
        near(ops.expert_down(inner, routed, down), out)
        return
    from dllmserve.kernels.experts import expert_product

    listed = (routed.counts, routed.order, 2, 6)
    found = expert_product(scaled(x), gate_up, *listed, activation="silu")
    near(found, inner)
    near(expert_product(scaled(inner), down, *listed), out)


def same(found: Scaled, expected: Scaled) -> None:
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.data.float(), expected.data.float())


@rounds
@pytest.mark.parametrize("width", [1, 300, 4096, 12288])
def test_kernels_scale_as_torch_does(width: int) -> None:
    """By themselves and behind a norm the same bits; behind the gate nearly so."""
    plain, ops = LayerOps(8, 100.0, 8, DEVICE), triton_ops()
    x = random(9, width + 3).to(HALF)[:, :width] * 3
    x[2] = 0
    same(ops.scaled(x), plain.scaled(x))
    weight = 1 + 0.1 * random(width, seed=1).to(HALF)
    residual = random(9, width, seed=2).to(HALF)
    for before in (None, residual):
        normed, h = ops.add_norm(x.contiguous(), _copy(before), weight, 1e-6, scales=True)
        wide, expected_h = ops.add_norm(x.contiguous(), _copy(before), weight, 1e-6)
        assert torch.equal(h, expected_h)
        same(normed, scaled(wide))
    gate_up = random(9, 2 * width, seed=3).to(HALF)
    for activation in ("silu", "gelu_tanh"):
        found, expected = (
            ops.gated(gate_up, activation, True),
            plain.gated(gate_up.float(), activation),
        )
        # half a step, and a little more where a division was rounded otherwise
        near(found.wide(), expected, 4e-2)
        near(found.wide(), scaled(expected).wide())


def _copy(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()


@rounds
@pytest.mark.parametrize("count", [1, 33, 64, 65, 129, 700])
def test_products_of_any_number_of_rows(count: int) -> None:
    """Ours, and the library's, which sums less exactly."""
    plain, ops = LayerOps(8, 100.0, 8, DEVICE), triton_ops()
    for outs, depth in ((512, 1024), (9216, 512), (100, 40)):
        x, weight = rows(count, depth), rows(outs, depth, seed=1)
        bias = random(outs, seed=2).to(HALF)
        for more in (None, bias):
            found, expected = (o.scaled_linear(x, weight, more).float() for o in (ops, plain))
            near(found, expected)
