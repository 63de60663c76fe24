"""UnmaskRule: a pure function from a step's statistics to what is written now.

Rules never see logits and never loop over requests: they get [n, W] tensors, n rows of
one step with blocks up to W long, and return [n, W] tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

#: ``key [n, W] floating, count [n] int64, eligible [n, W] bool -> [n, W] bool``: see
#: :func:`write_best`, of which it is a faster twin
PickBest = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RuleView:
    """What a rule sees of n requests whose blocks are at most W long.

    Attributes:
        eligible: [n, W] bool, positions that are masked and may be written.
        tokens: [n, W] int64, the proposed token of each position.
        confidence: [n, W] float64, -inf where not eligible.
        entropy: [n, W] float64 in nats, +inf where not eligible; None unless asked for.
        quota: [n] int64, tokens that a fixed schedule writes in this step.
        threshold, factor, entropy_bound: [n] float64, the requests' own parameters.
        pick: what :func:`write_best` picks positions with; None for torch operations.
    """

    eligible: Tensor
    tokens: Tensor
    confidence: Tensor
    entropy: Tensor | None
    quota: Tensor
    threshold: Tensor
    factor: Tensor
    entropy_bound: Tensor
    pick: PickBest | None = None


@dataclass(frozen=True)
class Update:
    """Result of a rule: ``write`` [n, W] bool says where ``tokens`` [n, W] go."""

    tokens: Tensor
    write: Tensor


class UnmaskRule(Protocol):
    """One decoding rule. Add a file with a class and a line in registry.UNMASK_RULES.

    Contract: write only eligible positions, and at least one of each row that has any;
    no host synchronisation.
    """

    #: statistics beyond token and probability that the rule reads: "entropy"
    needs: frozenset[str]

    def apply(self, view: RuleView) -> Update:
        """Decide what is written in this step."""
        ...


def rank_of(key: Tensor) -> Tensor:
    """Rank of every position when sorted by ``key`` [n, W], largest first.

    Ties go to the lower position, which torch.topk leaves open.

    Returns:
        [n, W] int64, 0 is the largest.
    """
    order = torch.sort(key, dim=-1, descending=True, stable=True).indices
    places = torch.arange(key.shape[-1], device=key.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def write_best(view: RuleView, key: Tensor, count: Tensor) -> Update:
    """Write the ``count`` [n] (at least one) eligible positions with the largest key."""
    if view.pick is not None:
        return Update(tokens=view.tokens, write=view.pick(key, count, view.eligible))
    count = count.clamp(min=1)
    write = (rank_of(key) < count[:, None]) & view.eligible
    return Update(tokens=view.tokens, write=write)
