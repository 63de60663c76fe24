"""A cache policy that grows: block-causal attention, whose K,V are final block by block."""

from collections.abc import Iterator
from contextlib import contextmanager

from dllmserve.catalog import CACHES, CacheInfo
from dllmserve.core.canvas import template_canvas
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import Mask, Part, Span, Store
from dllmserve.core.request import Request
from dllmserve.sampling_params import SamplingParams


class PagedCache:
    """Stores what stands before a block, in chunks, and then fills the block against it."""

    def slots(self, request: Request, spec: ModelSpec) -> int:
        """The last block is never stored."""
        return request.blocks[-1][0]

    def span(self, request: Request, spec: ModelSpec, row: int) -> Span:
        """Store up to the block's start, then the block alone."""
        start, end = request.blocks[request.progress.block]
        stored = request.progress.stored
        if stored < start:
            return Span(
                row,
                stored,
                start - stored,
                stored,
                Store.POSITIONS,
                head=Part.NONE,
                mask=Mask.STAIR,
                mask_arg=request.params.resolved_block_length,
            )
        return Span(row, start, end - start, start, blk_len=end - start)

    def unsupported(self, spec: ModelSpec) -> list[str]:
        """Any model, in tests."""
        return []


@contextmanager
def paged_cache() -> Iterator[None]:
    """``cache="paged"`` in the catalogue."""
    CACHES.own["paged"] = CacheInfo("tests.paged:PagedCache", grows=True)
    try:
        yield
    finally:
        del CACHES.own["paged"]


def paged_request(number: int, ids: list[int], params: SamplingParams, seed: int = 0) -> Request:
    """An answer behind a prompt, in blocks that are cut from position 0 on."""
    holes = ((len(ids), len(ids) + params.gen_length),)
    canvas = template_canvas(ids, holes, params.resolved_block_length)
    return Request(number, canvas, params, seed)
