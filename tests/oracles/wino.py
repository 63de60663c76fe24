"""WINO's shadow: a second copy of the block, all masks, that judges the tokens already written.

A shadow token stands where its slot's query stands and sees everything but that slot, so its
logits say how likely the slot's token is given all others.
"""

import torch
from torch import Tensor

from .models import KV, OracleModel
from .spans import Block


def positions(block: Block, shift: int) -> list[int]:
    """Of each shadow token; in a shifted model it predicts the slot behind it."""
    return [max(p - shift, 0) for p in range(block.start, block.end)]


def visible(real: int, block: Block, limit: int) -> Tensor:
    """Who sees whom [real + B, limit + B] bool: queries and keys are real tokens, then shadows."""
    size = block.end - block.start
    sees: list[list[bool]] = []
    for query in range(real + size):
        if query < real:
            sees.append([key < limit for key in range(limit + size)])
        else:
            sees.append([key != block.start + query - real for key in range(limit + size)])
    return torch.tensor(sees)


def forward(
    model: OracleModel,
    tokens: list[int],
    rows: list[int],
    past: list[KV] | None,  # stored K,V of [0, limit) and B empty rows
    block: Block,
    limit: int,
) -> tuple[Tensor, list[KV], Tensor]:
    """Logits [Q, V] and K,V of the real rows, and the shadow's logits [B, V]."""
    shift = int(model.shifted)
    size = block.end - block.start
    out = model.forward(
        torch.tensor([tokens + [model.mask_id] * size]),
        torch.tensor(rows + positions(block, shift)),
        past,
        None if past is None else rows + list(range(limit, limit + size)),
        visible(len(rows), block, limit),
    )
    real = len(rows)
    kv = [(k[:, :, :real], v[:, :, :real]) for k, v in out.kv]
    return out.logits[0, :real], kv, out.logits[0, real:]
