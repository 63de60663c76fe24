"""Credit rule (dInfer's CreditThresholdParallelDecoder).

A token that keeps being a position's favourite earns credit, which raises its logit, so that a
stable but lukewarm prediction passes the threshold sooner. The credits are kept by
:class:`dllmserve.runtime.edits.CreditEdit`; this rule sees the raised confidences.
"""

from __future__ import annotations

import torch

from dllmserve.decoding.rule import RuleView, Update, write_best


class CreditRule:
    """Write every position within 1e-5 of the best, or at least as confident as the threshold.

    The tolerance is dInfer's: where no position passes, near ties of the best go together.
    """

    def apply(self, view: RuleView) -> Update:
        """Lower the threshold to the best position, if none passes."""
        best = view.confidence.amax(dim=-1, keepdim=True)
        passing = (view.confidence >= torch.minimum(view.threshold, best - 1e-5)) & view.eligible
        return write_best(view, view.confidence, passing.sum(dim=-1))
