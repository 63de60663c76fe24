"""Dynamic rule (SDAR's low_confidence_dynamic): a schedule, and more where the model is sure."""

from __future__ import annotations

import torch

from dllmserve.decoding.rule import RuleView, Update, write_best


class DynamicRule:
    """Write all positions whose confidence is above the threshold, but no fewer than the quota.

    Nor fewer than ``min_tokens_per_step``.
    """

    def apply(self, view: RuleView) -> Update:
        """Positions that pass are the most confident ones."""
        passing = ((view.confidence > view.threshold) & view.eligible).sum(dim=-1)
        least = torch.maximum(view.quota, view.least)
        return write_best(view, view.confidence, torch.maximum(passing, least))
