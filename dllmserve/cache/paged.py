"""Exact K,V in pages, for block-causal and autoregressive models.

A window's K,V depend on itself and on what stands before it, so those of a finished window are
final. They are stored once: the prompt's in chunks, an answer's window when all of it is written.
That forward is also the first of the next window (or, of a model whose logits are read one
position earlier, the one that decides the next position), which sees the same K,V as if it came
after.

Of a canvas with frames, what is kept of a frame differs from what it sees of itself while it is
filled. So a forward that stores one decides nothing of the next but its first position, which it
sees as a causal model does.
"""

from __future__ import annotations

from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import Mask, Part, Span, Store
from dllmserve.core.request import Request


class PagedCache:
    """Store what precedes the block's window, with the block; then compute that window alone."""

    def slots(self, request: Request, spec: ModelSpec) -> int:
        """The canvas; K,V of the last window may be stored, and are not read."""
        return len(request.canvas)

    def span(self, request: Request, spec: ModelSpec, row: int) -> Span:
        """The block, with all that precedes it and is not stored yet.

        The scheduler cuts that where it is long: a chunk of it is stored, and decides nothing.
        """
        canvas, stored = request.canvas, request.progress.stored
        window, start, end = canvas.window, *request.blocks[request.progress.block]
        first, last = canvas.around(start)
        if stored == first:
            # with nothing before it it sees the same; a step of refreshes alone would be another
            mask, argument = (Mask.FULL, 0) if first else (Mask.STAIR, window)
            return Span(
                row,
                first,
                last - first,
                first,
                blk_off=start - first,
                blk_len=end - start,
                mask=mask,
                mask_arg=argument,
            )
        # a block that is read at the position before it
        if canvas.shift and start == first >= canvas.start:
            return _stored(row, stored, first, window, (start, end))
        if canvas.frame:
            return _stored(row, stored, first, window, (0, 0))
        return _stored(row, stored, last, window, (start, end))

    def unsupported(self, spec: ModelSpec) -> list[str]:
        """Works with every model whose canvas is cut into windows."""
        return []


def _stored(row: int, first: int, last: int, window: int, block: tuple[int, int]) -> Span:
    """Positions ``first .. last - 1``, whose K,V are stored, and a block behind or among them."""
    start, end = block
    return Span(
        row,
        first,
        last - first,
        first,
        Store.POSITIONS,
        blk_off=max(start - first, 0),
        blk_len=end - start,
        head=Part.MASKED if end > start else Part.NONE,
        mask=Mask.STAIR,
        mask_arg=window,
    )
