"""Filters on one chunk of logit rows: temperature, top-p, top-k."""

from __future__ import annotations

import torch
from torch import Tensor


def filter_logits(z: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Set what top-p and top-k leave out to -inf.

    Top-p keeps the most likely tokens up to and including the one that crosses p; top-k
    keeps everything not below the k-th. The most likely token always stays. Order and
    definition are those of Dream's ``sample_tokens``.

    Args:
        z: [n, V] float32 logits, already divided by the temperature.
        top_p: [n] float64 in (0, 1]; 1 is off.
        top_k: [n] int64; 0 is off.
    """
    ranked, order = z.sort(dim=-1, descending=True, stable=True)
    probs = ranked.softmax(dim=-1, dtype=torch.float64)
    before = probs.cumsum(dim=-1) - probs
    keep = (before <= top_p[:, None]) | (top_p >= 1.0)[:, None]
    keep[:, 0] = True
    vocab = z.shape[-1]
    last = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab) - 1
    keep &= ranked >= ranked.gather(1, last[:, None])
    allowed = torch.empty_like(keep).scatter_(1, order, keep)
    return z.masked_fill(~allowed, float("-inf"))
