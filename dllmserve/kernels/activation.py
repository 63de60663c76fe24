"""The MLP's gate: act(gate) * up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def activate(
    x: tl.tensor,  # float32
    GELU: tl.constexpr,
) -> tl.tensor:
    """silu(x), or gelu(x) with tanh, which is ``x / (1 + exp(-2u))`` of its own u."""
    if GELU:
        # 2 * sqrt(2 / pi) * (x + 0.044715 x^3)
        return tl.div_rn(x, 1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
    return tl.div_rn(x, 1.0 + tl.exp(-x))


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
