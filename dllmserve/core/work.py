"""Work: what a request costs, known when it arrives."""

from __future__ import annotations

from dllmserve.catalog import RULES
from dllmserve.core.canvas import Canvas
from dllmserve.core.request import Request

#: forwards that a block may take beyond one a position, if its rule masks positions again (WINO)
REVOKED = 29


def forwards_of(request: Request) -> int:
    """Forward passes that decide tokens, at most."""
    if RULES[request.params.unmask].quota == "exact":
        return sum(len(block) for block in request.quotas)
    if request.noise:
        return request.params.max_denoising_steps * len(request.blocks)
    if request.revokes:
        return sum(request.masks) + REVOKED * len(request.blocks)
    if request.params.edits:
        return sum(request.masks) + request.params.max_edit_steps * len(request.blocks)
    return sum(request.masks)


def work_of(request: Request, forwards: int | None = None, tokens: int | None = None) -> int:
    """Tokens that a request computes: at most, or if its answer ends early.

    With full attention a forward computes the canvas, of each row; a cache makes it cost less.
    Block-causal and autoregressive requests store each token once, and a forward computes the
    block's window; what is lost to preemption comes on top.

    Args:
        request: the request.
        forwards: that are expected to decide tokens; None is the most.
        tokens: that are expected of the answer; None is all of its blocks.

    Example:
        An autoregressive answer of 10 tokens behind 5 computes all of them but the last:
        ``work_of(request)`` is 14.
    """
    forwards = forwards_of(request) if forwards is None else forwards
    canvas, length = request.canvas, request.canvas_len
    if canvas.window:
        return _stored_once(canvas, forwards, tokens)
    if tokens is not None and request.params.suffix_window is not None:
        length = min(length, request.prompt_len + tokens + request.params.suffix_window)
    return forwards * length * request.rows_needed


def _stored_once(canvas: Canvas, forwards: int, tokens: int | None) -> int:
    """Tokens of the windows that are stored, and of one window for each forward beside those.

    The last window is not stored. Where logits are shifted, the forward that decides a window's
    first position stores the window before and computes nothing else.
    """
    start, unit, origin = canvas.start, canvas.unit, canvas.origin
    end = canvas.end if tokens is None else min(start + tokens, canvas.end)
    alone = canvas.shift * (-(-(end - origin) // unit) - -(-(start - origin) // unit))
    return canvas.around(end - 1)[0] + max(forwards - alone, 0) * unit
