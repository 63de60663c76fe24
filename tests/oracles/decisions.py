"""What a canvas says of its holes: one forward over one row, without batch, pages or padding."""

from collections.abc import Sequence

import torch

from .models import OracleModel, shift


def read(
    model: OracleModel,
    ids: Sequence[int],
    holes: Sequence[int],
    candidates: Sequence[Sequence[int]],
) -> list[list[float]]:
    """Natural log-probabilities of the candidates of each hole, all holes being masked.

    Those of a softmax over all ids, in float64.
    """
    row = torch.tensor([list(ids)])
    row[0, list(holes)] = model.mask_id
    logits = model(row)
    if model.shifted:
        logits = shift(logits)
    logs = torch.log_softmax(logits[0].double(), dim=-1)
    return [[float(logs[h, c]) for c in own] for h, own in zip(holes, candidates, strict=True)]
