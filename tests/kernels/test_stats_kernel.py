"""fused_row_stats against row_stats and against the definitions."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dllmserve.decoding.noise import token_uniforms
from dllmserve.decoding.stats import RowParams, TokenStats, row_stats
from dllmserve.kernels import missing
from dllmserve.parallel.vocab import VocabShard
from dllmserve.runtime.kernels.reducer import TritonReducer
from dllmserve.runtime.shape import SegmentShape

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from dllmserve.kernels.noise import gumbel, rough_gumbel, spread, uniform  # noqa: E402
from dllmserve.kernels.stats import fused_row_stats  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOTH = frozenset({"margin", "entropy"})
INF, NAN = math.inf, math.nan

pytestmark = [
    pytest.mark.skipif(bool(missing(DEVICE)), reason="; ".join(missing(DEVICE))),
    # numpy warns of what the interpreter computes on infinities
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

#: temperature and "tempered", all kinds of rows
KINDS = [(t, d) for t in (0.0, 1e-8, 0.3, 1.0, 2.5) for d in (False, True)]
#: some of them, for large vocabularies, where the interpreter is slow
FEW = [(0.0, False), (0.6, False), (1e-8, True), (1.0, True)]


def parameters(kinds: list[tuple[float, bool]], seed: int = 0) -> RowParams:
    rows = len(kinds)
    return RowParams(
        temperature=torch.tensor([t for t, _ in kinds], dtype=torch.float64),
        top_p=torch.ones(rows, dtype=torch.float64),
        top_k=torch.zeros(rows, dtype=torch.int64),
        tempered=torch.tensor([d for _, d in kinds]),
        keys=torch.arange(rows) * 7919 - 10**17 + seed,
    )


def fused(
    z: Tensor, params: RowParams, mask_id: int, sampled: bool, needs: frozenset[str] = BOTH
) -> TokenStats:
    """On the device, and back."""
    there = moved(params)
    return back(fused_row_stats(z.to(DEVICE), there, mask_id=mask_id, sampled=sampled, needs=needs))


def back(stats: TokenStats) -> TokenStats:
    """The same on the host."""
    parts = ((k, v.cpu() if isinstance(v, torch.Tensor) else v) for k, v in vars(stats).items())
    return TokenStats(**dict(parts))


def moved(params: RowParams) -> RowParams:
    """The same on the device."""
    found = {k: v.to(DEVICE) for k, v in vars(params).items() if v is not None}
    return RowParams(**found)


def check(z: Tensor, params: RowParams, mask_id: int, sampled: bool) -> TokenStats:
    """Compare with row_stats; a token counts where the numbers are numbers."""
    got = fused(z, params, mask_id, sampled)
    expected = row_stats(z, params, mask_id=mask_id, sampled=sampled, filtered=False, needs=BOTH)
    assert got.prob.isnan().tolist() == expected.prob.isnan().tolist()
    valid = ~expected.prob.isnan()
    assert got.token[valid].tolist() == expected.token[valid].tolist()
    assert bool(((got.token >= 0) & (got.token < z.shape[1])).all())
    assert got.token.dtype == torch.int64
    for name in ("prob", "margin", "entropy"):
        one, other = getattr(got, name), getattr(expected, name)
        assert one.dtype == torch.float64
        torch.testing.assert_close(
            one, other, atol=1e-6, rtol=1e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    return got


def logits(rows: int, vocab: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [2, 23, 2049, 20011])
def test_greedy(vocab: int, dtype: torch.dtype) -> None:
    z = logits(4, vocab) * torch.tensor([[0.1], [1.0], [2.0], [10.0]])
    check(z.to(dtype), parameters([(0.0, False)] * 4), mask_id=vocab - 1, sampled=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [23, 1025, 17000])
def test_sampled(vocab: int, dtype: torch.dtype) -> None:
    """All temperatures and kinds of rows in one call."""
    kinds = KINDS * 3 if vocab < 100 else KINDS if vocab < 2000 else FEW
    z = logits(len(kinds), vocab).to(dtype)
    check(z, parameters(kinds), mask_id=7, sampled=True)


@pytest.mark.parametrize("sampled", [False, True])
def test_proposals_without_confidence(sampled: bool) -> None:
    """Struck off in several splits, in some rows; most rows propose one of them."""
    kinds = FEW if sampled else [(0.0, False)] * 4
    z = logits(len(kinds), 9000)
    ids = torch.tensor([[5, 8999, 2048], [5, 8999, 2048], [-1, -1, -1], [5, -1, -1]])
    z[:, ids[0]] += torch.tensor([12.0, 13.0, 12.5])
    params = replace(parameters(kinds), last=ids)
    given = z.clone()
    reducer = TritonReducer(VocabShard(9000))
    segment = SegmentShape(4, 4, guided=False, sampled=sampled, filtered=False, last=True)
    there = (z.to(DEVICE), moved(params), 7, segment, BOTH)
    got = back(reducer.reduce(*there))
    expected = row_stats(
        given.clone(), params, mask_id=7, sampled=sampled, filtered=False, needs=BOTH
    )
    assert got.token.tolist() == expected.token.tolist()
    for name in ("prob", "margin", "entropy"):
        one, other = getattr(got, name), getattr(expected, name)
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    lost = (got.token[:, None] == ids).any(dim=-1)
    assert lost.any() and not lost.all()
    assert (got.prob[lost] == 0).all() and (got.prob[~lost] > 0).all()
    plain = fused(given, replace(params, last=None), 7, sampled)
    assert got.token.tolist() == plain.token.tolist()


def test_definitions_in_float64() -> None:
    z = logits(6, 9000)
    got = fused(z, parameters([(0.0, False)] * 6), mask_id=0, sampled=False)
    p = z.double().softmax(dim=-1)
    best = p.topk(2, dim=-1).values
    assert got.token.tolist() == z.argmax(dim=-1).tolist()
    assert got.margin is not None
    assert got.entropy is not None
    torch.testing.assert_close(got.prob, best[:, 0], atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(got.margin, best[:, 0] - best[:, 1], atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(got.entropy, torch.special.entr(p).sum(-1), atol=1e-6, rtol=1e-6)


def test_confident_rows_keep_their_order() -> None:
    """Rounded to float32 all of these are 1. The top moves from split to split."""
    z = torch.zeros(6, 20000)
    gaps = torch.tensor([30.0, 31.0, 32.0, 33.0, 34.0, 80.0])
    z[torch.arange(6), torch.tensor([0, 8191, 8192, 12345, 19999, 5])] = gaps
    got = check(z, parameters([(0.0, False)] * 6), mask_id=77, sampled=False)
    assert bool((got.prob[1:5] > got.prob[:4]).all())
    assert bool((got.prob.float() == 1).all())
    others = 19999 * (-gaps.double()).exp()
    torch.testing.assert_close(1 - got.prob, others / (1 + others), atol=2e-16, rtol=1e-5)
    # an entropy far below float32's rounding of 1
    assert got.entropy is not None
    expected = torch.log1p(others) + others * gaps.double() / (1 + others)
    torch.testing.assert_close(got.entropy, expected, atol=0.0, rtol=1e-5)


@pytest.mark.parametrize("sampled", [False, True])
def test_ties_go_to_the_first_id(sampled: bool) -> None:
    z = torch.full((5, 9000), -4.0)
    for row, ids in enumerate([[3, 8999], [2047, 2048], [8191, 8192], [8500, 8990]]):
        z[row, ids] = 6.0  # the last row is all ties
    got = check(z, parameters([(0.0, False)] * 5), mask_id=1, sampled=sampled)
    assert got.token.tolist() == [3, 2047, 8191, 8500, 0]
    got = check(z[:, :50], parameters([(0.0, True)] * 5), mask_id=0, sampled=sampled)
    assert got.token.tolist() == [3, 1, 1, 1, 1]


@pytest.mark.parametrize("mask_id", [0, 2048, 8199])
def test_the_mask_id_on_top(mask_id: int) -> None:
    z = logits(len(FEW), 8200)
    z[:, mask_id] = 40.0
    z[1, mask_id] = 14.0  # where the mask id leaves the others a chance
    sampled = check(z, parameters(FEW), mask_id, sampled=True)
    greedy = check(z, parameters([(0.0, False)] * len(FEW)), mask_id, sampled=False)
    for got in (sampled, greedy):
        assert mask_id not in got.token.tolist()
        assert bool((got.prob[[0, 2]] < 1e-8).all())


def broken(vocab: int, mask_id: int) -> Tensor:
    """Rows with NaN and infinities, where tiles and splits begin, end and lie."""
    last, other = vocab - 1, 2 if mask_id != 2 else 3
    fills: list[tuple[list[int], float]] = [
        ([0], NAN), ([last], NAN), ([mask_id], NAN), ([0, last], NAN), (list(range(vocab)), NAN),
        ([0], INF), ([last], INF), ([mask_id], INF), ([other, last], INF), ([mask_id, last], INF),
        ([0], -INF), ([mask_id], -INF), (list(range(vocab)), -INF),
    ]  # fmt: skip
    z = logits(len(fills) + 3, vocab)
    for row, (ids, value) in enumerate(fills):
        z[row, ids] = value
    z[-3] = -INF
    z[-3, mask_id] = 1.0  # nothing but the mask id
    z[-2] = -INF
    z[-2, last] = 1.0  # nothing but one token
    z[-1, :-1] = -INF
    z[-1, 0] = NAN
    return z


@pytest.mark.parametrize(("vocab", "mask_first"), [(5, False), (5, True), (8195, False)])
@pytest.mark.parametrize("kind", [None, (0.0, True), (0.7, False), (0.7, True)])
def test_logits_that_are_not_numbers(
    vocab: int, mask_first: bool, kind: tuple[float, bool] | None
) -> None:
    """The probability is NaN exactly where row_stats says so."""
    mask_id = 0 if mask_first else vocab // 2
    z = broken(vocab, mask_id)[:: 1 if vocab < 100 or kind is None else 2]
    params = parameters([kind or (0.0, False)] * len(z))
    check(z, params, mask_id, sampled=kind is not None)


def same_bits(one: TokenStats, other: TokenStats, rows: slice) -> None:
    for name in ("token", "prob", "margin", "entropy"):
        whole, part = getattr(one, name)[rows], getattr(other, name)
        assert torch.equal(whole, part), name


@pytest.mark.parametrize("vocab", [1000, 9000])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_row_does_not_depend_on_others(vocab: int, sampled: bool) -> None:
    z = logits(4, vocab).bfloat16()
    params = parameters(FEW if sampled else [(0.0, False)] * 4)
    whole = fused(z, params, 5, sampled)
    for rows in (slice(0, 1), slice(3, 4), slice(1, 3)):
        part = fused(z[rows].clone(), params[rows], 5, sampled)
        same_bits(whole, part, rows)


@pytest.mark.parametrize("sampled", [False, True])
def test_strided_rows(sampled: bool) -> None:
    wide = logits(4, 3000)
    params = parameters(KINDS[:4] if sampled else [(0.0, False)] * 4)
    z = wide[:, 3:2600]
    assert not z.is_contiguous()
    check(z, params, 9, sampled)
    check(wide[::2, :2600], params[::2], 9, sampled)


def test_unasked_statistics_are_left_out() -> None:
    z, params = logits(3, 50), parameters([(0.0, False)] * 3)
    whole = fused(z, params, 1, False)
    for needs in (frozenset(), frozenset({"margin"}), frozenset({"entropy"})):
        got = fused(z, params, 1, False, needs)
        assert (got.margin is not None) == ("margin" in needs)
        assert (got.entropy is not None) == ("entropy" in needs)
        assert torch.equal(got.prob, whole.prob)
        for name in needs:
            assert torch.equal(getattr(got, name), getattr(whole, name))


def test_no_rows() -> None:
    got = fused(logits(0, 50), parameters([]), 1, True)
    assert got.token.shape == got.prob.shape == (0,)


@triton.jit
def draw(keys_ptr, out_ptr, first, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    u = uniform(tl.load(keys_ptr + row), first + column)
    tl.store(out_ptr + row * BLOCK + column, u)


def test_noise_is_that_of_the_plain_path_bit_for_bit() -> None:
    low, high = -(1 << 63), (1 << 63) - 1
    keys = torch.tensor([0, 1, -1, low, high, 123456789, -987654321987654321], device=DEVICE)
    for vocab in (1024, 152064):
        out = torch.empty(len(keys), 1024, dtype=torch.float64, device=DEVICE)
        draw[(len(keys),)](keys, out, vocab - 1024, BLOCK=1024)
        ids = torch.arange(vocab - 1024, vocab, device=DEVICE)
        assert torch.equal(out, token_uniforms(keys, ids))


@triton.jit
def differ(keys_ptr, out_ptr, unsure_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + row)
    rough, sure = rough_gumbel(key.to(tl.uint64) + spread(column))
    place = row * BLOCK + column
    tl.store(out_ptr + place, rough.to(tl.float64) - gumbel(key, column))
    tl.store(unsure_ptr + place, (sure < 256).to(tl.int8))


def test_rough_noise_is_near_the_exact() -> None:
    """Or says that it may not be; draws rely on a distance of 0.0025."""
    keys = torch.arange(64, device=DEVICE) * 104729 + 5
    out = torch.empty(64, 16384, dtype=torch.float64, device=DEVICE)
    unsure = torch.empty(64, 16384, dtype=torch.int8, device=DEVICE)
    differ[(64,)](keys, out, unsure, BLOCK=16384)
    unsure = unsure.bool()
    assert int(unsure.sum()) < 10  # one in 2^23
    assert float(out[~unsure].abs().max()) < 0.0025


@pytest.mark.parametrize("vocab", [1000, 9000])
def test_draws_beside_the_likeliest(vocab: int) -> None:
    """Close scores among them: flat logits, and such that are all the same."""
    z = logits(len(KINDS), vocab)
    z[2::3] = 0.25
    params = replace(parameters(KINDS), tempered=torch.zeros(len(KINDS), dtype=torch.bool))
    found = fused(z.clone(), params, 7, True, frozenset({"entropy", "noise"}))
    plain = fused(z.clone(), params, 7, False, frozenset({"entropy"}))
    drawn = row_stats(z, params, mask_id=7, sampled=True, filtered=False, needs=frozenset()).token
    assert found.drawn is not None
    assert torch.equal(found.drawn, drawn)
    assert torch.equal(found.token, plain.token)
    assert torch.equal(found.prob, plain.prob)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("sampled", [False, True])
def test_inside_a_cuda_graph(sampled: bool) -> None:
    z = logits(len(KINDS), 17000).to(DEVICE)
    kinds = KINDS if sampled else [(0.0, False)] * len(KINDS)
    params = moved(parameters(kinds))
    options = {"mask_id": 5, "sampled": sampled, "needs": BOTH}
    fused_row_stats(z, params, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused_row_stats(z, params, **options)
    z.copy_(logits(len(KINDS), 17000, seed=1))
    graph.replay()
    expected = fused_row_stats(z, params, **options)
    same_bits(expected, captured, slice(None))
