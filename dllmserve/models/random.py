"""Models without a checkpoint's weights, for benchmarks (load_format="dummy")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dllmserve.layers.modules import Weight, put
from dllmserve.models.decoder import Decoder
from dllmserve.models.loader import empty_decoder
from dllmserve.parallel.partition import Partition


def random_decoder(partition: Partition, **options: Any) -> Decoder:
    """A decoder with seeded random weights.

    A rank's are its part of the whole model's, so they do not depend on the number of ranks; of a
    model with a shared expert they depend on whether ranks divide experts between them.

    Args:
        partition, options: as for :func:`empty_decoder`.
    """
    decoder = empty_decoder(partition, **options)
    generator = torch.Generator(device=decoder.head.weight.device).manual_seed(0)
    for weight in decoder.weights:
        if weight.ones and isinstance(weight.data, Tensor):
            weight.data.fill_(1.0)
        else:
            _randomize(weight, generator)
    return decoder


def _randomize(weight: Weight, generator: torch.Generator) -> None:
    rows_of = {part.name: part.shape[0] for part in weight.parts}
    shape = (sum(rows_of.values()), *weight.parts[0].shape[1:])
    # in place where a rank has all of it: an embedding's copy takes a gigabyte
    if isinstance(weight.data, Tensor) and weight.data.shape == shape:
        weight.data.normal_(0.0, 0.02, generator=generator)
        return
    whole = torch.empty(shape, dtype=weight.dtype, device=generator.device)
    whole.normal_(0.0, 0.02, generator=generator)
    drawn = dict(zip(rows_of, torch.split(whole, list(rows_of.values())), strict=True))
    for part, rows in weight.places():
        put(rows, drawn[part.name][part.cut])
