"""Statistics of logit rows in one pass: the fused twin of ``decoding.stats.row_stats``.

The vocabulary is cut into splits, one program each, whose partial results a second kernel
joins. The cut depends on the vocabulary's size alone, so a row's bits do not depend on how
many rows are in the call, nor on how many ranks share the vocabulary: those exchange partial
results between the two kernels. Definitions, and what happens to NaN and infinities, are those
of ``row_stats``: the top logit is left out of every sum exactly, never subtracted again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllmserve.decoding.stats import RowParams, TokenStats
from dllmserve.parallel.vocab import VocabShard

#: ids of one tile; sampled tiles hold float64 numbers
_TILE, _SAMPLED_TILE = 2048, 1024
#: partial results of a split, besides its best token's id and score: top, others, second,
#: spread, the best token's value
_PARTIALS = 5

_INF = tl.constexpr(float("inf"))
_NO_ID = tl.constexpr(0x7FFFFFFF)
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MUL_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MUL_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def mix(
    x: tl.tensor,
) -> tl.tensor:
    """decoding.noise.mix on uint64."""
    x = x + _GOLDEN
    x = (x ^ (x >> 30)) * _MUL_1
    x = (x ^ (x >> 27)) * _MUL_2
    return x ^ (x >> 31)


@triton.jit
def uniform(
    key: tl.tensor,
    ids: tl.tensor,
) -> tl.tensor:
    """token_uniforms of one row: float64 in (0, 1), bit for bit."""
    x = mix(key.to(tl.uint64) + ids.to(tl.uint64) * _GOLDEN)
    # below 2^52, so the signed conversion is the same and cheaper
    return ((x >> 12).to(tl.int64).to(tl.float64) + 0.5) * 2.220446049250313e-16


@triton.jit
def _tempered(
    z: tl.tensor,
    top: tl.tensor,
    scale: tl.tensor,
) -> tl.tensor:
    """(z - top) / T, rounded as row_stats rounds it."""
    return ((z.to(tl.float64) - top) / scale).to(tl.float32)


@triton.jit
def _first_max(
    values: tl.tensor,
    ids: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Largest value, which must not be NaN, and the first id that has it."""
    best = tl.max(values, axis=0)
    return best, tl.min(tl.where(values == best, ids, _NO_ID), axis=0)


