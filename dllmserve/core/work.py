"""Work: what a request costs at most, known when it arrives."""

from __future__ import annotations

from dllmserve.catalog import RULES
from dllmserve.core.request import Request

#: forwards that a block may take beyond one a position, if its rule masks positions again (WINO)
REVOKED = 29


def forwards_of(request: Request) -> int:
    """Forward passes that a request takes at most."""
    if RULES[request.params.unmask].quota == "exact":
        return sum(len(block) for block in request.quotas)
    if request.revokes:
        return sum(request.masks) + REVOKED * len(request.blocks)
    return sum(request.masks)


def work_of(request: Request) -> int:
    """Steps x canvas tokens x rows: what a request costs at most.

    A rule that writes several tokens a step, an early end and a cache make it cost less.
    """
    return forwards_of(request) * request.canvas_len * request.rows_needed
