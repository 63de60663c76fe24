"""Rotary position embedding, half-split layout (first half rotates with the second)."""

from __future__ import annotations

import torch
from torch import Tensor


class Rotary:
    """cos and sin tables in float32 for positions ``0 .. max_len - 1``.

    Example:
        >>> rotary = Rotary(head_dim=64, theta=1e4, max_len=128, device=torch.device("cpu"))
        >>> q = torch.zeros(3, 2, 64)
        >>> cos, sin = rotary.at(torch.tensor([0, 1, 2]))
        >>> rotary.rotate(q, cos, sin).shape
        torch.Size([3, 2, 64])
    """

    def __init__(self, head_dim: int, theta: float, max_len: int, device: torch.device) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        inv_freq = 1.0 / (theta**exponents)  # [D/2]
        angles = torch.outer(torch.arange(max_len, dtype=torch.float32, device=device), inv_freq)
        self._cos = angles.cos()  # [max_len, D/2] float32
        self._sin = angles.sin()

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Cos and sin of all positions, [max_len, D/2] float32 each."""
        return self._cos, self._sin

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the tables for ``positions`` [N] int64: two tensors [N, 1, D/2]."""
        return self._cos[positions][:, None, :], self._sin[positions][:, None, :]

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate ``x`` [N, H, D] in float32 and cast back to its dtype."""
        half = x.shape[-1] // 2
        first, second = x[..., :half].float(), x[..., half:].float()
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned.to(x.dtype)
