"""KLASS: KL-adaptive stability sampling (arXiv 2511.05664).

A position is written when it is confident and its distribution has settled: between successive
forwards it moved by little, several times in a row.
"""

from __future__ import annotations

import torch

from dllmserve.decoding.rule import Memory, RuleView, Update


class KlassRule:
    """Write positions above the threshold that were calm for kl_history forwards, or the best.

    Calm is a divergence KL(now || before) below kl_threshold. The first forward of a block has
    nothing to compare with and counts as not calm. Where none passes, upstream writes its
    schedule's number of positions; this rule writes one.
    """

    def apply(self, view: RuleView) -> Update:
        """Count calm forwards in the rule's memory."""
        if view.kl is None or view.memory is None:
            raise ValueError("the klass rule needs the kl statistic and a memory")
        calm = view.kl < view.parameter("kl_threshold")
        count = torch.where(calm, view.memory.cells + 1.0, 0.0)
        settled = count >= view.parameter("kl_history")
        write = settled & (view.confidence > view.threshold) & view.eligible
        place = torch.arange(write.shape[-1], device=write.device)
        best = view.eligible & (place == view.confidence.argmax(dim=-1, keepdim=True))
        write = torch.where(write.any(dim=-1, keepdim=True), write, best)
        return Update(view.tokens, write, memory=Memory(view.memory.row, count))
