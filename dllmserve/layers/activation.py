"""The MLP's activation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def silu(x: Tensor) -> Tensor:
    """``x / (1 + exp(-x))``; in float32 an element's bits do not depend on its place.

    torch's own SiLU rounds differently on a CPU in the elements that are left over when a row
    is cut into vectors, so numbers would depend on which part of the MLP a rank has. Its
    ``exp`` rounds alike everywhere, and addition and division are exactly defined.

    Args:
        x: any shape and floating dtype; it is not changed.

    Returns:
        A new tensor of the same shape and dtype.

    Example:
        ``silu(x)[3:5]`` equals ``silu(x[3:5])``, bit for bit.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return F.silu(x)
    below = x.neg().exp_().add_(1.0)
    return torch.div(x, below, out=below)
