"""Sequential rule (SDAR's): the schedule's quota, from left to right."""

from __future__ import annotations

import torch

from dllmserve.decoding.rule import RuleView, Update, write_best


class SequentialRule:
    """Write the ``quota`` leftmost masked positions."""

    def apply(self, view: RuleView) -> Update:
        """Rank by position."""
        width = view.tokens.shape[1]
        position = torch.arange(width, device=view.tokens.device).expand_as(view.tokens)
        key = torch.where(view.eligible, -position.double(), -torch.inf)
        return write_best(view, key, view.quota)
