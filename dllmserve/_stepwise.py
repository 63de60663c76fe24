"""SamplingParams with the pace that the command line and servers fill in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dllmserve._values import BLOCK_LENGTH, NotGiven
from dllmserve.presets import steps_for
from dllmserve.sampling_params import SamplingParams


def stepwise(given: Mapping[str, Any], tokens: int | None = None) -> SamplingParams:
    """Parameters with the block length and steps that the command line and servers fill in.

    Args:
        given: fields of SamplingParams. A quality and a SparseConfig bring a block length.
        tokens: a step's most, unless ``steps`` are given; None is one, or what a quality says.

    Example:
        >>> stepwise({"gen_length": 48}).steps
        64
    """
    quality = given.get("quality")
    block = {} if quality or given.get("sparse") else {"block_length": NotGiven(BLOCK_LENGTH)}
    params = SamplingParams(**{**block, **given})
    if "steps" in given or (quality and tokens is None):
        return params
    steps = steps_for(params.gen_length, params.resolved_block_length, tokens or 1)
    return replace(params, steps=NotGiven(steps))
