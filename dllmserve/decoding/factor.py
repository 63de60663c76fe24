"""Factor rule of Fast-dLLM v1 (arXiv 2505.22618, get_transfer_index_dynamic)."""

from __future__ import annotations

import torch

from dllmserve.decoding.rule import RuleView, Update, write_best


class FactorRule:
    """Write the longest run of best positions whose j-th confidence is >= 1 - f/(j + 1).

    As upstream does it: the first position always passes, and where the first failure is
    the last candidate, that one is written too.
    """

    def apply(self, view: RuleView) -> Update:
        """Find the first failing rank of each row."""
        ranked = view.confidence.sort(dim=-1, descending=True).values  # [n, W]
        width = ranked.shape[-1]
        place = torch.arange(width, device=ranked.device)  # 0-based rank
        least = 1.0 - view.parameter("factor") / (place + 2.0)
        masks = view.eligible.sum(dim=-1)  # [n]
        fails = (ranked < least) & (place > 0) & (place < masks[:, None])
        # without a failure the upstream index stays at the last candidate
        first = torch.where(fails, place, width).amin(dim=-1)
        first = torch.where(first == width, masks - 1, first)
        quirk = (first == 0) | (first == masks - 1)
        return write_best(view, view.confidence, first + quirk)
