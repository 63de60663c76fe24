"""One merged forward ends a block and starts the next.

A dual cache refreshes at every block entry. Here only the first block does; later, the entry
forward computes the block just finished together with the new one. So the finished block's K,V
are those of its final tokens, and the cost of a block no longer grows with the canvas. K,V of
what lies further away stay as they were.
"""

from __future__ import annotations

from dllmserve.cache.dual import DualCache
from dllmserve.cache.policy import reuse, shifted_start
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import Span
from dllmserve.core.request import Request


class RollingCache(DualCache):
    """Dual cache whose block entries compute two blocks in place of the canvas."""

    def span(self, request: Request, spec: ModelSpec, row: int) -> Span:
        """Whole canvas at the answer's start, two blocks at an entry, then the block alone."""
        progress = request.progress
        if progress.block == 0 or progress.step_in_block > 0:
            return super().span(request, spec, row)
        start, _ = request.blocks[progress.block - 1]
        _, end = request.blocks[progress.block]
        if request.params.suffix_window is not None:
            end = request.visible  # what has come into view was never computed
        return reuse(request, row, shifted_start(start, spec), end)
