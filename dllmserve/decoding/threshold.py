"""Threshold rule of Fast-dLLM v1 (arXiv 2505.22618)."""

from __future__ import annotations

from dllmserve.decoding.rule import RuleView, Update, write_best


class ThresholdRule:
    """Write every position whose confidence is at least the threshold, and always the best."""

    def apply(self, view: RuleView) -> Update:
        """Count the positions that pass; they are the most confident ones."""
        passing = (view.confidence >= view.threshold) & view.eligible
        return write_best(view, view.confidence, passing.sum(dim=-1))
