"""Delayed caching of fresh tokens (dKV-Cache, arXiv 2505.15781).

A written position is computed once more, in the forward after it was written, and then keeps
its K,V. So reuse forwards get shorter as the block fills.
"""

from __future__ import annotations

from dllmserve.cache.dual import DualCache
from dllmserve.cache.policy import refreshes, reuse, shifted_start, whole_canvas
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import Part, Span, Store
from dllmserve.core.request import Request


class DelayedCache(DualCache):
    """Dual cache that does not compute settled positions of the block."""

    def span(self, request: Request, spec: ModelSpec, row: int) -> Span:
        """Whole canvas at block entry, then masks and what was written last.

        A shifted model reads a mask's logits one position earlier, and which of those
        positions are masks themselves the host does not know; so it computes as many more.
        """
        progress = request.progress
        if refreshes(request, request.params.refresh_delay):
            return whole_canvas(request, row, Store.POSITIONS)
        start, end = request.blocks[progress.block]
        block = reuse(request, row, shifted_start(start, spec), end)
        count = progress.masks_left * (1 + spec.logit_shift) + progress.wrote
        return block._replace(
            q_len=min(count, block.q_len), store=Store.AHEAD, pick=block.q_len, must=Part.MASKED
        )
