"""TritonOps: what a decoder layer computes besides attention, in Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dllmserve.kernels.activation import silu_mul
from dllmserve.kernels.linear import invariant_linear
from dllmserve.kernels.norm import add_rms_norm
from dllmserve.kernels.rotary import rotate_
from dllmserve.layers.ops import Angles, HeadNorms, LayerOps


class TritonOps(LayerOps):
    """Triton kernels, on CUDA or under Triton's interpreter; see :class:`LayerOps`.

    In float32 a row's result does not depend, bit for bit, on the other rows of the call:
    ``linear`` is a kernel with a fixed order of summation. In other dtypes it is torch's.

    Example:
        ``ops = TritonOps(64, 1e4, 128, device)``
    """

    def add_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See :class:`LayerOps`; the sum is written into ``residual``."""
        return add_rms_norm(x, residual, weight, eps)

    def at(self, positions: Tensor) -> Angles:
        """The positions: the kernel reads the tables itself."""
        return (positions,)

    def rotate(
        self, heads: Tensor, count: int, angles: Angles, norms: HeadNorms | None = None
    ) -> Tensor:
        """See :class:`LayerOps`; in place."""
        cos, sin = self.tables
        rotate_(heads, cos, sin, angles[0], count, norms)
        return heads[:, :count]

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See :class:`LayerOps`."""
        return silu_mul(gate_up)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`LayerOps`."""
        if x.dtype == torch.float32:
            return invariant_linear(x, weight, bias)
        return F.linear(x, weight, bias)
