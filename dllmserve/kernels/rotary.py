"""Rotary position embedding in place, with the tables' rows looked up in the kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

#: (head, pair) elements of one program
_ELEMENTS = 1024


@triton.jit
def _rotate_kernel(
    heads_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    count: tl.tensor,
    half: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
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
    tl.store(place, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(place + half, (second * cos + first * sin).to(dtype), mask=inside)


def rotate_(
    heads: Tensor,  # [N, H, D]
    cos: Tensor,  # [max_len, D/2] float32
    sin: Tensor,  # [max_len, D/2] float32
    positions: Tensor,  # [N] int64
    count: int,
) -> None:
    """Rotate the first ``count`` heads in place, in float32, and cast back.

    Args:
        heads: [N, H, D], last dimension contiguous; a view of the fused q, k, v product.
        cos, sin: contiguous tables, row p for position p.
        positions: [N], each below max_len.

    Example:
        ``rotate_(qkv.view(n, -1, 128), cos, sin, positions, num_heads + num_kv_heads)``
    """
    rows, _, dim = heads.shape
    if rows == 0 or count == 0:
        return
    half_block = triton.next_power_of_2(dim // 2)
    per_program = min(triton.next_power_of_2(count), max(_ELEMENTS // half_block, 1))
    _rotate_kernel[(rows, triton.cdiv(count, per_program))](
        heads,
        cos,
        sin,
        positions,
        heads.stride(0),
        heads.stride(1),
        count,
        dim // 2,
        HEADS=per_program,
        HALF=half_block,
        num_warps=4,
        enable_fp_fusion=False,  # torch rounds after every operation
    )
