"""Delayed caching of fresh tokens (dKV-Cache, arXiv 2505.15781).

A written position is computed once more, in the forward after it was written, and then keeps
its K,V. So reuse forwards get shorter as the block fills.
"""

from __future__ import annotations

from dllmserve.cache.policy import refreshes, shifted_start, whole_canvas
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import Span, Write
from dllmserve.core.request import Request


class DelayedCache:
    """Dual cache that does not compute settled positions of the block."""

    def slots(self, request: Request, spec: ModelSpec) -> int:
        """One slot per canvas position."""
        return request.canvas_len

    def span(self, request: Request, spec: ModelSpec, row: int) -> Span:
        """Whole canvas at block entry, then masks and what was written last.

        A shifted model reads a mask's logits one position earlier, and which of those
        positions are masks themselves the host does not know; so it computes as many more.
        """
        progress = request.progress
        if refreshes(request, request.params.refresh_delay):
            return whole_canvas(request, row, Write.ALL)
        start, end = request.block_range(progress.block)
        first = shifted_start(start, spec)
        masks = progress.masks_left * (1 + spec.logit_shift)
        return Span(
            row=row,
            q_start=first,
            q_len=min(masks + progress.wrote, end - first),
            ctx_len=request.visible,
            write=int(Write.FIRST),
            keep=0,
            blk_off=start - first,
            blk_len=end - start,
            stair=0,
            pick=end - first,
        )

    def unsupported(self, spec: ModelSpec) -> list[str]:
        """Works with every bidirectional model."""
        return []
