"""TritonOps: what a decoder layer computes besides attention, in Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dllmserve.core.model_spec import ExpertSpec
from dllmserve.kernels.activation import gated, gated_scaled
from dllmserve.kernels.e4m3 import Rows, Scaled, library_product
from dllmserve.kernels.experts import combine_pairs, expert_product
from dllmserve.kernels.linear import invariant_linear
from dllmserve.kernels.norm import add_rms_norm, sandwich_norms, wide_rms_norm
from dllmserve.kernels.parts import room_for_turns
from dllmserve.kernels.rotary import rotate_
from dllmserve.kernels.routing import choose_experts
from dllmserve.kernels.scaled import few_rows_product, scale_rows, takes_few_rows
from dllmserve.layers.ops import Angles, HeadNorms, LayerOps, Routed, Sandwich


class TritonOps(LayerOps):
    """Triton kernels, on CUDA or under Triton's interpreter; see :class:`LayerOps`.

    In float32 a row's result does not depend, bit for bit, on the other rows of the call:
    ``linear`` is a kernel with a fixed order of summation. In other dtypes it is torch's.

    Example:
        ``ops = TritonOps(64, 1e4, 128, device)``
    """

    asks_for_experts = False

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        #: counters of products whose sums are cut
        self._turns = room_for_turns(self.tables[0].device)

    def add_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        scales: bool = False,
    ) -> tuple[Rows, Tensor]:
        """See :class:`LayerOps`; the sum is written into ``residual``."""
        return add_rms_norm(x, residual, weight, eps, scales)

    def scaled(self, x: Tensor) -> Scaled:
        """See :class:`LayerOps`."""
        return scale_rows(x)

    def sandwich(
        self,
        outs: Sequence[Tensor],  # [N, d] each
        residual: Tensor,  # [N, d]
        norms: Sandwich,
        scalars: Tensor | None = None,  # [N]
    ) -> tuple[list[Tensor], Tensor]:
        """See :class:`LayerOps`; h is written into ``residual``."""
        return sandwich_norms(outs, residual, *norms, scalars), residual

    def wide_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """See :class:`LayerOps`."""
        return wide_rms_norm(x, weight, eps)

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

    def gated(self, gate_up: Tensor, activation: str = "silu", scales: bool = False) -> Rows:
        """See :class:`LayerOps`."""
        return gated_scaled(gate_up, activation) if scales else gated(gate_up, activation)

    def scaled_linear(self, x: Scaled, weight: Scaled, bias: Tensor | None) -> Tensor:
        """See :class:`LayerOps`; of many rows the library's product is faster than ours."""
        if takes_few_rows(x, weight) or not x.data.is_cuda:
            return few_rows_product(x, weight, bias, self._turns)
        return library_product(x, weight, bias)

    def plain_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
        windows: Tensor | None = None,  # [N] int64
        factors: Tensor | None = None,  # [E]
    ) -> Routed:
        """See :class:`LayerOps`; with windows, by torch's calls."""
        if windows is not None:
            routed = super().route(x, gate, bias, experts, held, windows, factors)
            counts, order = _listed(routed)
            return routed._replace(counts=counts, order=order, among=experts.count)
        found = choose_experts(x, gate, bias, experts, held, factors)
        return Routed(*found[:2], held, *found[2:], experts.count)

    def expert_up(
        self, x: Tensor, routed: Routed, gate_up: Rows, activation: str = "silu"
    ) -> Tensor:
        """See :class:`LayerOps`."""
        return _product(x, routed, gate_up, activation)

    def expert_down(self, inner: Tensor, routed: Routed, down: Rows) -> Tensor:
        """See :class:`LayerOps`."""
        return _product(inner, routed, down)

    def combine(self, rows: Tensor, routed: Routed) -> Tensor:
        """See :class:`LayerOps`."""
        return combine_pairs(rows, routed.ids, routed.weights, routed.held)


def _listed(routed: Routed) -> tuple[Tensor, Tensor]:
    """Pairs of each expert held, see :class:`~dllmserve.kernels.routing.Choices`."""
    ids, held, mine = routed.ids, routed.held, routed.mine
    tokens, stored = len(ids), len(held)
    place = torch.where(mine, ids.long() - held.start, stored)  # behind them: of no expert here
    taken = torch.zeros(tokens, stored + 1, dtype=torch.int32, device=ids.device)
    upto = taken.scatter_(1, place, 1).cumsum(0, dtype=torch.int32)
    rank = upto.gather(1, place) - 1
    room = stored * tokens
    at = torch.where(mine, place * tokens + rank, room)
    pairs = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)
    order = pairs.new_zeros(room + 1).scatter_(0, at.flatten(), pairs)
    return taken[:, :stored].sum(0, dtype=torch.int32), order[:room].view(stored, tokens)


def _product(x: Tensor, routed: Routed, weight: Rows, activation: str = "") -> Tensor:
    if routed.counts is None or routed.order is None:
        raise ValueError("experts' pairs are not in order: they have to come from this route()")
    pairs = routed.counts, routed.order, routed.ids.shape[1], routed.among
    if isinstance(weight, Scaled):
        return expert_product(scale_rows(x), weight, *pairs, activation=activation)
    return expert_product(x, weight, *pairs, activation=activation)
