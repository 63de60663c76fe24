"""Partial refresh: recompute the positions whose K,V moved most.

Only the first refresh of an answer computes the whole canvas. Later ones compute the block and a
share of the other positions: first those whose token was written since they were computed, then
those whose V moved furthest (by cosine, in the middle layer) the last time they were. The idea
that few rows change between steps, and that V tells which, is dLLM-Cache's (arXiv 2506.06295);
there, V of all rows is computed in every step, and each layer chooses for itself.
"""

from __future__ import annotations

import math

from dllmserve.cache.dual import DualCache
from dllmserve.cache.policy import refreshes, reuse, shifted_start, whole_canvas
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import Part, Span, Store
from dllmserve.core.request import Request


class DriftCache(DualCache):
    """Dual cache whose refreshes are partial."""

    def span(self, request: Request, spec: ModelSpec, row: int) -> Span:
        """Whole canvas once, then the block with a share of the rest, or the block alone."""
        progress, seen = request.progress, request.visible
        if progress.forwards == 0:
            return whole_canvas(request, row, Store.POSITIONS)
        start, end = request.blocks[progress.block]
        first = shifted_start(start, spec)
        if not refreshes(request):
            return reuse(request, row, first, end)
        others = seen - (end - first)
        # suffix_window brings positions into view that were never computed: all of them are
        fresh = 0 if progress.step_in_block else max(seen - max(progress.seen_before, end), 0)
        share = math.ceil(request.params.refresh_share * others)
        canvas = reuse(request, row, 0, seen)
        return canvas._replace(
            q_len=min(end - first + share + fresh, seen),
            store=Store.AHEAD,
            pick=seen,
            must=Part.BLOCK,
        )
