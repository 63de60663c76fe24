"""Strict threshold rule (SGLang's LowConfidence and JointThreshold, LLaDA2.1)."""

from __future__ import annotations

import torch

from dllmserve.decoding.rule import RuleView, Update, write_best


class StrictThresholdRule:
    """Write every position whose confidence is above the threshold.

    If those are fewer than ``min_tokens_per_step``, so many of the best. Fast-dLLM's threshold also
    takes a confidence that is equal to it.
    """

    def apply(self, view: RuleView) -> Update:
        """Count the positions that pass; they are the most confident ones."""
        passing = ((view.confidence > view.threshold) & view.eligible).sum(dim=-1)
        return write_best(view, view.confidence, torch.maximum(passing, view.least))