@triton.jit
def _tile_stats(
    b: tl.tensor,
    ids: tl.tensor,
    MARGIN: tl.constexpr,
    ENTROPY: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Top of one tile and its first id; sum of exp(b - top), largest b and spread of the rest."""
    real = b == b
    clean = tl.where(real, b, -_INF)
    top, top_id = _first_max(clean, ids)
    rest = ids != top_id
    gap = b - tl.where(top == -_INF, 0.0, top)
    # a NaN is never the top, so it reaches the sum and with it the probability
    weights = tl.where(rest | (b != b), tl.exp(gap), 0.0)
    others = tl.sum(weights, axis=0)
    second = top
    spread = others
    if MARGIN:
        second = tl.max(tl.where(rest, clean, -_INF), axis=0)
    if ENTROPY:
        # not 0 * inf where a logit is -inf
        spread = tl.sum(weights * tl.where(weights > 0, -gap, 0.0), axis=0)
    return top, top_id, others, second, spread


@triton.jit
def _join(
    top: tl.tensor,
    others: tl.tensor,
    second: tl.tensor,
    spread: tl.tensor,
    top_2: tl.tensor,
    others_2: tl.tensor,
    second_2: tl.tensor,
    spread_2: tl.tensor,
) -> tuple[tl.tensor, ...]:
    """Statistics of two sets of ids: the lower top joins the others of the higher one."""
    swap = top_2 > top
    high, low = tl.where(swap, top_2, top), tl.where(swap, top, top_2)
    high_others, low_others = tl.where(swap, others_2, others), tl.where(swap, others, others_2)
    high_second = tl.where(swap, second_2, second)
    high_spread, low_spread = tl.where(swap, spread_2, spread), tl.where(swap, spread, spread_2)
    # no top yet is infinitely far below, and -inf - -inf would be NaN
    gap = tl.where(low == -_INF, _INF, high - tl.where(low == -_INF, 0.0, low))
    weight = tl.exp(-gap)
    joining = (low_others + 1.0) * weight
    moved = low_spread * weight + joining * tl.where(gap < _INF, gap, 0.0)
    return high, high_others + joining, tl.maximum(high_second, low), high_spread + moved


@triton.jit
def _store_partials(
    partial_ptr: tl.tensor,
    score_ptr: tl.tensor,
    id_ptr: tl.tensor,
    row: tl.tensor,
    split: tl.tensor,
    splits: tl.tensor,
    top: tl.tensor,
    others: tl.tensor,
    second: tl.tensor,
    spread: tl.tensor,
    value: tl.tensor,
    score: tl.tensor,
    token: tl.tensor,
) -> None:
    base = partial_ptr + row * splits * 5 + split
    tl.store(base, top)
    tl.store(base + splits, others)
    tl.store(base + splits * 2, second)
    tl.store(base + splits * 3, spread)
    tl.store(base + splits * 4, value)
    tl.store(score_ptr + row * splits + split, score.to(tl.float64))
    tl.store(id_ptr + row * splits + split, token)


@triton.jit
def _greedy_kernel(
    z_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    score_ptr: tl.tensor,
    id_ptr: tl.tensor,
    z_stride: tl.tensor,
    vocab: tl.tensor,
    splits: tl.tensor,
    mask_id: tl.tensor,
    MARGIN: tl.constexpr,
    ENTROPY: tl.constexpr,
    FIRST: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    start = split * SPLIT
    end = tl.minimum(start + SPLIT, vocab)
    top = tl.full((), float("-inf"), tl.float32)
    others = tl.full((), 0.0, tl.float32)
    second, spread, best = top, others, top
    token = tl.full((), 0, tl.int32)
    for low in range(start, end, TILE):
        column = low + tl.arange(0, TILE)
        place = z_ptr + row * z_stride + column
        z = tl.load(place, mask=column < end, other=float("-inf")).to(tl.float32)
        ids = FIRST + column
        top_2, id_2, others_2, second_2, spread_2 = _tile_stats(z, ids, MARGIN, ENTROPY)
        best_2 = top_2
        if id_2 == mask_id:  # never proposed
            best_2, id_2 = _first_max(tl.where((ids != mask_id) & (z == z), z, -_INF), ids)
        token = tl.where(best_2 > best, id_2, token)
        best = tl.maximum(best, best_2)
        top, others, second, spread = _join(
            top, others, second, spread, top_2, others_2, second_2, spread_2
        )
    place = (partial_ptr, score_ptr, id_ptr, row, split, splits)
    _store_partials(*place, top, others, second, spread, best, best, token)


@triton.jit
def _tops_kernel(
    z_ptr: tl.tensor,
    tops_ptr: tl.tensor,
    z_stride: tl.tensor,
    vocab: tl.tensor,
    splits: tl.tensor,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Largest logit of each split. NaN is left out: it makes the row NaN elsewhere."""
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    start = split * SPLIT
    end = tl.minimum(start + SPLIT, vocab)
    tops = tl.full((TILE,), float("-inf"), tl.float32)
    for low in range(start, end, TILE):
        column = low + tl.arange(0, TILE)
        place = z_ptr + row * z_stride + column
        z = tl.load(place, mask=column < end, other=float("-inf")).to(tl.float32)
        tops = tl.maximum(tops, tl.where(z == z, z, -_INF))
    tl.store(tops_ptr + row * splits + split, tl.max(tops, axis=0))


@triton.jit
def _row_top(
    tops_ptr: tl.tensor,
    row: tl.tensor,
    splits: tl.tensor,
    SPLITS: tl.constexpr,
) -> tl.tensor:
    """The row's largest logit, float64, from those of its splits."""
    split = tl.arange(0, SPLITS)
    tops = tl.load(tops_ptr + row * splits + split, mask=split < splits, other=float("-inf"))
    return tl.max(tops, axis=0).to(tl.float64)


@triton.jit
def _value(
    place: tl.tensor,
    found: tl.tensor,
    tempered: tl.tensor,
    row_top: tl.tensor,
    scale: tl.tensor,
) -> tl.tensor:
    """The best token's value in the distribution that statistics are of; -inf without one."""
    value = tl.load(place, mask=found, other=float("-inf")).to(tl.float32)
    return tl.where(tempered & found, _tempered(value, row_top, scale), value)


@triton.jit
def _sampled_kernel(
    z_ptr: tl.tensor,
    tops_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    tempered_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    score_ptr: tl.tensor,
    id_ptr: tl.tensor,
    z_stride: tl.tensor,
    vocab: tl.tensor,
    splits: tl.tensor,
    mask_id: tl.tensor,
    all_splits: tl.tensor,
    MARGIN: tl.constexpr,
    ENTROPY: tl.constexpr,
    FIRST: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    start = split * SPLIT
    end = tl.minimum(start + SPLIT, vocab)
    temperature = tl.load(temperature_ptr + row)
    scale = tl.where(temperature > 0, temperature, 1.0)
    tempered = tl.load(tempered_ptr + row) != 0
    key = tl.load(keys_ptr + row)
    row_top = _row_top(tops_ptr, row, all_splits, SPLITS)
    top = tl.full((), float("-inf"), tl.float32)
    others = tl.full((), 0.0, tl.float32)
    second, spread = top, others
    best = tl.full((), float("-inf"), tl.float64)
    token = tl.full((), 0, tl.int32)
    for low in range(start, end, TILE):
        column = low + tl.arange(0, TILE)
        place = z_ptr + row * z_stride + column
        z = tl.load(place, mask=column < end, other=float("-inf")).to(tl.float32)
        ids = FIRST + column
        allowed = _tempered(z, row_top, scale)
        score = allowed.to(tl.float64)
        if temperature > 0:
            score -= tl.log(-tl.log(uniform(key, ids)))
        # torch's argmax takes a NaN for the largest value
        score = tl.where(score == score, score, _INF)
        score = tl.where((column < end) & (ids != mask_id), score, -_INF)
        best_2, id_2 = _first_max(score, ids)
        base = tl.where(tempered & (column < end), allowed, z)
        token = tl.where(best_2 > best, id_2, token)
        best = tl.maximum(best, best_2)
        top_2, _, others_2, second_2, spread_2 = _tile_stats(base, ids, MARGIN, ENTROPY)
        top, others, second, spread = _join(
            top, others, second, spread, top_2, others_2, second_2, spread_2
        )
    place = z_ptr + row * z_stride + token - FIRST
    value = _value(place, best > float("-inf"), tempered, row_top, scale)
    place = (partial_ptr, score_ptr, id_ptr, row, split, splits)
    _store_partials(*place, top, others, second, spread, value, best, token)


@triton.jit
def _join_splits(
    partial_ptr: tl.tensor,
    row: tl.tensor,
    splits: tl.tensor,
    MARGIN: tl.constexpr,
    ENTROPY: tl.constexpr,
    SPLITS: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """The row's top (float32), others, second and spread (float64)."""
    split = tl.arange(0, SPLITS)
    inside = split < splits
    place = partial_ptr + row * splits * 5 + split
    tops = tl.load(place, mask=inside, other=float("-inf"))
    others = tl.load(place + splits, mask=inside, other=0.0).to(tl.float64)
    top, winner = _first_max(tops, split)
    loses = split != winner
    gap = (top - tops).to(tl.float64)
    weight = tl.exp(-gap)
    joining = (others + 1.0) * weight
    total = tl.sum(tl.where(loses, joining, others), axis=0)
    total = tl.where(top == -_INF, float("nan"), total)  # nothing is likely, as in row_stats
    second = top
    spread = total
    if MARGIN:
        seconds = tl.load(place + splits * 2, mask=inside, other=float("-inf"))
        second = tl.max(tl.where(loses, tops, seconds), axis=0)
    if ENTROPY:
        spreads = tl.load(place + splits * 3, mask=inside, other=0.0).to(tl.float64)
        moved = spreads * weight + joining * tl.where(weight > 0, gap, 0.0)
        spread = tl.sum(tl.where(loses, moved, spreads), axis=0)
    return top, total, second, spread


@triton.jit
def _log1p(
    x: tl.tensor,
) -> tl.tensor:
    """log(1 + x) in float64, exact where 1 + x rounds (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * x / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def _finish_kernel(
    partial_ptr: tl.tensor,
    score_ptr: tl.tensor,
    id_ptr: tl.tensor,
    token_ptr: tl.tensor,
    prob_ptr: tl.tensor,
    margin_ptr: tl.tensor,
    entropy_ptr: tl.tensor,
    splits: tl.tensor,
    MARGIN: tl.constexpr,
    ENTROPY: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    top, others, second, spread = _join_splits(partial_ptr, row, splits, MARGIN, ENTROPY, SPLITS)
    split = tl.arange(0, SPLITS)
    inside = split < splits
    scores = tl.load(score_ptr + row * splits + split, mask=inside, other=float("-inf"))
    _, winner = _first_max(scores, split)
    token = tl.load(id_ptr + row * splits + winner)
    value = tl.load(partial_ptr + (row * 5 + 4) * splits + winner)
    total = 1.0 + others
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(prob_ptr + row, tl.exp((value - top).to(tl.float64)) / total)
    if MARGIN:
        tl.store(margin_ptr + row, (1.0 - tl.exp((second - top).to(tl.float64))) / total)
    if ENTROPY:
        tl.store(entropy_ptr + row, _log1p(others) + spread / total)


def fused_row_stats(
    z: Tensor,  # [n, v] logits of this rank's ids
    params: RowParams,
    *,
    mask_id: int,
    sampled: bool,
    needs: frozenset[str],
    shard: VocabShard | None = None,
) -> TokenStats:
    """``row_stats`` of rows without top-p and top-k, without a copy of the logits.

    Nothing waits for the device, and all memory comes from torch's allocator, so the call
    may be captured in a CUDA graph.

    Args:
        z: [n, v] bfloat16, float16 or float32, last dimension contiguous.
        params: of the n rows; top_p and top_k are not looked at.
        mask_id: never proposed, but counted in the normalisation.
        sampled: rows may have a temperature above 0.
        needs: "margin" and "entropy", if they are read.
        shard: which ids they are; None: the whole vocabulary.

    Returns:
        The statistics, [n] each.

    Example:
        ``fused_row_stats(z, params, mask_id=0, sampled=False, needs=frozenset()).prob``
    """
    rows, device, wide = len(z), z.device, torch.float64
    out = TokenStats(
        token=torch.empty(rows, dtype=torch.int64, device=device),
        prob=torch.empty(rows, dtype=wide, device=device),
        margin=torch.empty(rows, dtype=wide, device=device) if "margin" in needs else None,
        entropy=torch.empty(rows, dtype=wide, device=device) if "entropy" in needs else None,
    )
    if rows == 0:
        return out
    shard = shard or VocabShard(z.shape[1])
    flags = {"MARGIN": out.margin is not None, "ENTROPY": out.entropy is not None}
    found = _partials(z, params, mask_id, sampled, shard, flags)
    if shard.ranks > 1:
        found = _exchange(*found, shard)
    splits = found[1].shape[1]
    _finish_kernel[(rows,)](
        *(*found, out.token, out.prob),
        out.prob if out.margin is None else out.margin,
        out.prob if out.entropy is None else out.entropy,
        splits,
        **flags,
        SPLITS=triton.next_power_of_2(splits),
        num_warps=1,
    )
    return out


#: partial results [n, 5, S] float32, and best score [n, S] float64 and token [n, S] int32
_Found = tuple[Tensor, Tensor, Tensor]


def _partials(
    z: Tensor,
    params: RowParams,
    mask_id: int,
    sampled: bool,
    shard: VocabShard,
    flags: dict[str, bool],
) -> _Found:
    """What this rank's splits add."""
    (rows, vocab), stride, width = z.shape, z.stride(0), shard.width
    splits = triton.cdiv(vocab, width)
    grid = (rows * splits,)
    found = (
        torch.empty((rows, _PARTIALS, splits), dtype=torch.float32, device=z.device),
        torch.empty((rows, splits), dtype=torch.float64, device=z.device),
        torch.empty((rows, splits), dtype=torch.int32, device=z.device),
    )
    # a small vocabulary needs no full tile
    tile = min(_SAMPLED_TILE if sampled else _TILE, max(triton.next_power_of_2(width), 16))
    sizes = (stride, vocab, splits)
    if not sampled:
        _greedy_kernel[grid](
            *(z, *found, *sizes, mask_id), **flags, FIRST=shard.start, SPLIT=width, TILE=tile
        )
        return found
    tops = torch.empty((rows, splits), dtype=torch.float32, device=z.device)
    _tops_kernel[grid](z, tops, *sizes, SPLIT=width, TILE=tile)
    tops = shard.join(tops[:, None]).contiguous()
    every = tops.shape[2]
    per_row = (
        params.temperature.contiguous(),
        params.tempered.contiguous().view(torch.uint8),
        params.keys.contiguous(),
    )
    _sampled_kernel[grid](
        *(z, tops, *per_row, *found, *sizes, mask_id, every),
        **flags,
        FIRST=shard.start,
        SPLIT=width,
        TILE=tile,
        SPLITS=triton.next_power_of_2(every),
    )
    return found


def _exchange(partial: Tensor, score: Tensor, token: Tensor, shard: VocabShard) -> _Found:
    """The partial results of all splits, on every rank, in one exchange."""
    halves = score[..., None].view(torch.int32).movedim(2, 1)  # [n, 2, S]
    mine = torch.cat((partial.view(torch.int32), token[:, None], halves), dim=1)
    found = shard.join(mine)
    scores = found[:, _PARTIALS + 1 :].movedim(1, 2).contiguous()  # [n, all S, 2]
    return (
        found[:, :_PARTIALS].contiguous().view(torch.float32),
        scores.view(torch.float64)[..., 0].contiguous(),
        found[:, _PARTIALS].contiguous(),
    )
