"""Strict threshold rule (SGLang's LowConfidence, LLaDA2, SDAR's dynamic decoding)."""

from __future__ import annotations

from dllmserve.decoding.rule import RuleView, Update, write_best


class StrictThresholdRule:
    """Write every position whose confidence is above the threshold; without one, the best.

    Fast-dLLM's threshold also takes a confidence that is equal to it.
    """

    def apply(self, view: RuleView) -> Update:
        """Count the positions that pass; they are the most confident ones."""
        passing = (view.confidence > view.threshold) & view.eligible
        return write_best(view, view.confidence, passing.sum(dim=-1))
