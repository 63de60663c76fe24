"""Statistics of logit rows in one pass: the fused twin of ``decoding.stats.row_stats``.

The vocabulary is cut into splits, one program each, whose partial results a second kernel
joins. The cut depends on the vocabulary's size alone, so a row's bits do not depend on how
many rows are in the call, nor on how many ranks share the vocabulary: those exchange partial
results between the two kernels. Definitions, and what happens to NaN and infinities, are those
of ``row_stats``: the top logit is left out of every sum exactly, never subtracted again.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllmserve.decoding.stats import RowParams, TokenStats
from dllmserve.kernels.draw import (
    draw_splits,
    drawn_tokens,
    first_max,
    flags_of,
    highest,
    leave_best,
    own_split,
    row_scale,
    split_tops,
    temper,
    tile_of,
)
from dllmserve.parallel.vocab import VocabShard

#: ids of one tile
_TILE = 2048
#: partial results of a split, besides its best token's id and score: top, others, second,
#: spread, the best token's value
_PARTIALS = 5

_INF = tl.constexpr(float("inf"))


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
    top, top_id = first_max(clean, ids)
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
def _stats_kernel(
    z_ptr: tl.tensor,
    tops_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    tempered_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    score_ptr: tl.tensor,
    id_ptr: tl.tensor,
    z_stride: tl.tensor,
    vocab: tl.tensor,
    splits: tl.tensor,
    mask_id: tl.tensor,
    all_splits: tl.tensor,
    SAMPLED: tl.constexpr,  # rows may be drawn, by another kernel, and may be tempered
    MARGIN: tl.constexpr,
    ENTROPY: tl.constexpr,
    FIRST: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    row, split, start, end = own_split(vocab, splits, SPLIT)
    if SAMPLED:
        scale = row_scale(temperature_ptr, row)
        tempered = tl.load(tempered_ptr + row) != 0
        row_top = highest(tops_ptr, row, all_splits, SPLITS)
    top = tl.full((), float("-inf"), tl.float32)
    others = tl.full((), 0.0, tl.float32)
    second, spread, best = top, others, top
    token = tl.full((), 0, tl.int32)
    for low in range(start, end, TILE):
        column = low + tl.arange(0, TILE)
        place = z_ptr + row * z_stride + column
        z = tl.load(place, mask=column < end, other=float("-inf")).to(tl.float32)
        ids = FIRST + column
        if SAMPLED:
            if tempered:
                z = tl.where(column < end, temper(z, row_top, scale), z)
        top_2, id_2, others_2, second_2, spread_2 = _tile_stats(z, ids, MARGIN, ENTROPY)
        if not SAMPLED:
            best_2 = top_2
            if id_2 == mask_id:  # never proposed
                best_2, id_2 = first_max(tl.where((ids != mask_id) & (z == z), z, -_INF), ids)
            token = tl.where(best_2 > best, id_2, token)
            best = tl.maximum(best, best_2)
        top, others, second, spread = _join(
            top, others, second, spread, top_2, others_2, second_2, spread_2
        )
    base = partial_ptr + row * splits * 5 + split
    tl.store(base, top)
    tl.store(base + splits, others)
    tl.store(base + splits * 2, second)
    tl.store(base + splits * 3, spread)
    if not SAMPLED:
        leave_best(partial_ptr, score_ptr, id_ptr, row, split, splits, best, best, token)


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
    top, winner = first_max(tops, split)
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
    _, winner = first_max(scores, split)
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
        needs: "margin" and "entropy", if they are read; "noise" for the likeliest tokens with
            drawn ones beside them.
        shard: which ids they are; None: the whole vocabulary.

    Returns:
        The statistics, [n] each.

    Example:
        ``fused_row_stats(z, params, mask_id=0, sampled=False, needs=frozenset()).prob``
    """
    shard = shard or VocabShard(z.shape[1])
    beside = "noise" in needs
    stats, partial = _row_stats(z, params, mask_id, sampled and not beside, needs, shard)
    if not beside:
        return stats
    if not sampled or not len(z):
        return replace(stats, drawn=stats.token)
    tops = partial[:, 0].contiguous()
    return replace(stats, drawn=drawn_tokens(z, tops, params, mask_id, shard))


def _row_stats(
    z: Tensor,
    params: RowParams,
    mask_id: int,
    sampled: bool,
    needs: frozenset[str],
    shard: VocabShard,
) -> tuple[TokenStats, Tensor]:
    """Statistics, and what all splits gave for them: [n, 5, S] float32."""
    rows, device, wide = len(z), z.device, torch.float64
    out = TokenStats(
        token=torch.empty(rows, dtype=torch.int64, device=device),
        prob=torch.empty(rows, dtype=wide, device=device),
        margin=torch.empty(rows, dtype=wide, device=device) if "margin" in needs else None,
        entropy=torch.empty(rows, dtype=wide, device=device) if "entropy" in needs else None,
    )
    flags = {"MARGIN": out.margin is not None, "ENTROPY": out.entropy is not None}
    found = _partials(z, params, mask_id, sampled, shard, flags)
    if shard.ranks > 1 and rows:
        found = _exchange(*found, shard)
    splits = found[1].shape[1]
    if rows:
        _finish_kernel[(rows,)](
            *(*found, out.token, out.prob),
            out.prob if out.margin is None else out.margin,
            out.prob if out.entropy is None else out.entropy,
            splits,
            **flags,
            SPLITS=triton.next_power_of_2(splits),
            num_warps=1,
        )
    return out, found[0]


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
    (rows, vocab), width = z.shape, shard.width
    splits = triton.cdiv(vocab, width)
    found = (
        torch.empty((rows, _PARTIALS, splits), dtype=torch.float32, device=z.device),
        torch.empty((rows, splits), dtype=torch.float64, device=z.device),
        torch.empty((rows, splits), dtype=torch.int32, device=z.device),
    )
    if not rows:
        return found
    tops = found[0]  # not read
    if sampled:
        tops = shard.join(split_tops(z, width)[:, None])[:, 0].contiguous()
        draw_splits(z, tops, params, mask_id, shard, *found)
    every = tops.shape[-1]
    _stats_kernel[(rows * splits,)](
        *(z, tops, params.temperature.contiguous(), flags_of(params), *found),
        *(z.stride(0), vocab, splits, mask_id, every),
        SAMPLED=sampled,
        **flags,
        FIRST=shard.start,
        SPLIT=width,
        TILE=tile_of(width, _TILE),
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
