"""Norms of heads and rotary position embedding in place; the kernel looks up the tables' rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

#: (head, pair) elements of one program
_ELEMENTS = 1024


@triton.jit
def _normed(x: tl.tensor, dtype: tl.constexpr, WIDE: tl.constexpr) -> tl.tensor:
    """What is multiplied by a norm's weight, as torch's calls round it."""
    if WIDE:
        return x
    return x.to(dtype).to(tl.float32)


@triton.jit
def _rotate_kernel(
    heads_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    count: tl.tensor,
    half: tl.tensor,
    behind: tl.tensor,
    queries: tl.tensor,
    eps: tl.tensor,
    NORM: tl.constexpr,
    WIDE: tl.constexpr,  # cast behind the weight, not before it as well
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BEHIND: tl.constexpr,  # dimensions that are normalised and not rotated, in tl.arange's sizes
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    position = tl.load(positions_ptr + row)
    cos = tl.load(cos_ptr + position * half + pair, mask=pair < half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * half + pair, mask=pair < half, other=0.0)[None, :]
    inside = (head < count)[:, None] & (pair < half)[None, :]
    place = heads_ptr + row * row_stride + head[:, None] * head_stride + pair[None, :]
    first = tl.load(place, mask=inside, other=0.0)
    second = tl.load(place + half, mask=inside, other=0.0)
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        squares = tl.sum(first * first + second * second, axis=1)
        if BEHIND:
            dim = 2 * half + tl.arange(0, BEHIND)
            within = (head < count)[:, None] & (dim < 2 * half + behind)[None, :]
            rest_place = heads_ptr + row * row_stride + head[:, None] * head_stride + dim[None, :]
            rest = tl.load(rest_place, mask=within, other=0.0).to(tl.float32)
            squares += tl.sum(rest * rest, axis=1)
        scale = tl.rsqrt(squares / (2 * half + behind) + eps)[:, None]
        if BEHIND:
            query, key = (head < queries)[:, None] & within, (head >= queries)[:, None] & within
            weight = tl.load(query_ptr + dim[None, :], mask=query, other=0.0).to(tl.float32)
            weight += tl.load(key_ptr + dim[None, :], mask=key, other=0.0).to(tl.float32)
            rest = _normed(rest * scale, dtype, WIDE) * weight
            tl.store(rest_place, rest.to(dtype), mask=within)
        # a head's weight is the queries' or the keys'
        query, key = (head < queries)[:, None] & inside, (head >= queries)[:, None] & inside
        low = tl.load(query_ptr + pair[None, :], mask=query, other=0.0).to(tl.float32)
        low += tl.load(key_ptr + pair[None, :], mask=key, other=0.0).to(tl.float32)
        high = tl.load(query_ptr + half + pair[None, :], mask=query, other=0.0).to(tl.float32)
        high += tl.load(key_ptr + half + pair[None, :], mask=key, other=0.0).to(tl.float32)
        first = (_normed(first * scale, dtype, WIDE) * low).to(dtype).to(tl.float32)
        second = (_normed(second * scale, dtype, WIDE) * high).to(dtype).to(tl.float32)
    tl.store(place, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(place + half, (second * cos + first * sin).to(dtype), mask=inside)


def rotate_(
    heads: Tensor,  # [N, H, D]
    cos: Tensor,  # [max_len, r/2] float32
    sin: Tensor,  # [max_len, r/2] float32
    positions: Tensor,  # [N] int64
    count: int,
    norms: tuple[Tensor, Tensor, int, float, bool] | None = None,
) -> None:
    """Rotate the first ``count`` heads in place, in float32, and cast back.

    The tables say how many of the first dimensions are rotated; those behind them stay. If there
    are norms, whole heads are normalised first, rounded as torch's calls round.

    Args:
        heads: [N, H, D], last dimension contiguous; a view of the fused q, k, v product.
        cos, sin: contiguous tables, row p for position p.
        positions: [N], each below max_len.
        norms: weights [D] of the queries and of the keys, number of query heads, which come first,
            epsilon, and whether they cast behind the weight; see
            :class:`dllmserve.layers.ops.HeadNorms`.

    Example:
        ``rotate_(qkv.view(n, -1, 128), cos, sin, positions, num_heads + num_kv_heads)``
    """
    rows, _, dim = heads.shape
    if rows == 0 or count == 0:
        return
    query, key, queries, eps, wide = (cos, cos, 0, 0.0, False) if norms is None else norms
    half = cos.shape[1]
    behind = dim - 2 * half
    half_block = triton.next_power_of_2(half)
    per_program = min(triton.next_power_of_2(count), max(_ELEMENTS // half_block, 1))
    _rotate_kernel[(rows, triton.cdiv(count, per_program))](
        heads,
        cos,
        sin,
        positions,
        query,
        key,
        heads.stride(0),
        heads.stride(1),
        count,
        half,
        behind,
        queries,
        eps,
        NORM=norms is not None,
        WIDE=wide,
        HEADS=per_program,
        HALF=half_block,
        BEHIND=triton.next_power_of_2(behind) if behind and norms is not None else 0,
        num_warps=4,
        enable_fp_fusion=False,  # torch rounds after every operation
    )
