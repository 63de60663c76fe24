"""The numbers that a row of logits is reduced to.

Sums leave the top token out (``p = 1 / (1 + sum of the others)``), so probabilities near
1 keep their order: rounded to float32, a confident model's would all tie at 1. They are made
split by split of the vocabulary and then joined, see :mod:`dllmserve.parallel.vocab`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dllmserve.decoding.noise import token_uniforms
from dllmserve.parallel.group import join
from dllmserve.parallel.vocab import VocabShard, best_of

#: entropy, in nats, where a proposal has no confidence: more than any distribution has, but
#: finite, so that such a position comes before one that cannot be written at all
NO_CONFIDENCE = 1e9
#: taken off the scores of ids that a filter leaves out: more than scores differ by
_LEFT_OUT = 1e6


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
        last: [N, E] int64, ids whose proposals have no confidence, -1 for none: statistics are
            those of the distribution without them, and the worst where one is proposed; None
            if there are none anywhere.
    """

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    tempered: Tensor
    keys: Tensor
    given: Tensor | None = None
    last: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> RowParams:
        """The parameters of some of the rows."""
        return RowParams(
            temperature=self.temperature[rows],
            top_p=self.top_p[rows],
            top_k=self.top_k[rows],
            tempered=self.tempered[rows],
            keys=self.keys[rows],
            given=None if self.given is None else self.given[rows],
            last=None if self.last is None else self.last[rows],
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
        logprobs: [n, columns] float64 of each segment that asks for log-probabilities, see
            :func:`dllmserve.decoding.logprobs.row_logprobs`.
        drawn: [N] int64, of canvases of noise a draw from the distribution, whose ``token`` is the
            likeliest; None otherwise.
    """

    token: Tensor
    prob: Tensor
    margin: Tensor | None
    entropy: Tensor | None
    kl: Tensor | None = None
    logprobs: tuple[Tensor, ...] = ()
    drawn: Tensor | None = None

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
        drawn = [p.drawn for p in parts if p.drawn is not None]
        return TokenStats(
            drawn=torch.cat(drawn) if drawn else None,
            token=torch.cat([p.token for p in parts]),
            prob=torch.cat([p.prob for p in parts]),
            margin=torch.cat(margins) if margins else None,
            entropy=torch.cat(entropies) if entropies else None,
            kl=kl,
        )


def row_stats(
    z: Tensor,  # [n, v] logits of this rank's ids
    params: RowParams,
    *,
    mask_id: int,
    sampled: bool,
    filtered: bool,
    needs: frozenset[str],
    shard: VocabShard | None = None,
) -> TokenStats:
    """Reduce a chunk of logits to its statistics.

    The mask id is never proposed, whatever its logit; it still counts in the
    normalisation, as upstream.

    Args:
        sampled: rows may have a temperature above 0.
        filtered: rows may use top-p or top-k.
        needs: "margin" and "entropy", if any rule or confidence reads them.
        shard: which ids they are; None: the whole vocabulary.
    """
    shard = shard or VocabShard(z.shape[1])
    how = {"mask_id": mask_id, "sampled": sampled, "filtered": filtered}
    if filtered and shard.ranks > 1:
        return _share_rows(z, params, shard, needs, how)
    z = z.float()
    base, allowed = z, z
    if sampled or filtered:
        # temperature 0 leaves the distribution as it is; a tiny one must not overflow, so
        # the largest logit is taken off first
        scale = torch.where(params.temperature > 0, params.temperature, 1.0)
        top = shard.group.all_gather(z.amax(dim=-1)).amax(dim=0)[:, None].double()
        allowed = ((z.double() - top) / scale[:, None]).float()
        if filtered:
            from dllmserve.decoding.transforms import filter_logits

            kept = filter_logits(allowed, params.top_p, params.top_k)
            allowed = _keep_runner_up(kept, allowed, mask_id)
        base = torch.where(params.tempered[:, None], allowed, z)
    token, value = _propose(base, allowed, params, mask_id, sampled, shard)
    if params.last is not None:
        strike(base, params.last, shard)
    parts = shard.join(split_partials(shard.split(base, -torch.inf), needs))
    stats = join_partials(parts, token, value, needs)
    if params.last is None:
        return stats
    return without_confidence(stats, params.last, ~value.isfinite())


def scores(
    z: Tensor,  # [n, v] logits of this rank's ids
    params: RowParams,
    mask_id: int,
    sampled: bool,
    filtered: bool,
    shard: VocabShard,
) -> Tensor:
    """What a proposal is the largest of: [n, v] float64, noise included; -inf for the mask id.

    Ids that a filter leaves out come after all others, by their own order.
    """
    z = without(z.float(), mask_id, shard.start)
    if not sampled and not filtered:
        return z.double()
    hot = params.temperature > 0
    scale = torch.where(hot, params.temperature, 1.0)
    top = shard.group.all_gather(z.amax(dim=-1)).amax(dim=0)[:, None].double()
    tempered = ((z.double() - top) / scale[:, None]).float()
    found = torch.where(hot[:, None], _gumbel(tempered, params, shard), tempered.double())
    if not filtered:
        return found
    from dllmserve.decoding.transforms import filter_logits

    whole = shard.join_logits(tempered) if shard.ranks > 1 else tempered
    kept = filter_logits(whole, params.top_p, params.top_k) > -torch.inf
    kept = kept[:, shard.start : shard.stop]
    return torch.where(kept, found, found - _LEFT_OUT)


def strike(z: Tensor, ids: Tensor, shard: VocabShard) -> None:
    """Set logits [n, v] of the ids [n, E] to -inf, in place; -1 is no id."""
    columns, mine = shard.locate(ids)
    z.scatter_add_(1, columns, torch.where(mine, -torch.inf, 0.0).to(z.dtype))


def without_confidence(stats: TokenStats, ids: Tensor, broken: Tensor) -> TokenStats:
    """Statistics that are the worst where one of the ids [n, E] is proposed.

    Args:
        broken: [n] bool, rows whose logits are not numbers: their probability stays NaN.
    """
    here = (stats.token[:, None] == ids).any(dim=-1)
    margin, entropy = stats.margin, stats.entropy
    return replace(
        stats,
        prob=stats.prob.masked_fill(here, 0.0).masked_fill(here & broken, torch.nan),
        margin=None if margin is None else margin.masked_fill(here, 0.0),
        entropy=None if entropy is None else entropy.masked_fill(here, NO_CONFIDENCE),
    )


def _share_rows(
    z: Tensor, params: RowParams, shard: VocabShard, needs: frozenset[str], how: dict[str, Any]
) -> TokenStats:
    """Statistics of filtered rows: every rank takes some of them, and their whole logits.

    How many tokens a filter leaves is known only when all are sorted, and ties at the cut stay
    together, so no fixed number of candidates of each rank would do. Sorting costs far more
    than the exchange, and so it is shared.
    """
    whole = shard.join_logits(z)
    rows = -(-len(z) // shard.ranks)
    first = shard.group.rank * rows
    # the last ranks may repeat the last row
    mine = torch.arange(first, first + rows, device=z.device).clamp(max=len(z) - 1)
    part = row_stats(whole[mine], params[mine], needs=needs, **how)
    found = [part.token.double(), part.prob]
    found += [x for x in (part.margin, part.entropy) if x is not None]
    token, prob, *rest = join(shard.group, torch.stack(found), 1)[:, : len(z)].contiguous()
    margin = rest.pop(0) if part.margin is not None else None
    entropy = rest.pop(0) if part.entropy is not None else None
    return TokenStats(token.long(), prob, margin, entropy)


def without(z: Tensor, mask_id: int, start: int = 0) -> Tensor:
    """Logits [n, v] of the ids from ``start`` on, with the mask id at -inf."""
    ids = torch.arange(start, start + z.shape[-1], device=z.device)
    return z.masked_fill(ids == mask_id, float("-inf"))


def _keep_runner_up(kept: Tensor, z: Tensor, mask_id: int) -> Tensor:
    """Let the best token besides the mask id stay, or a filter might leave nothing else."""
    best = without(z, mask_id).argmax(dim=-1, keepdim=True)  # [n, 1]
    return kept.scatter(1, best, z.gather(1, best))


def _propose(
    base: Tensor,
    allowed: Tensor,
    params: RowParams,
    mask_id: int,
    sampled: bool,
    shard: VocabShard,
) -> tuple[Tensor, Tensor]:
    """The proposed token [n] int64 and its value [n] float32 in ``base``."""
    candidates = without(allowed, mask_id, shard.start)
    best, column = candidates.max(dim=-1)
    score = best.double()
    if sampled:
        drawn, place = _gumbel(candidates, params, shard).max(dim=-1)
        hot = params.temperature > 0
        score, column = torch.where(hot, drawn, score), torch.where(hot, place, column)
    token, value = column + shard.start, base.gather(1, column[:, None])[:, 0]
    # where nothing else is possible, the mask id is no better
    value = value.masked_fill(token == mask_id, -torch.inf)
    if shard.ranks > 1:
        found = shard.group.all_gather(torch.stack((score, token.double(), value.double())))
        wide, value = best_of(found[:, 0], (found[:, 1], found[:, 2]))
        token, value = wide.long(), value.float()
    if params.given is not None:
        given = params.given >= 0
        token = torch.where(given, params.given, token)
        value = torch.where(given, value_of(base, params.given, shard), value)
    return token, value


def value_of(base: Tensor, token: Tensor, shard: VocabShard) -> Tensor:
    """Values [n] of one token a row, whichever rank has it."""
    column, mine = shard.locate(token)
    value = base.gather(1, column[:, None])[:, 0].masked_fill(~mine, 0.0)
    return shard.group.all_reduce(value)


def _gumbel(tempered: Tensor, params: RowParams, shard: VocabShard) -> Tensor:
    """z/T - ln(-ln u) [n, v] float64: the argmax is one draw of softmax(z/T) per row."""
    u = token_uniforms(params.keys, shard.ids(tempered.shape[-1], tempered.device))
    return tempered.double() - (-u.log()).log()


def split_partials(z: Tensor, needs: frozenset[str]) -> Tensor:
    """What each split adds to a row's statistics.

    Args:
        z: [n, S, width] float32 logits.
        needs: "margin" and "entropy", if they are wanted.

    Returns:
        [n, 4, S] float32: the split's top logit; of the others, the sum of ``exp(z - top)``,
        the largest logit, and the sum of ``(top - z) exp(z - top)``.
    """
    top, top_id = z.max(dim=-1)
    # an empty split is infinitely far below, and -inf - -inf would be NaN
    shifted = z - torch.where(top == -torch.inf, 0.0, top)[..., None]
    weights = shifted.exp().scatter_(2, top_id[..., None], 0.0)
    others = weights.sum(dim=-1)
    second = spread = top
    if "margin" in needs:
        second = z.scatter(2, top_id[..., None], -torch.inf).amax(dim=-1)
    if "entropy" in needs:
        # filtered tokens are -inf: their share is 0, not 0 * inf
        spread = torch.where(weights > 0, weights * -shifted, 0.0).sum(dim=-1)
    return torch.stack((top, others, second, spread), dim=1)


def join_partials(
    parts: Tensor,  # [n, 4, S] of all splits
    token: Tensor,  # [n] int64
    value: Tensor,  # [n] float32, the token's logit
    needs: frozenset[str],
) -> TokenStats:
    """Statistics of rows from what :func:`split_partials` found, joined in float64."""
    tops, others, seconds, spreads = parts.unbind(dim=1)
    top, winner = tops.max(dim=-1, keepdim=True)
    loses = torch.arange(tops.shape[1], device=tops.device) != winner
    gap = (top - tops).double()
    weight = (-gap).exp()
    joining = (others.double() + 1.0) * weight
    sums = torch.where(loses, joining, others.double()).sum(dim=-1)
    sums = sums.masked_fill(top[:, 0] == -torch.inf, torch.nan)  # nothing is likely
    total = 1.0 + sums
    prob = (value - top[:, 0]).double().exp() / total
    margin = entropy = None
    if "margin" in needs:
        second = torch.where(loses, tops, seconds).amax(dim=-1)
        margin = (1.0 - (second - top[:, 0]).double().exp()) / total
    if "entropy" in needs:
        moved = spreads.double() * weight + joining * torch.where(weight > 0, gap, 0.0)
        spread = torch.where(loses, moved, spreads.double()).sum(dim=-1)
        entropy = sums.log1p() + spread / total
    return TokenStats(token=token, prob=prob, margin=margin, entropy=entropy)


def log_sum(z: Tensor, shard: VocabShard) -> Tensor:
    """The same as :func:`log_total`, rounded to float32."""
    return log_total(z, shard).float()


def log_total(z: Tensor, shard: VocabShard) -> Tensor:
    """``log(sum(exp(z)))`` of rows [n, v] float32, over the whole vocabulary: [n, 1] float64."""
    parts = shard.join(split_partials(shard.split(z, -torch.inf), frozenset()))
    tops, others = parts[:, 0].double(), parts[:, 1].double()
    top = tops.amax(dim=-1, keepdim=True)
    sums = ((others + 1.0) * (tops - top).exp()).sum(dim=-1, keepdim=True)
    return top + sums.log()
