"""Numbers of eight bits by their definition: a sign, four bits of exponent, three of mantissa.

The largest is 448, the smallest step 2^-9. Ties go to the even mantissa. (OCP 8-bit floating point
specification, E4M3, as torch.float8_e4m3fn.)
"""

import torch
from torch import Tensor


def rounded(x: Tensor) -> Tensor:
    """The nearest e4m3 numbers to float64 numbers ; what is larger than 448 becomes 448."""
    _, exponent = torch.frexp(x)  # x = m 2^exponent with 0.5 <= |m| < 1
    step = torch.pow(2.0, (exponent - 4).clamp(min=-9).double())
    return (torch.round(x / step) * step).clamp(-448, 448)


def by_rows(x: Tensor) -> Tensor:
    """Rows [.., k] as they come back from e4m3, each scaled so that its largest number is 448."""
    most = x.float().abs().amax(dim=-1, keepdim=True)
    most = most.clamp(min=1e-30)
    by = (1 / most) * 448
    return rounded((x.float() * by).double()) * (most * (1 / 448)).double()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` with both in e4m3, summed in float64."""
    out = by_rows(x) @ by_rows(weight).T
    return (out if bias is None else out + bias.double()).to(x.dtype)
