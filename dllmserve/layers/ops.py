"""LayerOps: what a decoder layer computes besides attention."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from dllmserve.core.model_spec import ExpertSpec, RopeScaling
from dllmserve.kernels.e4m3 import Rows, Scaled, scaled
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


def wide_norm(x: Tensor, weight: Tensor | None, eps: float, factor: float = 1.0) -> Tensor:
    """``x / rms(x) * weight * factor``, all of it in float32 and cast once, as Gemma does.

    Args:
        x: [.., d] activations.
        weight: [d]; None for ones.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        wide = wide * weight.float()
    return (wide if factor == 1.0 else wide * factor).to(x.dtype)


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


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with tanh in place of the error function, as ``x / (1 + exp(-2u))``.

    That is ``x / 2 * (1 + tanh(u))`` with ``u = sqrt(2 / pi) * (x + 0.044715 x^3)``. It is computed
    in float32 and cast once; see :func:`silu` for why it is no call of torch's there.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    below = (x * x).mul_(0.044715).add_(1.0).mul_(x).mul_(-2 * math.sqrt(2 / math.pi))
    below = below.exp_().add_(1.0)
    return torch.div(x, below, out=below)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """``act(gate) * up`` of [N, 2m] -> [N, m], see :meth:`LayerOps.gated`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (silu(gate) if activation == "silu" else gelu_tanh(gate)).mul_(up)


class Sandwich(NamedTuple):
    """Weights of the norms around an addition to the residual stream (Gemma).

    Attributes:
        branches: [d] each, of what is added up: one for each of two sublayers side by side, or none
            for one sublayer.
        after: [d] of the norm of what is added to the stream.
        then: [d] each, of the norms of the sum, which the next sublayers read.
        factors: what each of these is multiplied by.
        eps: of all.
    """

    branches: tuple[Tensor, ...]
    after: Tensor
    then: tuple[Tensor, ...]
    factors: tuple[float, ...]
    eps: float


class HeadNorms(NamedTuple):
    """RMS norms over the dimension of each head, before it is rotated (Qwen3).

    Attributes:
        query, key: [D] weights.
        queries: number of query heads; heads behind them are key heads.
        eps: of both.
        wide: they cast behind the weight, see :func:`wide_norm`.
    """

    query: Tensor
    key: Tensor
    queries: int
    eps: float
    wide: bool = False


class Routed(NamedTuple):
    """Which experts each token takes, see :class:`dllmserve.core.model_spec.ExpertSpec`.

    A pair is a token n and its choice j; pairs are numbered ``n * K + j``. A shared expert that is
    stored as one more expert is every token's last choice, so K is then one more.

    Attributes:
        ids: [N, K] int32 expert of each pair.
        weights: [N, K] float32.
        held: the experts that this rank has; pairs of others are none of its business.
        counts, order: where each of them finds its pairs, if the implementation wants to know.
        among: experts that pairs are spread over, those of other ranks included; likewise.
    """

    ids: Tensor
    weights: Tensor
    held: range
    counts: Tensor | None = None
    order: Tensor | None = None
    among: int = 0

    @property
    def mine(self) -> Tensor:
        """Which pairs' experts this rank has: [N, K] bool."""
        return (self.ids >= self.held.start) & (self.ids < self.held.stop)


