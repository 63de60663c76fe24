"""Requests of block-causal models, whose pages grow, for any model."""

from dllmserve.core.canvas import window_canvas
from dllmserve.core.request import Request
from dllmserve.sampling_params import SamplingParams


def paged_request(
    number: int, ids: list[int], params: SamplingParams, seed: int = 0, shift: int = 0
) -> Request:
    """An answer behind a prompt, in windows of ``block_length``."""
    length, part = params.resolved_block_length, params.sub_block_length
    canvas = window_canvas(ids, params.gen_length, length, shift, part)
    return Request(number, canvas, params, seed)
