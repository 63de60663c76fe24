"""RMS normalisation, and the additions before it, in one pass over the row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllmserve.kernels.e4m3 import Scaled
from dllmserve.kernels.scaled import room_for, store_scaled


@triton.jit
def _add_rms_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    h = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    dtype = h.dtype
    if HAS_RESIDUAL:
        place = residual_ptr + row * residual_stride + columns
        old = tl.load(place, mask=inside, other=0.0)
        # what is normalised is what later layers read: the sum as it is stored
        h = (old.to(tl.float32) + h.to(tl.float32)).to(dtype)
        tl.store(place, h, mask=inside)
    wide = h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    normed = (wide * scale).to(dtype)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    out = (normed.to(tl.float32) * weight.to(tl.float32)).to(dtype)
    if SCALES:
        own = out.to(tl.float32)
        store_scaled(out_ptr + row * width, scale_ptr + row, own, columns, inside)
    else:
        tl.store(out_ptr + row * width + columns, out, mask=inside)


def add_rms_norm(
    x: Tensor,  # [N, d]
    residual: Tensor | None,  # [N, d]
    weight: Tensor,  # [d]
    eps: float,
    scales: bool = False,
) -> tuple[Tensor | Scaled, Tensor]:
    """``h = x + residual`` and ``rms_norm(h)``, rounded as the two torch calls round.

    A row's result does not depend on the other rows.

    Args:
        x: [N, d] what a sublayer adds, last dimension contiguous.
        residual: [N, d] of x's dtype, or None if x alone is normalised. The sum is written
            into it.
        weight: [d] of the norm.
        scales: give the norm in e4m3.

    Returns:
        rms_norm(h) [N, d], and h [N, d]: ``residual`` itself, or ``x`` if that was None.

    Example:
        ``normed, h = add_rms_norm(attention_out, h, weight, 1e-5)``
    """
    rows, width = x.shape
    narrow = room_for(rows, width, x) if scales else None
    wide = x if narrow is not None else torch.empty((rows, width), dtype=x.dtype, device=x.device)
    out, scale = (wide, weight) if narrow is None else (narrow.data, narrow.scale)
    h = x if residual is None else residual
    if rows:
        block = triton.next_power_of_2(width)
        _add_rms_norm_kernel[(rows,)](
            *(x, h, weight, out, scale, x.stride(0), h.stride(0), width, eps),
            HAS_RESIDUAL=residual is not None,
            SCALES=scales,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 8),
            enable_fp_fusion=False,  # torch rounds after every operation
        )
    return wide if narrow is None else narrow, h


@triton.jit
def _normed(
    x: tl.tensor,  # [BLOCK] float32, 0 outside
    weight_ptr: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
) -> tl.tensor:
    """``x / rms(x) * weight`` in float32."""
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0)
    return x * scale * weight.to(tl.float32)


@triton.jit
def _sandwich_kernel(
    first_ptr: tl.tensor,
    second_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    scalars_ptr: tl.tensor,
    first_weight_ptr: tl.tensor,
    second_weight_ptr: tl.tensor,
    after_weight_ptr: tl.tensor,
    a_weight_ptr: tl.tensor,
    b_weight_ptr: tl.tensor,
    c_weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first_stride: tl.tensor,
    second_stride: tl.tensor,
    residual_stride: tl.tensor,
    scalar_stride: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    a_factor: tl.tensor,
    b_factor: tl.tensor,
    c_factor: tl.tensor,
    BRANCHES: tl.constexpr,
    SCALED: tl.constexpr,
    THEN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    loaded = tl.load(first_ptr + row * first_stride + columns, mask=inside, other=0.0)
    # rounded to the dtype after every operation, as torch's calls do
    dtype = loaded.dtype
    added = loaded.to(tl.float32)
    if BRANCHES:
        place = second_ptr + row * second_stride + columns
        second = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        first = _normed(added, first_weight_ptr, columns, width, eps).to(dtype).to(tl.float32)
        second = _normed(second, second_weight_ptr, columns, width, eps).to(dtype).to(tl.float32)
        added = (first + second).to(dtype).to(tl.float32)
    added = _normed(added, after_weight_ptr, columns, width, eps).to(dtype).to(tl.float32)
    place = residual_ptr + row * residual_stride + columns
    h = (tl.load(place, mask=inside, other=0.0).to(tl.float32) + added).to(dtype)
    if SCALED:
        scalar = tl.load(scalars_ptr + row * scalar_stride).to(tl.float32)
        h = (h.to(tl.float32) * scalar).to(dtype)
    tl.store(place, h, mask=inside)
    wide = h.to(tl.float32)
    to = out_ptr + row * width + columns
    a = _normed(wide, a_weight_ptr, columns, width, eps) * a_factor
    tl.store(to, a.to(dtype), mask=inside)
    behind = tl.num_programs(0).to(tl.int64) * width
    if THEN > 1:
        b = _normed(wide, b_weight_ptr, columns, width, eps) * b_factor
        tl.store(to + behind, b.to(dtype), mask=inside)
    if THEN > 2:
        c = _normed(wide, c_weight_ptr, columns, width, eps) * c_factor
        tl.store(to + 2 * behind, c.to(dtype), mask=inside)


def sandwich_norms(
    outs: Sequence[Tensor],  # [N, d] each
    residual: Tensor,  # [N, d]
    branches: Sequence[Tensor],  # [d] each
    after: Tensor,  # [d]
    then: Sequence[Tensor],  # [d] each
    factors: Sequence[float],
    eps: float,
    scalars: Tensor | None = None,  # [N]
) -> list[Tensor]:
    """Norms around an addition to the residual stream, in one pass over the row.

    See :meth:`dllmserve.layers.ops.LayerOps.sandwich`. A row's result does not depend on the other
    rows.

    Args:
        outs: one or two, all of one dtype, last dimension contiguous.
        residual: the sum is written into it.
        branches: weights of as many norms as there are outs, or none of one out.
        after: of the norm of what is added.
        then: of up to three norms of the sum.
        factors: of each of these.
        eps: of all.
        scalars: a factor of each row's sum.

    Returns:
        [N, d] for each weight in ``then``.
    """
    rows, width = residual.shape
    out = torch.empty((len(then), rows, width), dtype=residual.dtype, device=residual.device)
    first, second = outs[0], outs[-1]
    block = triton.next_power_of_2(width)
    if rows:
        _sandwich_kernel[(rows,)](
            *(first, second, residual, residual if scalars is None else scalars),
            *(tuple(branches) or (after, after)),
            after,
            *(*then, after, after)[:3],
            out,
            *(first.stride(0), second.stride(0), residual.stride(0)),
            *(0 if scalars is None else scalars.stride(0), width, eps),
            *(*factors, 1.0, 1.0)[:3],
            BRANCHES=len(branches) > 0,
            SCALED=scalars is not None,
            THEN=len(then),
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 8),
            enable_fp_fusion=False,  # torch rounds after every operation
        )
    return list(out.unbind(0))


@triton.jit
def _wide_rms_norm_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    heads: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    place = x_ptr + row * row_stride + head * head_stride + columns
    x = tl.load(place, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    if WEIGHT:
        wide = _normed(wide, weight_ptr, columns, width, eps)
    else:
        wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    to = out_ptr + tl.program_id(0).to(tl.int64) * width + columns
    tl.store(to, wide.to(x.dtype), mask=inside)


def wide_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x / rms(x) * weight`` of the last dimension, in float32 and cast once.

    Args:
        x: [N, d] or [N, H, d], last dimension contiguous.
        weight: [d]; None for ones.

    Returns:
        A new tensor of x's shape and dtype.

    Example:
        ``values = wide_rms_norm(qkv[:, count:], None, 1e-6)``
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width, heads = x.shape[-1], x.shape[1] if x.dim() == 3 else 1
    block = triton.next_power_of_2(width)
    if x.numel():
        _wide_rms_norm_kernel[(x.shape[0] * heads,)](
            *(x, x if weight is None else weight, out),
            *(x.stride(0), x.stride(1) if x.dim() == 3 else 0, heads, width, eps),
            WEIGHT=weight is not None,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 8),
            enable_fp_fusion=False,  # torch rounds after every operation
        )
    return out
