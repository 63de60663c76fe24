"""Residual addition and RMS normalisation in one pass over the row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_rms_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
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
    tl.store(out_ptr + row * width + columns, out, mask=inside)


def add_rms_norm(
    x: Tensor,  # [N, d]
    residual: Tensor | None,  # [N, d]
    weight: Tensor,  # [d]
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``h = x + residual`` and ``rms_norm(h)``, rounded as the two torch calls round.

    A row's result does not depend on the other rows.

    Args:
        x: [N, d] what a sublayer adds, last dimension contiguous.
        residual: [N, d] of x's dtype, or None if x alone is normalised. The sum is written
            into it.
        weight: [d] of the norm.

    Returns:
        rms_norm(h) [N, d], and h [N, d]: ``residual`` itself, or ``x`` if that was None.

    Example:
        ``normed, h = add_rms_norm(attention_out, h, weight, 1e-5)``
    """
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    h = x if residual is None else residual
    if rows:
        block = triton.next_power_of_2(width)
        _add_rms_norm_kernel[(rows,)](
            x,
            h,
            weight,
            out,
            x.stride(0),
            h.stride(0),
            width,
            eps,
            HAS_RESIDUAL=residual is not None,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 8),
            enable_fp_fusion=False,  # torch rounds after every operation
        )
    return out, h
