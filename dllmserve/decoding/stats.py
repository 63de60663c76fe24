"""The numbers that a row of logits is reduced to.

Sums leave the top token out (``p = 1 / (1 + sum of the others)``), so probabilities near
1 keep their order: rounded to float32, a confident model's would all tie at 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllmserve.decoding.noise import token_uniforms
from dllmserve.decoding.transforms import filter_logits


@dataclass(frozen=True)
class RowParams:
    """Parameters of N logit rows, gathered from their requests.

    Attributes:
        temperature, top_p: [N] float64.
        top_k: [N] int64.
        tempered: [N] bool, statistics from the tempered, filtered distribution (Dream).
        keys: [N] int64, noise keys of :func:`dllmserve.decoding.noise.row_keys`.
        given: [N] int64, the token whose probability is wanted, or -1 where one is to be
            proposed; None if it is everywhere.
    """

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    tempered: Tensor
    keys: Tensor
    given: Tensor | None = None

    def __getitem__(self, rows: slice) -> RowParams:
        """The parameters of some of the rows."""
        return RowParams(
            temperature=self.temperature[rows],
            top_p=self.top_p[rows],
            top_k=self.top_k[rows],
            tempered=self.tempered[rows],
            keys=self.keys[rows],
            given=None if self.given is None else self.given[rows],
        )


@dataclass(frozen=True)
class TokenStats:
    """What rules get of N logit rows.

    Attributes:
        token: [N] int64, the proposed token: the top one, or the sampled one.
        prob: [N] float64, the proposed token's probability.
        margin: [N] float64, top-1 minus top-2 probability; None unless asked for.
        entropy: [N] float64 in nats; None unless asked for.
        kl: [N] float64 in nats, from the distribution of the forward before; None unless
            asked for.
    """

    token: Tensor
    prob: Tensor
    margin: Tensor | None
    entropy: Tensor | None
    kl: Tensor | None = None

    @staticmethod
    def concat(parts: list[TokenStats]) -> TokenStats:
        """Join the statistics of successive chunks. ``kl`` is +inf where a chunk has none."""
        if len(parts) == 1:
            return parts[0]
        margins = [p.margin for p in parts if p.margin is not None]
        entropies = [p.entropy for p in parts if p.entropy is not None]
        kl = None
        if any(p.kl is not None for p in parts):
            none = [torch.full_like(p.prob, torch.inf) for p in parts]
            kl = torch.cat([n if p.kl is None else p.kl for p, n in zip(parts, none, strict=True)])
        return TokenStats(
            token=torch.cat([p.token for p in parts]),
            prob=torch.cat([p.prob for p in parts]),
            margin=torch.cat(margins) if margins else None,
            entropy=torch.cat(entropies) if entropies else None,
            kl=kl,
        )


def row_stats(
    z: Tensor,  # [n, V] logits
    params: RowParams,
    *,
    mask_id: int,
    sampled: bool,
    filtered: bool,
    needs: frozenset[str],
) -> TokenStats:
    """Reduce a chunk of logits to its statistics.

    The mask id is never proposed, whatever its logit; it still counts in the
    normalisation, as upstream.

    Args:
        sampled: rows may have a temperature above 0.
        filtered: rows may use top-p or top-k.
        needs: "margin" and "entropy", if any rule or confidence reads them.
    """
    z = z.float()
    base, allowed = z, z
    if sampled or filtered:
        # temperature 0 leaves the distribution as it is; a tiny one must not overflow, so
        # the largest logit is taken off first
        scale = torch.where(params.temperature > 0, params.temperature, 1.0)
        top = z.amax(dim=-1, keepdim=True).double()
        allowed = ((z.double() - top) / scale[:, None]).float()
        if filtered:
            kept = filter_logits(allowed, params.top_p, params.top_k)
            allowed = _keep_runner_up(kept, allowed, mask_id)
        base = torch.where(params.tempered[:, None], allowed, z)
    candidates = without(allowed, mask_id)
    token = candidates.argmax(dim=-1)  # [n]
    if sampled:
        drawn = _gumbel_argmax(candidates, params)
        token = torch.where(params.temperature > 0, drawn, token)
    if params.given is not None:
        token = torch.where(params.given >= 0, params.given, token)
    return _reduce(base, token, needs)


def without(z: Tensor, mask_id: int) -> Tensor:
    """Logits [n, V] with the mask id at -inf."""
    ids = torch.arange(z.shape[-1], device=z.device)
    return z.masked_fill(ids == mask_id, float("-inf"))


def _keep_runner_up(kept: Tensor, z: Tensor, mask_id: int) -> Tensor:
    """Let the best token besides the mask id stay, or a filter might leave nothing else."""
    best = without(z, mask_id).argmax(dim=-1, keepdim=True)  # [n, 1]
    return kept.scatter(1, best, z.gather(1, best))


def _gumbel_argmax(tempered: Tensor, params: RowParams) -> Tensor:
    """Argmax of z/T - ln(-ln u) in float64: one draw of softmax(z/T) per row."""
    ids = torch.arange(tempered.shape[-1], device=tempered.device)
    u = token_uniforms(params.keys, ids)  # [n, V]
    return (tempered.double() - (-u.log()).log()).argmax(dim=-1)


def _reduce(z: Tensor, token: Tensor, needs: frozenset[str]) -> TokenStats:
    top, top_id = z.max(dim=-1)
    shifted = z - top[:, None]
    weights = shifted.exp().scatter(1, top_id[:, None], 0.0)  # [n, V] without the top token
    others = weights.sum(dim=-1).double()
    total = 1.0 + others
    prob = shifted.gather(1, token[:, None])[:, 0].double().exp() / total
    margin = entropy = None
    if "margin" in needs:
        margin = (1.0 - weights.amax(dim=-1).double()) / total
    if "entropy" in needs:
        # filtered tokens are -inf: their share is 0, not 0 * inf
        spread = torch.where(weights > 0, weights * -shifted, 0.0).sum(dim=-1).double()
        entropy = others.log1p() + spread / total
    return TokenStats(token=token, prob=prob, margin=margin, entropy=entropy)
