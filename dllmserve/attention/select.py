"""Which tokens outside a block the block keeps attending to.

Sources: Sparse-dLLM (one set for all heads) and dLLM-Serve, arXiv 2512.17077 (a set per
K,V head; grouped query heads reduce by max). Scores by attention weight are our own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dllmserve.attention.backend import AttentionStep
from dllmserve.core.plan import Span, Store
from dllmserve.core.rows import RowSelect
from dllmserve.device import host_to_device
from dllmserve.parallel.group import SOLO, Group, join

#: Attention weights [heads, queries, keys] of requests that exist at once.
_MAX_WEIGHTS = 1 << 26


@dataclass
class Selection:
    """Selection of a group of spans of one shape.

    Attributes:
        block: the span's positions whose queries score.
        candidates: [C] int64, positions inside the span that compete.
        slots: [b, keep] int64, where the kept ones go.
        pool_kernel, per_head, attention: see :class:`dllmserve.sparse.state.SparseConfig`.
        group: ranks that share the heads.
    """

    block: slice
    candidates: Tensor
    slots: Tensor
    pool_kernel: int
    per_head: bool
    attention: bool
    group: Group = SOLO

    def keep(
        self,
        q: Tensor,  # [b, n, Hq, D]
        k: Tensor,  # [b, n, Hkv, D]
        v: Tensor,  # [b, n, Hkv, D]
        k_cache: Tensor,  # [slots, Hkv, D]
        v_cache: Tensor,
    ) -> None:
        """Write each K,V head's best candidates to the rows' first slots."""
        keys, values = k[:, self.candidates], v[:, self.candidates]  # [b, C, Hkv, D]
        count = self.slots.shape[1]
        if self.attention:
            scores = attention_scores(q[:, self.block], k, self.candidates)
            if not self.per_head:
                scores = join(self.group, scores, 1).amax(dim=1, keepdim=True)
            kept = _kept(_pooled(scores, self.pool_kernel), count, k.shape[2], by_position=True)
        else:
            how = (self.pool_kernel, self.per_head, self.group)
            kept = select_tokens(q[:, self.block], keys, count, *how)
        index = kept[..., None].expand(-1, -1, -1, keys.shape[-1])
        slots = self.slots.flatten()
        k_cache.index_copy_(0, slots, keys.gather(1, index).flatten(0, 1))
        v_cache.index_copy_(0, slots, values.gather(1, index).flatten(0, 1))


def build_selection(
    span: Span, rows: Tensor, step: AttentionStep, settings: RowSelect, shift: int
) -> Selection:
    """The selection of spans that differ in their rows [b] int64 alone."""
    kv, device = step.kv, step.kv.device
    # what the reuse spans that follow compute themselves never competes: the block's
    # window and, in a shifted model, the token before it
    skip_from = max(span.blk_off - shift, 0)
    skip_to = min(span.blk_off + max(span.blk_len, settings.window), span.q_len)
    order = torch.arange(span.q_len, device=device)
    return Selection(
        block=slice(span.blk_off, skip_to),
        candidates=torch.cat((order[:skip_from], order[skip_to:])),
        slots=kv.slots(rows, torch.arange(span.keep, device=device)),
        pool_kernel=settings.pool_kernel,
        per_head=span.store == Store.SELECT_PER_HEAD,
        attention=settings.attention,
        group=step.group,
    )


def row_numbers(spans: list[Span], device: torch.device) -> Tensor:
    """Rows [b] int64 of spans, on the device."""
    return host_to_device([s.row for s in spans], device)


def attention_scores(
    q: Tensor,  # [b, B, Hq, D] the block's queries
    k: Tensor,  # [b, n, Hkv, D] all keys that they attend to
    candidates: Tensor,  # [C] int64
) -> Tensor:
    """Largest weight that any query gives a candidate: [b, Hkv, C] float32."""
    batch, queries, heads, dim = q.shape
    kv_heads, length = k.shape[2], k.shape[1]
    step = max(_MAX_WEIGHTS // (heads * queries * length), 1)
    found = []
    for low in range(0, batch, step):
        part = slice(low, low + step)
        grouped = q[part].float().view(-1, queries, kv_heads, heads // kv_heads, dim)
        weights = torch.einsum("bqhgd,bnhd->bhgqn", grouped, k[part].float()) / dim**0.5
        weights = weights.softmax(dim=-1)[..., candidates]
        found.append(weights.amax(dim=(2, 3)))  # [b, Hkv, C]
    return torch.cat(found)


def mean_scores(
    q: Tensor,  # [b, B, Hq, D] the block's queries
    k: Tensor,  # [b, C, Hkv, D] candidate keys
    per_head: bool,
    group: Group = SOLO,
) -> Tensor:
    """The block's mean query times every candidate: [b, Hkv or 1, C] float32.

    With ``per_head`` a K,V head takes the best of its query heads; else all query heads, those
    of other ranks included, are averaged.
    """
    batch, _, kv_heads, _ = k.shape
    mean = q.float().mean(dim=1).view(batch, kv_heads, q.shape[2] // kv_heads, -1)
    scores = torch.einsum("bhgd,bchd->bhgc", mean, k.float())  # [b, Hkv, g, C]
    if per_head:
        return scores.amax(dim=2)
    return join(group, scores, 1).mean(dim=(1, 2))[:, None]


def select_tokens(
    q: Tensor,  # [b, B, Hq, D] the block's queries
    k: Tensor,  # [b, C, Hkv, D] candidate keys
    keep: int,
    pool_kernel: int,
    per_head: bool,
    group: Group = SOLO,
) -> Tensor:
    """Indices of the kept candidates, ascending: [b, keep, Hkv] int64.

    Scores are those of :func:`mean_scores`, max-pooled over neighbours.
    """
    pooled = _pooled(mean_scores(q, k, per_head, group), pool_kernel)
    return _kept(pooled, keep, k.shape[2])


def _pooled(scores: Tensor, kernel: int) -> Tensor:
    """Scores [..., C], each the largest of ``kernel`` neighbours."""
    if kernel == 1:
        return scores
    # an even kernel yields one score too many; the extra one is dropped
    candidates = scores.shape[-1]
    width = min(kernel, 2 * candidates + 1)  # which already covers everything
    return F.max_pool1d(scores, width, stride=1, padding=width // 2)[..., :candidates]


def _kept(scores: Tensor, keep: int, kv_heads: int, *, by_position: bool = False) -> Tensor:
    """Indices of each K,V head's best of scores [b, Hkv or 1, C], ascending: [b, keep, Hkv]."""
    order = _best(scores, keep, by_position)
    kept = order.sort(dim=-1).values.transpose(1, 2)  # [b, keep, Hkv or 1]
    return kept.expand(-1, keep, kv_heads)


def _best(scores: Tensor, keep: int, by_position: bool) -> Tensor:
    """Indices of the ``keep`` largest scores: [..., keep] int64.

    Max-pooling repeats its maxima, so the cut often falls among equal scores. On a CPU
    torch.topk decides, as in the upstream projects, whose outputs depend on it; on other
    devices its choice is not even repeatable, so there ties go to the lower position, as they
    do everywhere ``by_position``.
    """
    if scores.device.type == "cpu" and not by_position:
        return scores.topk(keep, dim=-1).indices
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :keep]
