"""Fast-dLLM's two caches (arXiv 2505.22618): one refresh per block, then reuse.

The refresh is a forward over the whole canvas at block entry. Its logits write the
block's first tokens, its K,V (of the tokens before that write) are kept. ``refresh_delay`` and
``refresh_every`` refresh more often, ``refresh_window`` widens what the other forwards compute
(dInfer's vicinity refresh, but the window's K,V stay).
"""

from __future__ import annotations

from dllmserve.cache.policy import refreshes, reuse, shifted_start, whole_canvas
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import Span, Store
from dllmserve.core.request import Request


class PrefixCache:
    """Reuse K,V of everything before the block; recompute the block and what follows."""

    def slots(self, request: Request, spec: ModelSpec) -> int:
        """The refresh writes the whole canvas."""
        return request.canvas_len

    def span(self, request: Request, spec: ModelSpec, row: int) -> Span:
        """Whole canvas at block entry, then from the block to the canvas's end."""
        if refreshes(request, request.params.refresh_delay):
            return whole_canvas(request, row, Store.POSITIONS)
        start, end = request.blocks[request.progress.block]
        first = max(shifted_start(start, spec) - request.params.refresh_window, 0)
        return Span(
            row=row,
            q_start=first,
            q_len=request.visible - first,
            ctx_len=first,
            blk_off=start - first,
            blk_len=end - start,
        )

    def unsupported(self, spec: ModelSpec) -> list[str]:
        """Works with every bidirectional model."""
        return []


class DualCache:
    """Reuse K,V of everything outside the block, the masked suffix included."""

    def slots(self, request: Request, spec: ModelSpec) -> int:
        """One slot per canvas position."""
        return request.canvas_len

    def span(self, request: Request, spec: ModelSpec, row: int) -> Span:
        """Whole canvas at block entry, then the block and its window alone."""
        if refreshes(request, request.params.refresh_delay):
            return whole_canvas(request, row, Store.POSITIONS)
        start, end = request.blocks[request.progress.block]
        window = request.params.refresh_window
        first = max(shifted_start(start, spec) - window, 0)
        return reuse(request, row, first, min(end + window, request.visible))

    def unsupported(self, spec: ModelSpec) -> list[str]:
        """Works with every bidirectional model."""
        return []
