"""WINO: wide in, narrow out (arXiv 2507.18578).

Accept boldly, and check what was accepted: a blind span, the block once more as masks alone (the
paper's shadow), predicts every written token from the rest of the canvas. What it finds unlikely
is masked again.
"""

from __future__ import annotations

import torch

from dllmserve.decoding.rule import Memory, RuleView, Update, rank_of


class WinoRule:
    """Accept above the threshold, at most 70 % of the masks (5 to 20); re-mask what is doubted.

    If more than one position was accepted, those written in earlier forwards whose probability
    in the blind span is below threshold_back are masked again: all of them, but fewer than were
    accepted in the forward before, the least likely first. So masks do come to an end.
    """

    def apply(self, view: RuleView) -> Update:
        """Write, then doubt."""
        if view.back is None or view.memory is None:
            raise ValueError("the wino rule needs back-confidences and a memory")
        eligible, confidence = view.eligible, view.confidence
        masks = eligible.sum(dim=-1)
        most = (masks * 7 // 10).clamp(min=5, max=20)
        passing = ((confidence > view.threshold) & eligible).sum(dim=-1)
        count = torch.minimum(passing, most).clamp(min=1)
        write = (rank_of(confidence) < count[:, None]) & eligible
        accepted = write.sum(dim=-1)
        doubted = view.back < view.parameter("threshold_back")  # +inf where unwritten
        suspects = doubted.sum(dim=-1)
        before = view.memory.row.long()
        room = torch.where(suspects >= before, before - 1, suspects)
        room = torch.where(accepted > 1, room, 0)
        remask = (rank_of(-view.back) < room[:, None]) & doubted
        # a row without masks (padding) keeps what it has
        row = torch.where(accepted > 0, accepted.double(), view.memory.row)
        return Update(view.tokens, write, remask, Memory(row, view.memory.cells))
