"""Fast-dLLM's two caches (arXiv 2505.22618): one refresh per block, then reuse.

The refresh is a forward over the whole canvas at block entry. Its logits write the
block's first tokens, its K,V (of the tokens before that write) are kept.
"""

from __future__ import annotations

from dllmserve.cache.policy import shifted_start, whole_canvas
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import Span, Write
from dllmserve.core.request import Request


class PrefixCache:
    """Reuse K,V of everything before the block; recompute the block and what follows."""

    def slots(self, request: Request, spec: ModelSpec) -> int:
        """The refresh writes the whole canvas."""
        return request.canvas_len

    def span(self, request: Request, spec: ModelSpec, row: int) -> Span:
        """Whole canvas at block entry, then from the block to the canvas's end."""
        if request.progress.step_in_block == 0:
            return whole_canvas(request, row, Write.ALL)
        start, end = request.block_range(request.progress.block)
        first = shifted_start(start, spec)
        return Span(
            row=row,
            q_start=first,
            q_len=request.canvas_len - first,
            ctx_len=first,
            write=int(Write.NONE),
            keep=0,
            blk_off=start - first,
            blk_len=end - start,
            stair=0,
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
        """Whole canvas at block entry, then the block alone."""
        if request.progress.step_in_block == 0:
            return whole_canvas(request, row, Write.ALL)
        start, end = request.block_range(request.progress.block)
        first = shifted_start(start, spec)
        return Span(
            row=row,
            q_start=first,
            q_len=end - first,
            ctx_len=request.canvas_len,
            write=int(Write.ALL),
            keep=0,
            blk_off=start - first,
            blk_len=end - start,
            stair=0,
        )

    def unsupported(self, spec: ModelSpec) -> list[str]:
        """Works with every bidirectional model."""
        return []
