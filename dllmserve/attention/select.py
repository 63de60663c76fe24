"""Which tokens outside a block the block keeps attending to.

Sources: Sparse-dLLM (one set for all heads) and dLLM-Serve, arXiv 2512.17077 (a set per
K,V head; grouped query heads reduce by max).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def select_tokens(
    q: Tensor,  # [b, B, Hq, D] the block's queries
    k: Tensor,  # [b, C, Hkv, D] candidate keys
    keep: int,
    pool_kernel: int,
    per_head: bool,
) -> Tensor:
    """Indices of the kept candidates, ascending: [b, keep, Hkv] int64.

    A candidate's score for a query head is the block's mean query times its key. With
    ``per_head`` a K,V head takes the best of its group; else all query heads are
    averaged and every K,V head keeps the same tokens. Scores are max-pooled over
    neighbours.
    """
    batch, candidates, kv_heads, _ = k.shape
    group = q.shape[2] // kv_heads
    mean = q.float().mean(dim=1).view(batch, kv_heads, group, -1)  # [b, Hkv, g, D]
    scores = torch.einsum("bhgd,bchd->bhgc", mean, k.float())  # [b, Hkv, g, C]
    if per_head:
        scores = scores.amax(dim=2)  # [b, Hkv, C]
    else:
        scores = scores.mean(dim=(1, 2))[:, None]  # [b, 1, C]
    if pool_kernel > 1:
        # an even kernel yields one score too many; the extra one is dropped
        width = min(pool_kernel, 2 * candidates + 1)  # which already covers everything
        pooled = F.max_pool1d(scores, width, stride=1, padding=width // 2)
        scores = pooled[..., :candidates]
    order = _best(scores, keep)
    kept = order.sort(dim=-1).values.transpose(1, 2)  # [b, keep, Hkv or 1]
    return kept.expand(batch, keep, kv_heads)


def _best(scores: Tensor, keep: int) -> Tensor:
    """Indices of the ``keep`` largest scores: [..., keep] int64.

    Max-pooling repeats its maxima, so the cut often falls among equal scores. On a CPU
    torch.topk decides, as in the upstream projects, whose outputs depend on it; on other
    devices its choice is not even repeatable, so there ties go to the lower position.
    """
    if scores.device.type == "cpu":
        return scores.topk(keep, dim=-1).indices
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :keep]