class LayerOps:
    """The operations of a decoder layer, apart from attention: plain torch, on any device.

    Arguments may be overwritten where a method says so; what it returns counts. Products are the
    library's: the last bits of a row may depend on how many rows are in the call. The rest does
    not depend on them in float32.

    Rotary position embedding has the half-split layout: of the first ``rotary_dim`` dimensions of
    a head, the first half rotates with the second; dimensions behind them stay. Its cos and sin
    tables are float32, for positions ``0 .. max_len - 1``; see :mod:`dllmserve.layers.rotary`.

    Example:
        >>> ops = LayerOps(rotary_dim=64, theta=1e4, max_len=128, device=torch.device("cpu"))
        >>> angles = ops.at(torch.tensor([0, 1, 2]))
        >>> ops.rotate(torch.zeros(3, 5, 64), 2, angles).shape
        torch.Size([3, 2, 64])
    """

    #: experts' products wait for the device, which has to say who chose them
    asks_for_experts = True

    def __init__(
        self,
        rotary_dim: int,
        theta: float,
        max_len: int,
        device: torch.device,
        scaling: RopeScaling | None = None,
    ) -> None:
        self.tables = rotary_tables(rotary_dim, theta, max_len, device, scaling)
        self._query_factors = query_factors(max_len, device, scaling)

    def add_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        scales: bool = False,
    ) -> tuple[Rows, Tensor]:
        """``h = residual + x``; (rms_norm(h), h), both [N, d]. ``residual`` may be overwritten.

        Without a residual h is x. With ``scales`` the norm is in e4m3, as ``scaled`` gives it.
        """
        h = x if residual is None else residual + x
        normed = rms_norm(h, weight, eps)
        return scaled(normed) if scales else normed, h

    def scaled(self, x: Tensor) -> Scaled:
        """Rows [N, d] in e4m3, see :func:`dllmserve.kernels.e4m3.scaled`."""
        return scaled(x)

    def turning(self, head_dim: int, theta: float, turned: int) -> Self:
        """The same operations with other rotary tables, see :func:`rotary_tables`."""
        cos, _ = self.tables
        other = copy.copy(self)
        other.tables = rotary_tables(head_dim, theta, len(cos), cos.device, None, turned)
        return other

    def sandwich(
        self,
        outs: Sequence[Tensor],  # [N, d] each
        residual: Tensor,  # [N, d]
        norms: Sandwich,
        scalars: Tensor | None = None,  # [N]
    ) -> tuple[list[Tensor], Tensor]:
        """``h = (residual + norm(outs)) * scalars``, and norms of h.

        ``residual`` may be overwritten.

        Args:
            outs: what a sublayer gives, or each of two side by side, which are normalised by
                themselves and added up before.
            residual: the stream.
            norms: the weights.
            scalars: a factor of each token; None for 1.

        Returns:
            A norm of h [N, d] for each weight in ``norms.then``, and h [N, d].
        """
        added = outs[0]
        if norms.branches:
            first, second = (
                wide_norm(x, weight, norms.eps)
                for x, weight in zip(outs, norms.branches, strict=True)
            )
            added = first + second
        h = residual + wide_norm(added, norms.after, norms.eps)
        if scalars is not None:
            h = h * scalars[:, None]
        then = zip(norms.then, norms.factors, strict=True)
        return [wide_norm(h, weight, norms.eps, factor) for weight, factor in then], h

    def wide_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """``x / rms(x) * weight`` of the last dimension in a new tensor, cast once.

        x may be [N, d] or [N, H, D]; without a weight it is 1.
        """
        return wide_norm(x, weight, eps)

    def at(self, positions: Tensor) -> Angles:
        """Once per forward: what ``rotate`` needs of positions [N] int64, which come last."""
        cos, sin = self.tables
        return cos[positions][:, None, :], sin[positions][:, None, :], positions  # [N, 1, r/2]

    def rotate(
        self, heads: Tensor, count: int, angles: Angles, norms: HeadNorms | None = None
    ) -> Tensor:
        """The first ``count`` of heads [N, H, D] rotated, in float32: [N, count, D].

        They are normalised before that if there are norms. ``heads`` may be changed in place.
        """
        cos, sin, _ = angles
        turning = heads[:, :count]
        if norms is not None:
            query, key, first_key, eps, wide = norms
            norm = wide_norm if wide else rms_norm
            queries, keys = turning[:, :first_key], turning[:, first_key:]
            turning = torch.cat((norm(queries, query, eps), norm(keys, key, eps)), dim=1)
        rotated = 2 * cos.shape[-1]
        behind = turning[..., rotated:]
        first, second = turning[..., :rotated].float().chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        turned = turned.to(heads.dtype)
        return torch.cat((turned, behind), dim=-1) if behind.shape[-1] else turned

    def scale_queries(self, queries: Tensor, angles: Angles) -> Tensor:
        """Rotated queries [N, Hq, D] times a factor of their positions, where the model has one."""
        if self._query_factors is None:
            return queries
        return queries * self._query_factors[angles[-1]].to(queries.dtype)[:, None, None]

    def gated(self, gate_up: Tensor, activation: str = "silu", scales: bool = False) -> Rows:
        """``act(gate) * up`` of [N, 2m] -> [N, m]. The argument may be overwritten.

        ``activation`` is :class:`~dllmserve.core.model_spec.ModelSpec`'s. With ``scales`` the
        result is in e4m3.
        """
        inner = gated(gate_up, activation)
        return scaled(inner) if scales else inner

    def linear(self, x: Rows, weight: Rows, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``: [N, d] -> [N, out]; of x in e4m3, if the weight is."""
        if isinstance(weight, Scaled):
            return self.scaled_linear(x if isinstance(x, Scaled) else self.scaled(x), weight, bias)
        if isinstance(x, Scaled):
            raise TypeError("rows in e4m3 have no product with a weight that is not")
        return self.plain_linear(x, weight, bias)

    def plain_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``linear`` of what is not in e4m3."""
        return F.linear(x, weight, bias)

    def scaled_linear(self, x: Scaled, weight: Scaled, bias: Tensor | None) -> Tensor:
        """``linear`` of what is in e4m3, summed in float32 and cast once."""
        wide = F.linear(x.data.float(), weight.data.float())
        wide = wide * x.scale[:, None] * weight.scale
        return (wide if bias is None else wide + bias.float()).to(weight.dtype)

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
        """The experts of each token, with their weights, in float32 whatever x and gate are.

        Args:
            x: hidden states.
            gate: the router's matrix, of all experts.
            bias: of the scores, where ``experts.bias`` says that there is one.
            experts: how many each token takes, and how.
            held: experts that this rank has. If the number E is among them, it is that of the
                shared expert, which every token takes.
            windows: number of each token's window, from 0 on, where ``experts`` has a capacity.
            factors: of each expert, which its weights are multiplied by in the end.
        """
        logits = self.linear(x.float(), gate.float(), None)
        scores = logits.sigmoid() if experts.score == "sigmoid" else logits.softmax(dim=-1)
        ranked = scores if bias is None else scores + bias
        if experts.bias == "weights":
            scores = ranked
        if windows is None:
            admitted = _in_best_groups(ranked, experts)
        else:
            admitted = _in_pools(ranked, windows, experts.capacity)
        ids = _best(admitted, experts.per_token)
        weights = scores.gather(1, ids)
        if experts.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        weights = weights * experts.scale
        if factors is not None:
            weights = weights * factors.float()[ids]
        if experts.count in held:
            ids, weights = F.pad(ids, (0, 1), value=experts.count), F.pad(weights, (0, 1), value=1)
        return Routed(ids.int(), weights, held)

    def expert_up(
        self, x: Tensor, routed: Routed, gate_up: Rows, activation: str = "silu"
    ) -> Tensor:
        """``act(gate) * up`` of each pair's token and expert: [N, d] -> [N*K, m].

        Rows of pairs whose expert this rank has not are undefined.

        Args:
            x: [N, d].
            routed: of x.
            gate_up: [held experts, 2m, d]: gate's m rows, then up's.
            activation: see ``gated``.
        """
        choices = routed.ids.shape[1]
        inner = x.new_empty((routed.ids.numel(), gate_up.shape[1] // 2))
        for pairs, weight in _by_expert(routed, gate_up):
            product = self.linear(x[pairs // choices], weight, None)
            inner[pairs] = gated(product, activation)
        return inner

    def expert_down(self, inner: Tensor, routed: Routed, down: Rows) -> Tensor:
        """Each pair's row times its expert's matrix: [N*K, m] -> [N*K, d].

        Args:
            inner: see ``expert_up``, also for rows that are undefined.
            routed: of the same tokens.
            down: [held experts, d, m].
        """
        out = inner.new_empty((inner.shape[0], down.shape[1]))
        for pairs, weight in _by_expert(routed, down):
            out[pairs] = self.linear(inner[pairs], weight, None)
        return out

    def combine(self, rows: Tensor, routed: Routed) -> Tensor:
        """The weighted sum of each token's pairs that this rank has: [N*K, d] -> [N, d].

        It is computed in float32, in the order of the choice, and cast once.
        """
        choices, held = routed.ids.shape[1], routed.mine
        each = rows.view(-1, choices, rows.shape[1])
        total = torch.zeros_like(each[:, 0], dtype=torch.float32)
        for j in range(choices):
            part = each[:, j].float() * routed.weights[:, j, None]
            total = torch.where(held[:, j, None], total + part, total)
        return total.to(rows.dtype)


def _best(scores: Tensor, count: int) -> Tensor:
    """Places of the largest scores [N, n], from the largest on, the first of equals: [N, count]."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _in_best_groups(scores: Tensor, experts: ExpertSpec) -> Tensor:
    """Scores [N, E], and -inf for experts outside the best groups."""
    if experts.groups == experts.top_groups:
        return scores
    runs = scores.view(len(scores), experts.groups, experts.count // experts.groups)
    best = _best(runs.topk(2, dim=-1).values.sum(dim=-1), experts.top_groups)
    outside = torch.ones(runs.shape[:2], dtype=torch.bool, device=scores.device)
    outside.scatter_(1, best, False)
    return runs.masked_fill(outside[:, :, None], -torch.inf).flatten(1)


def _in_pools(scores: Tensor, windows: Tensor, capacity: int) -> Tensor:
    """Scores [N, E], and -inf for experts that the token's window [N] does not admit."""
    best = torch.full_like(scores, -torch.inf)  # there are no more windows than tokens
    best.scatter_reduce_(0, windows[:, None].expand_as(scores), scores, "amax")
    outside = torch.ones_like(scores, dtype=torch.bool)
    outside.scatter_(1, _best(best, capacity), False)
    return scores.masked_fill(outside[windows], -torch.inf)


def _by_expert(routed: Routed, weights: Rows) -> Iterator[tuple[Tensor, Rows]]:
    """For each expert held that any token takes: its pairs [P] int64 in order, and its weight."""
    held = routed.held
    ids = routed.ids.flatten()
    pairs = ids.argsort(stable=True)
    # those of experts before ours, of each of ours, and of experts behind
    places = (ids - held.start).clamp(-1, len(held)) + 1
    before, *counts, _ = torch.bincount(places, minlength=len(held) + 2).tolist()
    each = weights.matrices() if isinstance(weights, Scaled) else iter(weights)
    for weight, count in zip(each, counts, strict=True):
        if count:
            yield pairs[before : before + count], weight
        before += count
