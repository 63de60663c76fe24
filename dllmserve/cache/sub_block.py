"""Fast-dLLM v2's block cache (``use_block_cache=True``): most forwards compute a sub-block alone.

The K,V of a window that is being filled are kept as the last forward left them that computed them:
of all its positions, or of a sub-block. So those outside the sub-block may be out of date, which
moves tokens; what is stored of a finished window is exact. They cannot be computed anew, so the
request keeps its pages. Source: ``generate`` of the public checkpoints' modeling.py.
"""

from __future__ import annotations

from dllmserve.cache.paged import PagedCache
from dllmserve.cache.policy import reuse
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import Span, Store
from dllmserve.core.request import Request


class SubBlockCache(PagedCache):
    """The block's window until the sub-block's first position is written, then the sub-block."""

    def span(self, request: Request, spec: ModelSpec, row: int) -> Span:
        """As paged, but where that computes the window alone."""
        span, progress = super().span(request, spec, row), request.progress
        if span.store == Store.POSITIONS:
            return span  # it stores what precedes the window, and the window where it computes it
        size = request.params.sub_block_length or span.q_len
        start, end = request.blocks[progress.block]
        first = start // size * size  # a model may have decided the window's first position before
        written = request.canvas.start + progress.frontier > first
        if progress.step_in_block == 0 or not written:
            return span._replace(store=Store.POSITIONS)
        return reuse(request, row, first, end)._replace(ctx_len=span.q_start + span.q_len)
