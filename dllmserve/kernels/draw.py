"""Drawing tokens in proportion to their probabilities: the largest logit after Gumbel noise.

Which token that is, is decided in float64, as ``decoding.stats`` does. Most of the work is done in
float32: only a token whose rough score is nearly the split's best can be the best, and nearly
always there is one such token. Where there are more, the split is scored exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllmserve.decoding.stats import RowParams
from dllmserve.kernels.noise import gumbel, rough_gumbel, spread
from dllmserve.parallel.vocab import VocabShard

_INF = tl.constexpr(float("inf"))
_NO_ID = tl.constexpr(0x7FFFFFFF)
#: rough scores differ by less than half of it from exact ones: 0.0025 by the noise, and a few parts
#: in 10^7 of the score by rounding
_NEAR, _NEAR_SHARE = tl.constexpr(0.006), tl.constexpr(2e-6)
#: below it rough noise may be further off
_FEW = tl.constexpr(256)
#: ids of one tile
_TILE = 1024


@triton.jit
def own_split(
    vocab: tl.tensor,
    splits: tl.tensor,
    SPLIT: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """A program's row and split, and the split's first column and the one behind its last."""
    start = (tl.program_id(0) % splits) * SPLIT
    row = (tl.program_id(0) // splits).to(tl.int64)
    return row, tl.program_id(0) % splits, start, tl.minimum(start + SPLIT, vocab)


@triton.jit
def first_max(
    values: tl.tensor,
    ids: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Largest value, which must not be NaN, and the first id that has it."""
    best = tl.max(values, axis=0)
    return best, tl.min(tl.where(values == best, ids, _NO_ID), axis=0)


@triton.jit
def row_scale(
    temperature_ptr: tl.tensor,
    row: tl.tensor,
) -> tl.tensor:
    """What the row's logits are divided by."""
    temperature = tl.load(temperature_ptr + row)
    return tl.where(temperature > 0, temperature, 1.0)


