"""TritonOps: what a decoder layer computes besides attention, in Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dllmserve.core.model_spec import ExpertSpec
from dllmserve.kernels.activation import silu_mul
from dllmserve.kernels.experts import combine_pairs, expert_product
from dllmserve.kernels.linear import invariant_linear
from dllmserve.kernels.norm import add_rms_norm
from dllmserve.kernels.rotary import rotate_
from dllmserve.kernels.routing import choose_experts
from dllmserve.layers.ops import Angles, HeadNorms, LayerOps, Routed


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

    def route(
        self,
        x: Tensor,  # [N, d]
        gate: Tensor,  # [E, d]
        bias: Tensor | None,  # [E] float32
        experts: ExpertSpec,
        held: range,
    ) -> Routed:
        """See :class:`LayerOps`."""
        found = choose_experts(x, gate, bias, experts, held)
        return Routed(found.ids, found.weights, held, found.counts, found.order)

    def expert_up(self, x: Tensor, routed: Routed, gate_up: Tensor) -> Tensor:
        """See :class:`LayerOps`."""
        return _product(x, routed, gate_up, gated=True)

    def expert_down(self, inner: Tensor, routed: Routed, down: Tensor) -> Tensor:
        """See :class:`LayerOps`."""
        return _product(inner, routed, down, gated=False)

    def combine(self, rows: Tensor, routed: Routed) -> Tensor:
        """See :class:`LayerOps`."""
        return combine_pairs(rows, routed.ids, routed.weights, routed.held)


def _product(x: Tensor, routed: Routed, weight: Tensor, *, gated: bool) -> Tensor:
    if routed.counts is None or routed.order is None:
        raise ValueError("experts' pairs are not in order: they have to come from this route()")
    choices = routed.ids.shape[1]
    return expert_product(x, weight, routed.counts, routed.order, choices, gated=gated)
