"""Sparse attention: keep the part of the context that the block looks at.

Source: Sparse-dLLM's delayed eviction; per-head selection from dLLM-Serve
(arXiv 2512.17077).
"""

from __future__ import annotations

from dllmserve._values import SparseConfig
from dllmserve.cache.policy import shifted_start, whole_canvas
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import Span, Store
from dllmserve.core.request import Request


class SparseCache:
    """Whole canvas up to ``delay_step``, select there, then the block alone."""

    def slots(self, request: Request, spec: ModelSpec) -> int:
        """The largest number of tokens that any block keeps."""
        sparse = _config(request)
        blocks, length = range(len(request.blocks)), request.canvas_len
        return max(sparse.keep(_candidates(request, spec, block, length)) for block in blocks)

    def span(self, request: Request, spec: ModelSpec, row: int) -> Span:
        """Full, select or reuse, by the number of forwards the block has had."""
        sparse = _config(request)
        step = request.progress.step_in_block
        # fixed for the block, because what is kept later is what was selected
        seen = request.progress.seen
        keep = sparse.keep(_candidates(request, spec, request.progress.block, seen))
        if step < sparse.delay_step:
            return whole_canvas(request, row, Store.NONE, length=seen)
        if step == sparse.delay_step:
            mode = Store.SELECT_PER_HEAD if sparse.head_select else Store.SELECT_SHARED
            return whole_canvas(request, row, mode, keep=keep, length=seen)
        start, end = request.blocks[request.progress.block]
        first = shifted_start(start, spec)
        return Span(
            row=row,
            q_start=first,
            q_len=end - first,
            ctx_len=keep,
            blk_off=start - first,
            blk_len=end - start,
        )

    def unsupported(self, spec: ModelSpec) -> list[str]:
        """Works with every bidirectional model."""
        return []


def _config(request: Request) -> SparseConfig:
    if request.sparse is None:
        raise ValueError("the sparse policy was chosen for a request without a SparseConfig")
    return request.sparse


def _candidates(request: Request, spec: ModelSpec, block: int, length: int) -> int:
    """Tokens that may be kept: all of the canvas's first ``length`` outside the block's window."""
    start, end = request.blocks[block]
    window_end = max(end, min(start + _config(request).default_block_len, length))
    return length - (window_end - shifted_start(start, spec))