@triton.jit
def highest(
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
def temper(
    z: tl.tensor,
    top: tl.tensor,
    scale: tl.tensor,
) -> tl.tensor:
    """(z - top) / T, rounded as row_stats rounds it."""
    return ((z.to(tl.float64) - top) / scale).to(tl.float32)


@triton.jit
def leave_best(
    partial_ptr: tl.tensor,
    score_ptr: tl.tensor,
    id_ptr: tl.tensor,
    row: tl.tensor,
    split: tl.tensor,
    splits: tl.tensor,
    value: tl.tensor,
    score: tl.tensor,
    token: tl.tensor,
) -> None:
    """Store the best token of a split, its value and its score."""
    tl.store(partial_ptr + (row * 5 + 4) * splits + split, value)
    tl.store(score_ptr + row * splits + split, score.to(tl.float64))
    tl.store(id_ptr + row * splits + split, token)


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
    row, split, start, end = own_split(vocab, splits, SPLIT)
    tops = tl.full((TILE,), float("-inf"), tl.float32)
    for low in range(start, end, TILE):
        column = low + tl.arange(0, TILE)
        place = z_ptr + row * z_stride + column
        z = tl.load(place, mask=column < end, other=float("-inf")).to(tl.float32)
        tops = tl.maximum(tops, tl.where(z == z, z, -_INF))
    tl.store(tops_ptr + row * splits + split, tl.max(tops, axis=0))


@triton.jit
def _roughly(
    z_ptr: tl.tensor,  # pointer to the row
    key: tl.tensor,
    drawn: tl.tensor,  # whether the row's temperature is above 0
    row_top: tl.tensor,
    scale: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    mask_id: tl.tensor,
    FIRST: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """A column whose rough score is the largest, if no other can be as good, if all are -inf."""
    lane = tl.arange(0, TILE)
    top, share = row_top.to(tl.float32), (1.0 / scale).to(tl.float32)
    keys = key.to(tl.uint64) + spread(FIRST + start + lane)
    best = tl.full((TILE,), float("-inf"), tl.float32)
    second, at, odd = best, lane, lane * 0
    fewest = tl.full((TILE,), 0xFFFFFFFF, tl.uint32)
    for low in range(start, end, TILE):
        column = low + lane
        # beyond the end there is nothing: -inf, which never wins
        z = tl.load(z_ptr + column, mask=column < end, other=float("-inf")).to(tl.float32)
        score = (z - top) * share
        if drawn:
            noise, sure = rough_gumbel(keys)
            score += noise
            fewest = tl.minimum(fewest, sure)
            keys += spread(lane * 0 + TILE)
        # NaN, and infinities that become NaN, are scored exactly
        odd |= (score != score).to(tl.int32)
        score = tl.where(FIRST + column == mask_id, -_INF, score)
        second = tl.maximum(second, tl.minimum(best, score))
        at = tl.where(score > best, column, at)
        best = tl.maximum(best, score)
    peak = tl.max(best, axis=0)
    bound = peak - (_NEAR + _NEAR_SHARE * tl.abs(peak))
    near = (best > bound).to(tl.int32) + (second > bound).to(tl.int32)
    sure = tl.max(odd, axis=0) == 0
    none = sure & (peak == -_INF)
    sure = sure & (tl.min(fewest, axis=0) >= _FEW)
    alone = sure & (tl.sum(near, axis=0) == 1) & (peak > -_INF)
    return tl.min(tl.where(best == peak, at, _NO_ID), axis=0), alone, none


@triton.jit
def _draw_kernel(
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
    FIRST: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    row, split, start, end = own_split(vocab, splits, SPLIT)
    drawn = tl.load(temperature_ptr + row) > 0
    scale = row_scale(temperature_ptr, row)
    key = tl.load(keys_ptr + row)
    row_top = highest(tops_ptr, row, all_splits, SPLITS)
    z_ptr += row * z_stride
    column, alone, none = _roughly(
        z_ptr, key, drawn, row_top, scale, start, end, mask_id, FIRST, TILE
    )  # fmt: skip
    best = tl.full((), float("-inf"), tl.float64)
    token = tl.full((), 0, tl.int32)
    if alone:
        token = FIRST + column
        best = temper(tl.load(z_ptr + column).to(tl.float32), row_top, scale).to(tl.float64)
        if drawn:
            best += gumbel(key, token)
    else:
        for low in range(tl.where(none, end, start), end, TILE):
            place = low + tl.arange(0, TILE)
            ids = FIRST + place
            z = tl.load(z_ptr + place, mask=place < end, other=float("-inf")).to(tl.float32)
            score = temper(z, row_top, scale).to(tl.float64)
            if drawn:
                score += gumbel(key, ids)
            # torch's argmax takes a NaN for the largest value
            score = tl.where(score == score, score, _INF)
            score = tl.where((place < end) & (ids != mask_id), score, -_INF)
            best_2, id_2 = first_max(score, ids)
            token = tl.where(best_2 > best, id_2, token)
            best = tl.maximum(best, best_2)
    found = best > float("-inf")
    value = tl.load(z_ptr + token - FIRST, mask=found, other=float("-inf")).to(tl.float32)
    if tl.load(tempered_ptr + row) != 0:
        value = tl.where(found, temper(value, row_top, scale), value)
    leave_best(partial_ptr, score_ptr, id_ptr, row, split, splits, value, best, token)


def split_tops(z: Tensor, width: int) -> Tensor:
    """Largest logit of each split of ``width`` ids of rows z [n, v], NaN left out: [n, S]."""
    (rows, vocab), splits = z.shape, triton.cdiv(z.shape[1], width)
    tops = torch.empty((rows, splits), dtype=torch.float32, device=z.device)
    _tops_kernel[(rows * splits,)](
        z, tops, z.stride(0), vocab, splits, SPLIT=width, TILE=tile_of(width)
    )
    return tops


def draw_splits(
    z: Tensor,
    tops: Tensor,
    params: RowParams,
    mask_id: int,
    shard: VocabShard,
    partial: Tensor,
    score: Tensor,
    token: Tensor,
) -> None:
    """The best token of each of this rank's splits, with its score and its value.

    Args:
        z: [n, v] logits of this rank's ids.
        tops: [n, all S] float32, see :func:`split_tops`, of all ranks.
        params: of the rows.
        mask_id: never drawn.
        shard: which ids they are.
        partial: [n, 5, S] float32; the last of the five gets the value in the distribution that
            statistics are of.
        score: [n, S] float64, gets the score.
        token: [n, S] int32, gets the token.
    """
    (rows, vocab), splits, every = z.shape, score.shape[1], tops.shape[1]
    _draw_kernel[(rows * splits,)](
        *(z, tops, params.temperature.contiguous(), flags_of(params), params.keys.contiguous()),
        *(partial, score, token, z.stride(0), vocab, splits, mask_id, every),
        FIRST=shard.start,
        SPLIT=shard.width,
        TILE=tile_of(shard.width),
        SPLITS=triton.next_power_of_2(every),
    )


def drawn_tokens(
    z: Tensor,  # [n, v] logits of this rank's ids
    tops: Tensor,  # [n, all S] float32, the largest logits of all splits
    params: RowParams,
    mask_id: int,
    shard: VocabShard,
) -> Tensor:
    """A token of each row, drawn at its temperature, or the first of the likeliest: [n] int64."""
    splits = triton.cdiv(z.shape[1], shard.width)
    score = torch.empty((len(z), splits), dtype=torch.float64, device=z.device)
    token = torch.empty((len(z), splits), dtype=torch.int32, device=z.device)
    unread = torch.empty((len(z), 5, splits), dtype=torch.float32, device=z.device)
    draw_splits(z, tops, params, mask_id, shard, unread, score, token)
    score, token = (shard.join(mine[:, None])[:, 0] for mine in (score, token))
    return token.gather(1, score.argmax(dim=1, keepdim=True))[:, 0].long()


def flags_of(params: RowParams) -> Tensor:
    """Which rows' statistics are of the tempered distribution: [n] uint8."""
    return params.tempered.contiguous().view(torch.uint8)


def tile_of(width: int, most: int = _TILE) -> int:
    """Ids of a tile: a small vocabulary needs no full one."""
    power: int = triton.next_power_of_2(width)
    return min(most, max(power, 16))
