"""Entropy-bounded rule (EB sampler; SGLang's EBSampling, DiffusionGemma)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dllmserve.decoding.rule import RuleView, Update, write_best


class EntropyBoundRule:
    """In order of rising entropy, write while the entropies before stay within the bound.

    The first position is always written; position j is if
    ``H_1 + ... + H_{j-1} <= entropy_bound``.
    """

    def apply(self, view: RuleView) -> Update:
        """Cumulative sum over the sorted entropies."""
        if view.entropy is None:
            raise ValueError("the entropy_bound rule needs the entropy statistic")
        passing = within_bound(view.entropy, view.parameter("entropy_bound"))
        return write_best(view, -view.entropy, passing)


def within_bound(entropy: Tensor, bound: Tensor) -> Tensor:
    """How many positions [n] int64, in order of rising entropy, the bound lets pass.

    Args:
        entropy: [n, W] float64; +inf where a position does not compete.
        bound: [n, 1] float64.
    """
    ranked = entropy.sort(dim=-1).values  # +inf behind
    real = torch.isfinite(ranked)
    spent = torch.where(real, ranked, 0.0).cumsum(dim=-1)
    before = F.pad(spent[:, :-1], (1, 0))  # a difference would round
    return ((before <= bound) & real).sum(dim=-1)
