"""Rows in e4m3, and products of few of them: see :mod:`dllmserve.kernels.e4m3`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllmserve.kernels.e4m3 import E4M3, LEAST, MOST, SHARE, Scaled

_MOST, _SHARE, _LEAST = tl.constexpr(MOST), tl.constexpr(SHARE), tl.constexpr(LEAST)
#: rows up to which products are ours; above, torch's library is faster. Measured on an H200 with
#: matrices of 4,096 to 24,576 rows and columns
FEW_ROWS, FEW_ROWS_NARROW = 64, 128
#: outputs of a matrix that is narrow: its tiles do not fill the device, so sums are cut in two
_NARROW = 8192


@triton.jit
def store_scaled(
    out_ptr: tl.tensor,  # pointer to the row
    scale_ptr: tl.tensor,  # pointer to its factor
    value: tl.tensor,  # [BLOCK] float32, 0 outside
    columns: tl.tensor,
    inside: tl.tensor,
) -> None:
    """Store a row in e4m3, and its factor."""
    most = tl.maximum(tl.max(tl.abs(value), axis=0), _LEAST)
    found = value * (tl.div_rn(1.0, most) * _MOST)
    tl.store(out_ptr + columns, found.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr, most * _SHARE)


@triton.jit
def _scale_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    x_stride: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    store_scaled(out_ptr + row * width, scale_ptr + row, x, columns, inside)


def room_for(rows: int, width: int, like: Tensor) -> Scaled:
    """An uninitialised [rows, width] of what ``like`` is in otherwise."""
    data = torch.empty((rows, width), dtype=E4M3, device=like.device)
    scale = torch.empty(rows, dtype=torch.float32, device=like.device)
    return Scaled(data, scale, like.dtype)


def warps_for(block: int) -> int:
    """Warps of a program that holds a row of ``block`` numbers."""
    return min(max(block // 512, 1), 16)


def scale_rows(x: Tensor) -> Scaled:
    """Rows x [N, d] in e4m3, last dimension contiguous: ``kernels.e4m3.scaled`` in one pass."""
    rows, width = x.shape
    out = room_for(rows, width, x)
    block = triton.next_power_of_2(width)
    if rows:
        _scale_kernel[(rows,)](
            *(x, out.data, out.scale, x.stride(0), width),
            BLOCK=block,
            num_warps=warps_for(block),
        )
    return out


# numbers of tokens must not choose the machine code
@triton.jit(do_not_specialize=["num_rows"])
def _few_kernel(
    x_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    parts_ptr: tl.tensor,  # [CUT, num_rows, outs] float32
    turns_ptr: tl.tensor,  # [tiles] int32, zeros, and zeros again afterwards
    num_rows: tl.tensor,
    outs: tl.tensor,
    depth: tl.tensor,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    CUT: tl.constexpr,
) -> None:
    """A tile of the product, or one of CUT parts of its sum; the last to be done adds them up."""
    tile, part = tl.program_id(0) // CUT, tl.program_id(0) % CUT
    row_tiles = tl.cdiv(num_rows, ROWS)
    row = (tile % row_tiles) * ROWS + tl.arange(0, ROWS)
    out = (tile // row_tiles) * OUTS + tl.arange(0, OUTS)
    k = tl.arange(0, DEPTH)
    row_ok, out_ok = row < num_rows, out < outs
    share = tl.cdiv(tl.cdiv(depth, CUT), DEPTH) * DEPTH
    low = part * share
    x_at = x_ptr + row.to(tl.int64)[:, None] * depth + k[None, :]
    w_at = weight_ptr + out.to(tl.int64)[:, None] * depth + k[None, :]
    total = tl.zeros((OUTS, ROWS), dtype=tl.float32)
    for at in range(low, tl.minimum(low + share, depth), DEPTH):
        if EVEN:
            x = tl.load(x_at + at, mask=row_ok[:, None], other=0.0)
            w = tl.load(w_at + at, mask=out_ok[:, None], other=0.0)
        else:
            x = tl.load(x_at + at, mask=row_ok[:, None] & (k < depth - at)[None, :], other=0.0)
            w = tl.load(w_at + at, mask=out_ok[:, None] & (k < depth - at)[None, :], other=0.0)
        # weights come first: with few rows the matrix units want the longer side there
        total = tl.dot(w, tl.trans(x), total)
    place = row.to(tl.int64)[None, :] * outs + out[:, None]
    ok = row_ok[None, :] & out_ok[:, None]
    if CUT > 1:
        size = num_rows.to(tl.int64) * outs
        tl.store(parts_ptr + part * size + place, total, mask=ok)
        tl.debug_barrier()
        turn = tl.atomic_add(turns_ptr + tile, 1, sem="acq_rel")
        if turn != CUT - 1:
            return
        tl.store(turns_ptr + tile, 0)
        # in order, whoever is last
        total = tl.load(parts_ptr + place, mask=ok, other=0.0, volatile=True)
        for other in tl.static_range(1, CUT):
            total += tl.load(parts_ptr + other * size + place, mask=ok, other=0.0, volatile=True)
    x_scale = tl.load(x_scale_ptr + row, mask=row_ok, other=0.0)
    scale = tl.load(scale_ptr + out, mask=out_ok, other=0.0)
    found = total * x_scale[None, :] * scale[:, None]
    if BIAS:
        found += tl.load(bias_ptr + out, mask=out_ok, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + place, found.to(out_ptr.dtype.element_ty), mask=ok)


def few_rows_product(x: Scaled, weight: Scaled, bias: Tensor | None, turns: Tensor) -> Tensor:
    """``x @ weight.T + bias`` of few rows, which takes as long as reading the weight.

    Args:
        x: [N, k].
        weight: [out, k].
        bias: [out], or None.
        turns: [T] int32 zeros, which launches that follow one another may share; of a product with
            more tiles no sum is cut.

    Returns:
        [N, out] of the weight's dtype.
    """
    (rows, depth), outs = x.shape, weight.shape[0]
    out = torch.empty((rows, outs), dtype=weight.dtype, device=weight.data.device)
    tall = min(max(triton.next_power_of_2(rows), 16), 64)
    tiles = triton.cdiv(rows, tall) * triton.cdiv(outs, 64)
    cut = 2 if outs < _NARROW and tiles <= len(turns) else 1
    parts = torch.empty((cut, rows, outs), dtype=torch.float32, device=out.device) if cut > 1 else x
    if rows:
        _few_kernel[(tiles * cut,)](
            *(x.data, x.scale, weight.data, weight.scale, out if bias is None else bias, out),
            *(parts.data if isinstance(parts, Scaled) else parts, turns, rows, outs, depth),
            BIAS=bias is not None,
            EVEN=depth % (256 * cut) == 0,
            ROWS=tall,
            OUTS=64,
            DEPTH=256,
            CUT=cut,
            num_warps=4,
            num_stages=4 if cut > 1 and tall <= 32 else 3,
        )
    return out


def takes_few_rows(x: Scaled, weight: Scaled) -> bool:
    """True where :func:`few_rows_product` is to be used, or torch's library cannot be."""
    rows, outs = len(x.data), weight.shape[0]
    # the library's tiles want rows of 16 bytes
    odd = weight.shape[1] % 16 != 0 or outs % 16 != 0
    return odd or rows <= (FEW_ROWS_NARROW if outs < _NARROW else FEW_ROWS)
