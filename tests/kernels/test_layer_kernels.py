"""The layers' kernels against the torch operations that they replace."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dllmserve.kernels import missing
from dllmserve.layers.ops import HeadNorms, LayerOps, Sandwich, rms_norm
from dllmserve.layers.triton import TritonOps
from dllmserve.models.decoder import Decoder
from dllmserve.models.loader import empty_decoder
from dllmserve.parallel.partition import Partition
from tests.helpers import PLAIN

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = [
    pytest.mark.skipif(bool(missing(DEVICE)), reason="; ".join(missing(DEVICE))),
    # numpy warns of what the interpreter computes on huge numbers
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def close(got: Tensor, expected: Tensor, roundings: int = 1) -> None:
    """Equal up to some roundings; those of float32 may add up in another order."""
    assert got.dtype == expected.dtype
    step = torch.finfo(got.dtype).eps
    # the interpreter cuts bfloat16 off where a GPU rounds, after each operation
    off = 3 if got.dtype == torch.bfloat16 and not HAS_CUDA else 1
    torch.testing.assert_close(got, expected, rtol=2 * off * roundings * step, atol=8 * off * step)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 37, 64, 4097])
@pytest.mark.parametrize("add", [False, True])
def test_add_rms_norm(dtype: torch.dtype, width: int, add: bool) -> None:
    from dllmserve.kernels.norm import add_rms_norm

    wide = random(5, width + 3, dtype=dtype)
    x = wide[:, 1 : width + 1]  # rows are not contiguous
    old = random(5, width, dtype=dtype, seed=1)
    weight = random(width, dtype=dtype, seed=2)
    residual = old.clone() if add else None
    normed, h = add_rms_norm(x, residual, weight, 1e-5)
    expected = old + x if add else x
    assert h is (residual if add else x)
    if dtype == torch.bfloat16 and not HAS_CUDA:
        close(h, expected)
    else:
        assert torch.equal(h, expected)
    close(normed, rms_norm(h, weight, 1e-5), roundings=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "count", "dim", "rotated"),
    [(5, 3, 6, 6), (1, 1, 2, 2), (40, 33, 64, 64), (7, 6, 16, 8), (5, 4, 30, 6)],
)
@pytest.mark.parametrize("queries", [None, 1, 25])
def test_rotate(
    dtype: torch.dtype, heads: int, count: int, dim: int, rotated: int, queries: int | None
) -> None:
    from dllmserve.kernels.rotary import rotate_

    ops = LayerOps(rotated, 100.0, 50, DEVICE)
    positions = torch.tensor([0, 49, 7, 7], device=DEVICE)
    buffer = random(4, heads * dim + 5, dtype=dtype)  # a row is longer than its heads
    view = buffer[:, : heads * dim].view(4, heads, dim)
    before = buffer.clone()
    norms = None
    if queries is not None:  # heads are normalised first
        weights = (random(dim, dtype=dtype, seed=seed) for seed in (1, 2))
        norms = HeadNorms(*weights, min(queries, count), 1e-5, wide=queries == 25)
    expected = ops.rotate(view.clone(), count, ops.at(positions), norms)
    rotate_(view, *ops.tables, positions, count, norms)
    close(view[:, :count], expected, roundings=1 if norms is None else 4)
    assert torch.equal(buffer[:, count * dim :], before[:, count * dim :])
    if norms is None:
        assert torch.equal(
            view[..., rotated:], before[:, : heads * dim].view_as(view)[..., rotated:]
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 37, 1500])
def test_gated(dtype: torch.dtype, width: int) -> None:
    from dllmserve.kernels.activation import gated

    wide = random(3, 2 * width + 4, dtype=dtype) * 4
    wide[0, 0] = -200.0 if dtype != torch.float32 else -80.0
    gate_up = wide[:, : 2 * width]
    gate, up = gate_up.chunk(2, dim=-1)
    close(gated(gate_up), F.silu(gate).mul_(up), roundings=2)
    # torch's own form of it cancels where the gate is far below 0
    close(gated(gate_up, "gelu_tanh"), F.gelu(gate, approximate="tanh").mul_(up), roundings=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("branches", "then", "scaled"), [(2, 1, True), (0, 3, False), (0, 2, True)]
)
def test_sandwich(dtype: torch.dtype, branches: int, then: int, scaled: bool) -> None:
    plain, fused = both_ops()
    width = 300
    outs = [random(5, width + 1, dtype=dtype, seed=i)[:, 1:] for i in range(branches or 1)]
    weights = [random(width, dtype=dtype, seed=i) for i in range(10, 16)]
    ends = tuple(weights[:then]), (1.0, 1.0, 0.3)[:then]
    norms = Sandwich(tuple(weights[3 : 3 + branches]), weights[5], *ends, eps=1e-5)
    scalars = random(5, dtype=dtype, seed=20) if scaled else None
    h = random(5, width, dtype=dtype, seed=9)
    found, expected = (ops.sandwich(outs, h.clone(), norms, scalars) for ops in (fused, plain))
    for got, wanted in zip((found[1], *found[0]), (expected[1], *expected[0]), strict=True):
        close(got, wanted, roundings=8)
    for rows in (slice(0, 1), slice(2, 5)):
        part = fused.sandwich(
            [x[rows] for x in outs],
            h[rows].clone(),
            norms,
            scalars if scalars is None else scalars[rows],
        )
        assert all(torch.equal(a, b[rows]) for a, b in zip(part[0], found[0], strict=True))
    heads = random(5, 4, 60, dtype=dtype)[:, 1:]
    for weight in (None, weights[0][:60]):
        close(fused.wide_norm(heads, weight, 1e-5), plain.wide_norm(heads, weight, 1e-5), 4)


@pytest.mark.parametrize(("rows", "depth", "outs"), [(1, 5, 3), (67, 64, 130), (130, 100, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_invariant_linear(rows: int, depth: int, outs: int, with_bias: bool) -> None:
    from dllmserve.kernels.linear import invariant_linear

    x = random(rows, depth + 1)[:, 1:]  # rows are not contiguous
    weight = random(outs, depth, seed=1)
    bias = random(outs, seed=2) if with_bias else None
    got = invariant_linear(x, weight, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=1e-5)


def same_bits(got: Tensor, whole: Tensor, rows: slice | Tensor, *, tile: int = 64) -> None:
    """``got`` are rows of ``whole``, computed without the others.

    On a GPU bit for bit; numpy's product, which the interpreter uses, rounds by the row's
    place in its tile too.
    """
    stays = isinstance(rows, slice) and rows.start % tile == 0
    if HAS_CUDA or stays:
        assert torch.equal(got, whole[rows])
    torch.testing.assert_close(got, whole[rows], atol=1e-5, rtol=1e-5)


def test_invariant_linear_is_invariant() -> None:
    from dllmserve.kernels.linear import invariant_linear

    x, weight, bias = random(150, 70), random(90, 70, seed=1), random(90, seed=2)
    whole = invariant_linear(x, weight, bias)
    for rows in (0, 1), (64, 65), (128, 150), (0, 149), (63, 64), (149, 150), (10, 12), (31, 96):
        got = invariant_linear(x[slice(*rows)].clone(), weight, bias)
        same_bits(got, whole, slice(*rows))
    order = torch.randperm(150, generator=torch.manual_seed(0)).to(DEVICE)
    same_bits(invariant_linear(x[order], weight, bias), whole, order)


def test_invariant_linear_is_for_float32() -> None:
    from dllmserve.kernels.linear import invariant_linear

    with pytest.raises(TypeError, match="bfloat16"):
        invariant_linear(random(2, 4).bfloat16(), random(3, 4).bfloat16(), None)


def test_no_rows() -> None:
    from dllmserve.kernels.activation import gated
    from dllmserve.kernels.linear import invariant_linear
    from dllmserve.kernels.norm import add_rms_norm
    from dllmserve.kernels.rotary import rotate_

    table, none = random(4, 2), torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert add_rms_norm(random(0, 8), random(0, 8), random(8), 1e-5)[0].shape == (0, 8)
    assert gated(random(0, 8)).shape == (0, 4)
    assert invariant_linear(random(0, 8), random(3, 8), None).shape == (0, 3)
    rotate_(random(0, 3, 4), table, table, none, 2)


def both_ops(dim: int = 6) -> tuple[LayerOps, LayerOps]:
    return LayerOps(dim, 1e4, 64, DEVICE), TritonOps(dim, 1e4, 64, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ops_agree(dtype: torch.dtype) -> None:
    plain, fused = both_ops()
    x, h = random(5, 24, dtype=dtype), random(5, 24, dtype=dtype, seed=1)
    weight = random(24, dtype=dtype, seed=2)
    for got, expected in zip(
        fused.add_norm(x, h.clone(), weight, 1e-5), plain.add_norm(x, h, weight, 1e-5), strict=True
    ):
        close(got, expected, roundings=4)
    matrix, bias = random(12, 24, dtype=dtype, seed=3), random(12, dtype=dtype, seed=4)
    close(fused.linear(x, matrix, bias), plain.linear(x, matrix, bias), roundings=8)
    close(fused.gated(x), plain.gated(x), roundings=2)
    positions = torch.tensor([3, 0, 63, 5, 5], device=DEVICE)
    heads = x.view(5, 4, 6)
    expected = plain.rotate(heads, 3, plain.at(positions))
    close(fused.rotate(heads.clone(), 3, fused.at(positions)), expected)


class OwnHeads:
    """Attention in which a token sees itself alone, so that rows stay independent.

    Of nothing but operations that are exactly defined, and sums over a row: a library's sigmoid
    rounds by an element's place.
    """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        score = (q * k).sum(dim=-1, keepdim=True)
        return score / (1.0 + score.abs()) * v + q / (1.0 + q.abs())


def decoders(bias: bool, dtype: torch.dtype) -> tuple[Decoder, Decoder]:
    """The same random weights with either kernels."""
    spec = replace(
        PLAIN,
        hidden_size=36,
        num_layers=2,
        num_heads=6,
        num_kv_heads=3,
        head_dim=6,
        mlp_size=70,
        qkv_bias=bias,
    )
    whole = Partition(spec)
    plain, fused = (
        empty_decoder(whole, dtype=dtype, device=DEVICE, max_len=64, kernels=k)
        for k in ("torch", "triton")
    )
    for i, (one, other) in enumerate(zip(plain.weights, fused.weights, strict=True)):
        scale = 0.2 if one.data.dim() == 2 else 1.0
        one.data.copy_(random(*one.data.shape, seed=i) * scale)
        other.data.copy_(one.data)
    return plain, fused


@pytest.mark.parametrize("bias", [False, True])
def test_decoder(bias: bool) -> None:
    plain, fused = decoders(bias, torch.float32)
    ids = torch.arange(40, device=DEVICE) % 50
    positions = torch.arange(40, device=DEVICE) * 7 % 64
    with torch.inference_mode():
        embedding = fused.embedding.weight.clone()
        expected = plain(ids, positions, OwnHeads())
        got = fused(ids, positions, OwnHeads())
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
        assert torch.equal(fused.embedding.weight, embedding)  # the residual was its copy
        for rows in (slice(0, 1), slice(0, 23), slice(17, 20), slice(39, 40)):
            same_bits(fused(ids[rows], positions[rows], OwnHeads()), got, rows)
