"""The MLP's gate: act(gate) * up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllmserve.kernels.e4m3 import Scaled
from dllmserve.kernels.scaled import room_for, store_scaled, warps_for

_BLOCK = 1024


@triton.jit
def activate(
    x: tl.tensor,  # float32
    GELU: tl.constexpr,
    FAST: tl.constexpr = False,
) -> tl.tensor:
    """silu(x), or gelu(x) with tanh, which is ``x / (1 + exp(-2u))`` of its own u.

    FAST divides with two units in the last place of float32, of which eight bits keep nothing.
    """
    if GELU:
        # 2 * sqrt(2 / pi) * (x + 0.044715 x^3)
        below = 1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    else:
        below = 1.0 + tl.exp(-x)
    return x / below if FAST else tl.div_rn(x, below)


@triton.jit
def _gated_kernel(
    wide_ptr: tl.tensor,
    out_ptr: tl.tensor,
    wide_stride: tl.tensor,
    width: tl.tensor,
    blocks: tl.tensor,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = wide_ptr + row * wide_stride + column
    gate = tl.load(place, mask=inside, other=0.0)
    up = tl.load(place + width, mask=inside, other=0.0)
    # rounded to the dtype before the product, as the two torch calls do
    act = activate(gate.to(tl.float32), GELU).to(gate.dtype)
    out = (act.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    tl.store(out_ptr + row * width + column, out, mask=inside)


@triton.jit
def _gated_row_kernel(
    wide_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    wide_stride: tl.tensor,
    width: tl.tensor,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A whole row, whose largest number has to be known before it is stored in e4m3."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    place = wide_ptr + row * wide_stride + columns
    gate = tl.load(place, mask=inside, other=0.0)
    up = tl.load(place + width, mask=inside, other=0.0)
    out = activate(gate.to(tl.float32), GELU, FAST=True) * up.to(tl.float32)
    store_scaled(out_ptr + row * width, scale_ptr + row, out, columns, inside)


def gated_scaled(gate_up: Tensor, activation: str = "silu") -> Scaled:
    """``gated`` in e4m3.

    Args:
        gate_up: [N, 2m], gate in the first half, last dimension contiguous.
        activation: "silu" or "gelu_tanh".

    Returns:
        [N, m].
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = room_for(rows, width, gate_up)
    block = triton.next_power_of_2(width)
    if rows:
        _gated_row_kernel[(rows,)](
            *(gate_up, out.data, out.scale, gate_up.stride(0), width),
            GELU=activation == "gelu_tanh",
            BLOCK=block,
            num_warps=warps_for(block),
        )
    return out


def gated(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """``act(gate) * up`` of the fused product.

    Args:
        gate_up: [N, 2m], gate in the first half, last dimension contiguous.
        activation: "silu" or "gelu_tanh".

    Returns:
        [N, m] of the same dtype.

    Example:
        ``hidden = gated(F.linear(x, gate_up_weight))``
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    blocks = triton.cdiv(width, _BLOCK)
    if rows:
        _gated_kernel[(rows * blocks,)](
            *(gate_up, out, gate_up.stride(0), width, blocks),
            GELU=activation == "gelu_tanh",
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out
