"""Threshold rule as dInfer has it (ThresholdParallelDecoder): near ties of the best go together."""

from __future__ import annotations

import torch

from dllmserve.decoding.rule import RuleView, Update, write_best


class DinferThresholdRule:
    """Write every position at least as confident as the threshold, or within 1e-5 of the best."""

    def apply(self, view: RuleView) -> Update:
        """Lower the threshold to just below the best position, if that is lower."""
        best = view.confidence.amax(dim=-1, keepdim=True)
        passing = (view.confidence >= torch.minimum(view.threshold, best - 1e-5)) & view.eligible
        return write_best(view, view.confidence, passing.sum(dim=-1))
