"""LayerOps: what a decoder layer computes besides attention, in torch or in Triton."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dllmserve.layers.activation import silu
from dllmserve.layers.norm import rms_norm
from dllmserve.layers.rotary import Rotary

#: what ``at`` gives and ``rotate`` takes; its content is the implementation's own
Angles = tuple[Tensor, ...]


class LayerOps(Protocol):
    """The operations of a decoder layer, apart from attention.

    Arguments may be overwritten where a method says so; what it returns counts.
    """

    #: "torch" or "triton"
    name: str

    def add_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """``h = residual + x``; (rms_norm(h), h), both [N, d]. ``residual`` may be overwritten.

        Without a residual h is x.
        """
        ...

    def at(self, positions: Tensor) -> Angles:
        """Once per forward: what ``rotate`` needs of positions [N] int64."""
        ...

    def rotate(self, heads: Tensor, count: int, angles: Angles) -> Tensor:
        """The first ``count`` of heads [N, H, D] rotated: [N, count, D].

        ``heads`` may be rotated in place.
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up`` of [N, 2m] -> [N, m]. The argument may be overwritten."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``: [N, d] -> [N, out]."""
        ...


class TorchOps:
    """Plain torch operations, on any device; see :class:`LayerOps`.

    Products are the library's: the last bits of a row may depend on how many rows are in the call.
    The rest does not depend on them in float32.

    Example:
        ``ops = TorchOps(Rotary(64, 1e4, 128, device))``
    """

    name = "torch"

    def __init__(self, rotary: Rotary) -> None:
        self._rotary = rotary

    def add_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See :class:`LayerOps`."""
        h = x if residual is None else residual + x
        return rms_norm(h, weight, eps), h

    def at(self, positions: Tensor) -> Angles:
        """Rows of the tables: cos and sin, [N, 1, D/2] each."""
        return self._rotary.at(positions)

    def rotate(self, heads: Tensor, count: int, angles: Angles) -> Tensor:
        """See :class:`LayerOps`."""
        cos, sin = angles
        return self._rotary.rotate(heads[:, :count], cos, sin)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See :class:`LayerOps`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`LayerOps`."""
        return F.linear(x, weight, bias)


class TritonOps:
    """Triton kernels, on CUDA or under Triton's interpreter; see :class:`LayerOps`.

    In float32 a row's result does not depend, bit for bit, on the other rows of the call:
    ``linear`` is a kernel with a fixed order of summation. In other dtypes it is torch's.

    Example:
        ``ops = TritonOps(Rotary(64, 1e4, 128, device))``
    """

    name = "triton"

    def __init__(self, rotary: Rotary) -> None:
        # loads triton, so only where kernels are used
        from dllmserve.kernels.activation import silu_mul
        from dllmserve.kernels.linear import invariant_linear
        from dllmserve.kernels.norm import add_rms_norm
        from dllmserve.kernels.rotary import rotate_

        self._tables = rotary.tables
        self._add_norm = add_rms_norm
        self._silu_mul = silu_mul
        self._linear = invariant_linear
        self._rotate = rotate_

    def add_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See :class:`LayerOps`; the sum is written into ``residual``."""
        return self._add_norm(x, residual, weight, eps)

    def at(self, positions: Tensor) -> Angles:
        """The positions: the kernel reads the tables itself."""
        return (positions,)

    def rotate(self, heads: Tensor, count: int, angles: Angles) -> Tensor:
        """See :class:`LayerOps`; in place."""
        cos, sin = self._tables
        self._rotate(heads, cos, sin, angles[0], count)
        return heads[:, :count]

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See :class:`LayerOps`."""
        return self._silu_mul(gate_up)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`LayerOps`."""
        if x.dtype == torch.float32:
            return self._linear(x, weight, bias)
        return F.linear(x, weight, bias)


def choose_ops(name: str, rotary: Rotary) -> LayerOps:
    """The operations by name.

    Args:
        name: "torch" or "triton".
        rotary: tables on the device.
    """
    return TritonOps(rotary) if name == "triton" else TorchOps(rotary)
