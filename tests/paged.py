"""Requests of block-causal models, whose pages grow, for any model."""

from dllmserve.core.canvas import framed_canvas, window_canvas
from dllmserve.core.request import Request
from dllmserve.sampling_params import SamplingParams


def paged_request(
    number: int,
    ids: list[int],
    params: SamplingParams,
    seed: int = 0,
    shift: int = 0,
    framed: bool = False,
) -> Request:
    """An answer behind a prompt, in windows, or frames, of ``block_length``."""
    length, part = params.resolved_block_length, params.sub_block_length
    canvas = window_canvas(ids, params.gen_length, length, shift, part)
    if framed:
        canvas = framed_canvas(ids, params.gen_length, length)
    return Request(number, canvas, params, seed)


def frontier(request: Request, left: int) -> int:
    """What a block cache's spans follow: positions written, with ``left`` masks in the block.

    Not all that are asked for, which would end the request before its last block is whole.
    """
    if request.policy != "sub_block":
        return 0
    written = sum(request.masks[: request.progress.block + 1]) - left
    return min(written, request.canvas.answer_len - 1)
