"""Hierarchical rule (dInfer's HierarchyDecoder): divide the masks, and write in each part.

Neighbours depend on each other most, so several moderately sure positions may be written at
once as long as they are apart.
"""

from __future__ import annotations

import torch

from dllmserve.decoding.rule import RuleView, Update


class HierarchyRule:
    """Write what is above the threshold, the best of every run of masks, and always the best.

    A run is a maximal sequence of masked positions in the block. Its best position is written
    if its confidence is above ``low_threshold``; of equal ones, the first. dInfer's variant that
    opens written positions again is not part of it.
    """

    def apply(self, view: RuleView) -> Update:
        """Find each run's best position."""
        eligible, confidence = view.eligible, view.confidence
        width = eligible.shape[-1]
        place = torch.arange(width, device=eligible.device).expand_as(confidence)
        before = torch.nn.functional.pad(eligible[:, :-1], (1, 0))
        run = (eligible & ~before).cumsum(dim=-1)  # number of the run, from 1
        best = torch.full_like(confidence[:, :1], -torch.inf).repeat(1, width + 1)
        best = best.scatter_reduce(1, run, confidence, "amax")
        ahead = (confidence == best.gather(1, run)) & eligible
        # of equal ones the first: the lowest place of each run's candidates
        first = torch.full_like(place[:, :1], width).repeat(1, width + 1)
        first = first.scatter_reduce(1, run, torch.where(ahead, place, width), "amin")
        leads = ahead & (place == first.gather(1, run))
        write = leads & (confidence > view.parameter("low_threshold"))
        write |= confidence > view.threshold
        write |= eligible & (place == confidence.argmax(dim=-1, keepdim=True))
        return Update(tokens=view.tokens, write=write & eligible)
