"""Factor rule as Fast-dLLM's paper states it (arXiv 2505.22618), without its code's exceptions."""

from __future__ import annotations

import torch

from dllmserve.decoding.rule import RuleView, Update, write_best


class StrictFactorRule:
    """Write the longest run of best positions whose j-th confidence is >= 1 - f/(j + 1).

    The first always passes. One that fails is not written, whatever its place; ``factor``
    follows the code, where a failure at the last place is.
    """

    def apply(self, view: RuleView) -> Update:
        """Count the positions before the first failure."""
        ranked = view.confidence.sort(dim=-1, descending=True).values  # [n, W]
        place = torch.arange(ranked.shape[-1], device=ranked.device)  # 0-based rank
        least = 1.0 - view.parameter("factor") / (place + 2.0)
        passes = (ranked >= least) | (place == 0)
        return write_best(view, view.confidence, passes.cumprod(dim=-1).sum(dim=-1))
