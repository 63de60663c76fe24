"""Logits with a soft cap, and the probabilities they stand for, in one pass each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def _cap_kernel(
    z_ptr: tl.tensor,
    by_ptr: tl.tensor,
    capped_ptr: tl.tensor,
    z_stride: tl.tensor,
    vocab: tl.tensor,
    blocks: tl.tensor,
    cap: tl.tensor,
    DIVIDED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocab
    z = tl.load(z_ptr + row * z_stride + column, mask=inside, other=0.0).to(tl.float32)
    # tanh(u) = (1 - e) / (1 + e) of u's sign, with e = exp(-2 |u|), which never overflows
    e = tl.exp(-2.0 * tl.abs(z) / cap)
    size = cap * (1.0 - e) / (1.0 + e)
    if DIVIDED:
        size = tl.div_rn(size, tl.load(by_ptr + row) + tl.zeros_like(size))
    tl.store(capped_ptr + row * vocab + column, tl.where(z < 0, -size, size), mask=inside)


def capped_logits(z: Tensor, cap: float, by: Tensor | None = None) -> Tensor:
    """``cap * tanh(z / cap)`` in float32, divided by a number of each row if there is any.

    Args:
        z: [n, v] logits, last dimension contiguous.
        cap: over 0.
        by: [n] float32, contiguous.

    Returns:
        [n, v] float32.
    """
    (rows, vocab), blocks = z.shape, triton.cdiv(z.shape[1], _BLOCK)
    out = torch.empty((rows, vocab), dtype=torch.float32, device=z.device)
    if rows:
        _cap_kernel[(rows * blocks,)](
            *(z, z if by is None else by, out, z.stride(0), vocab, blocks, cap),
            DIVIDED=by is not None,
            BLOCK=_BLOCK,
        )
    return out


@triton.jit
def _shares_kernel(
    capped_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    shares_ptr: tl.tensor,
    vocab: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocab
    z = tl.load(capped_ptr + row * vocab + column, mask=inside, other=0.0)
    share = tl.exp(z - tl.load(totals_ptr + row))
    place = shares_ptr + row * vocab + column
    tl.store(place, share.to(shares_ptr.dtype.element_ty), mask=inside)


def token_shares(z: Tensor, totals: Tensor, dtype: torch.dtype) -> Tensor:
    """``exp(z - totals)``: probabilities, if totals are the logarithms of the sums of exp(z).

    Args:
        z: [n, v] float32, contiguous.
        totals: [n] float32.
        dtype: of the result.

    Returns:
        [n, v].
    """
    (rows, vocab), blocks = z.shape, triton.cdiv(z.shape[1], _BLOCK)
    out = torch.empty((rows, vocab), dtype=dtype, device=z.device)
    if rows:
        _shares_kernel[(rows * blocks,)](z, totals, out, vocab, blocks, BLOCK=_BLOCK)
    return out
