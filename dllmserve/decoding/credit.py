"""Credit rule (dInfer's CreditThresholdParallelDecoder).

A token that keeps being a position's favourite earns credit, which raises its logit, so that a
stable but lukewarm prediction passes the threshold sooner. The credits are kept by
:class:`dllmserve.runtime.edits.CreditEdit`; this rule sees the raised confidences.
"""

from __future__ import annotations

from dllmserve.decoding.threshold_dinfer import DinferThresholdRule


class CreditRule(DinferThresholdRule):
    """dInfer's threshold, on raised confidences."""
