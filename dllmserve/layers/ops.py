"""LayerOps: what a decoder layer computes besides attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dllmserve.core.model_spec import RopeScaling
from dllmserve.layers.rotary import query_factors, rotary_tables

#: what ``at`` gives and ``rotate`` takes; its content is the implementation's own
Angles = tuple[Tensor, ...]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight``, normalised in float32 and cast back before the weight.

    The order of the cast is LLaDA's and Qwen2's, so bf16 results round alike.

    Args:
        x: [.., d] activations.
        weight: [d].
    """
    if x.dtype == torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


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


class HeadNorms(NamedTuple):
    """RMS norms over the dimension of each head, before it is rotated (Qwen3).

    Attributes:
        query, key: [D] weights.
        queries: number of query heads; heads behind them are key heads.
        eps: of both.
    """

    query: Tensor
    key: Tensor
    queries: int
    eps: float


class LayerOps:
    """The operations of a decoder layer, apart from attention: plain torch, on any device.

    Arguments may be overwritten where a method says so; what it returns counts. Products are the
    library's: the last bits of a row may depend on how many rows are in the call. The rest does
    not depend on them in float32.

    Rotary position embedding has the half-split layout: the first half of a head rotates with the
    second. Its cos and sin tables are float32, for positions ``0 .. max_len - 1``; see
    :mod:`dllmserve.layers.rotary`.

    Example:
        >>> ops = LayerOps(head_dim=64, theta=1e4, max_len=128, device=torch.device("cpu"))
        >>> angles = ops.at(torch.tensor([0, 1, 2]))
        >>> ops.rotate(torch.zeros(3, 5, 64), 2, angles).shape
        torch.Size([3, 2, 64])
    """

    def __init__(
        self,
        head_dim: int,
        theta: float,
        max_len: int,
        device: torch.device,
        scaling: RopeScaling | None = None,
    ) -> None:
        self.tables = rotary_tables(head_dim, theta, max_len, device, scaling)
        self._query_factors = query_factors(max_len, device, scaling)

    def add_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """``h = residual + x``; (rms_norm(h), h), both [N, d]. ``residual`` may be overwritten.

        Without a residual h is x.
        """
        h = x if residual is None else residual + x
        return rms_norm(h, weight, eps), h

    def at(self, positions: Tensor) -> Angles:
        """Once per forward: what ``rotate`` needs of positions [N] int64, which come last."""
        cos, sin = self.tables
        return cos[positions][:, None, :], sin[positions][:, None, :], positions  # [N, 1, D/2]

    def rotate(
        self, heads: Tensor, count: int, angles: Angles, norms: HeadNorms | None = None
    ) -> Tensor:
        """The first ``count`` of heads [N, H, D] rotated, in float32: [N, count, D].

        They are normalised before that if there are norms. ``heads`` may be changed in place.
        """
        cos, sin, _ = angles
        turning = heads[:, :count]
        if norms is not None:
            query, key, first_key, eps = norms
            queries, keys = turning[:, :first_key], turning[:, first_key:]
            turning = torch.cat((rms_norm(queries, query, eps), rms_norm(keys, key, eps)), dim=1)
        first, second = turning.float().chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned.to(heads.dtype)

    def scale_queries(self, queries: Tensor, angles: Angles) -> Tensor:
        """Rotated queries [N, Hq, D] times a factor of their positions, where the model has one."""
        if self._query_factors is None:
            return queries
        return queries * self._query_factors[angles[-1]].to(queries.dtype)[:, None, None]

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up`` of [N, 2m] -> [N, m]. The argument may be overwritten."""
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``: [N, d] -> [N, out]."""
        return F.linear(x, weight, bias)
