"""The MLP's gate: act(gate) * up."""

from __future__ import annotations

from math import pi, sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


#: of GELU by tanh, as x / (1 + exp(slope (x + 0.044715 x^3)))
_SLOPE = tl.constexpr(-2.0 * sqrt(2.0 / pi))


@triton.jit
def activated(x: tl.tensor, GELU: tl.constexpr) -> tl.tensor:
    """SiLU, or GELU by tanh, of float32."""
    below = -x
    if GELU:
        below = (x * x * 0.044715 + 1.0) * x * _SLOPE
    return tl.div_rn(x, 1.0 + tl.exp(below))


@triton.jit
def _act_mul_kernel(
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
    x = gate.to(tl.float32)
    # rounded to the dtype before the product, as the two torch calls do
    act = activated(x, GELU).to(gate.dtype)
    out = (act.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    tl.store(out_ptr + row * width + column, out, mask=inside)


def act_mul(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """``act(gate) * up`` of the fused product.

    Args:
        gate_up: [N, 2m], gate in the first half, last dimension contiguous.
        activation: "silu" or "gelu_tanh".

    Returns:
        [N, m] of the same dtype.

    Example:
        ``hidden = act_mul(F.linear(x, gate_up_weight))``
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    blocks = triton.cdiv(width, _BLOCK)
    if rows:
        _act_mul_kernel[(rows * blocks,)](
            *(gate_up, out, gate_up.stride(0), width, blocks),
            GELU=activation == "gelu_tanh",
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,  # torch rounds after every operation
        )
    return out
