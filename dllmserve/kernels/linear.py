"""A float32 linear layer whose rows do not depend on how many of them are in the call.

cuBLAS picks its algorithm by the number of rows, so one request's bits would depend on who
else is in the batch. Here every tile sums over K in the same order, whatever the grid.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# one configuration for every shape: a choice by the number of rows is what this avoids
_ROWS, _OUTS, _DEPTH, _GROUP = 64, 64, 32, 8


@triton.jit
def _tile_of(
    program: tl.tensor,
    row_tiles: tl.tensor,
    out_tiles: tl.tensor,
    GROUP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Walk GROUP row tiles for each column of tiles, so that L2 serves what they share."""
    group = program // (GROUP * out_tiles)
    first = group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = program % (GROUP * out_tiles)
    return first + inside % height, inside // height


# the number of rows must not choose the machine code either
@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    outs: tl.tensor,
    depth: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    HAS_BIAS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    row_tile, out_tile = _tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(outs, OUTS), GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    out = out_tile * OUTS + tl.arange(0, OUTS)
    k = tl.arange(0, DEPTH)
    x_place = x_ptr + row.to(tl.int64)[:, None] * x_stride + k[None, :]
    w_place = weight_ptr + out.to(tl.int64)[None, :] * weight_stride + k[:, None]
    row_ok, out_ok = (row < rows)[:, None], (out < outs)[None, :]
    total = tl.zeros((ROWS, OUTS), dtype=tl.float32)
    for low in range(0, depth, DEPTH):
        if EVEN_DEPTH:
            x = tl.load(x_place + low, mask=row_ok, other=0.0)
            w = tl.load(w_place + low, mask=out_ok, other=0.0)
        else:
            left = depth - low
            x = tl.load(x_place + low, mask=row_ok & (k < left)[None, :], other=0.0)
            w = tl.load(w_place + low, mask=out_ok & (k < left)[:, None], other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias_ptr + out, mask=out < outs, other=0.0)[None, :]
    place = out_ptr + row.to(tl.int64)[:, None] * outs + out[None, :]
    tl.store(place, total, mask=row_ok & out_ok)


def invariant_linear(
    x: Tensor,  # [N, d] float32
    weight: Tensor,  # [out, d] float32
    bias: Tensor | None = None,  # [out] float32
) -> Tensor:
    """``x @ weight.T + bias`` in float32; a row's bits do not depend on the other rows.

    Args:
        x, weight: last dimension contiguous.

    Returns:
        [N, out] float32.

    Raises:
        TypeError: for other dtypes.

    Example:
        ``invariant_linear(x[:1], w, None)`` equals ``invariant_linear(x, w, None)[:1]``.
    """
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        raise TypeError(f"invariant_linear is for float32, got {x.dtype} and {weight.dtype}")
    (rows, depth), outs = x.shape, weight.shape[0]
    out = torch.empty((rows, outs), dtype=x.dtype, device=x.device)
    if rows:
        _linear_kernel[(triton.cdiv(rows, _ROWS) * triton.cdiv(outs, _OUTS),)](
            x,
            weight,
            weight if bias is None else bias,
            out,
            rows,
            outs,
            depth,
            x.stride(0),
            weight.stride(0),
            HAS_BIAS=bias is not None,
            EVEN_DEPTH=depth % _DEPTH == 0,
            ROWS=_ROWS,
            OUTS=_OUTS,
            DEPTH=_DEPTH,
            GROUP=_GROUP,
            num_warps=4,
            num_stages=3,
        )
    return out
