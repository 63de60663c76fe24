"""A span attended in loops, from the definition in core/plan.py alone."""

import torch
from torch import Tensor

from dllmserve.core.plan import Mask, Span, Store
from dllmserve.core.rows import RowSelect
from tests.oracles import sparse_dllm

Slots = dict[int, tuple[Tensor, Tensor]]  # slot of a row -> K [Hkv, D], V [Hkv, D]


def attend(
    span: Span,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Slots,
    window: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Output [q_len, Hq, D] of q, k, v [q_len, H, D]; POSITIONS and AHEAD fill the row's slots."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    positions = range(span.q_start, span.q_start + span.q_len)
    if span.store in (Store.POSITIONS, Store.AHEAD):
        slots.update({p: (k[i], v[i]) for i, p in enumerate(positions)})
        seen = [p for p in range(span.ctx_len) if p not in positions]
    else:
        seen = list(range(span.ctx_len))
    own = [(p, k[i], v[i]) for i, p in enumerate(positions)]
    if span.store == Store.AHEAD:
        seen, own = list(range(span.ctx_len)), []
    keys = [(s, *slots[s]) for s in seen] + own
    stair = span.mask_arg if span.mask == Mask.STAIR else 0
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for i, p in enumerate(positions):
        visible = [e for e in keys if not stair or e[0] // stair <= p // stair]
        if span.mask == Mask.BLIND:  # all but the token that the query predicts, and itself
            visible = [(s, *slots[s]) for s in seen if s != p + span.mask_arg] + own
        if window:
            base = p if stair else span.q_start
            visible = [e for e in visible if e[0] > base - window]
        for head in range(q.shape[1]):
            own_k = torch.stack([e[1][head // group] for e in visible])
            own_v = torch.stack([e[2][head // group] for e in visible])
            weights = (own_k @ q[i, head] * scale).softmax(dim=0)
            out[i, head] = weights @ own_v
    return out


def keep(
    span: Span, q: Tensor, k: Tensor, v: Tensor, how: RowSelect, shift: int, ties: str
) -> Slots:
    """What a selecting span leaves in the row's first slots."""
    until = min(span.blk_off + max(span.blk_len, how.window), span.q_len)
    inside = range(max(span.blk_off - shift, 0), until)
    outside = [i for i in range(span.q_len) if i not in inside]
    per_head = span.store == Store.SELECT_PER_HEAD
    if how.attention:
        count, block = span.keep, q[span.blk_off : until]
        by_head = sparse_dllm.by_attention(block, k, outside, count, how.pool_kernel, per_head)
        return _slots(span, k, v, [[outside[i] for i in head] for head in by_head])
    mean = q[span.blk_off : until].mean(dim=0).view(k.shape[1], -1, k.shape[2])
    scores = torch.einsum("hgd,nhd->hgn", mean, k[outside])
    reduced = scores.amax(dim=1) if per_head else scores.mean(dim=(0, 1))[None]
    chosen = [
        sparse_dllm.greatest(sparse_dllm.max_pool(row, how.pool_kernel), span.keep, ties)
        for row in reduced.tolist()
    ]
    heads = [chosen[h if per_head else 0] for h in range(k.shape[1])]
    return _slots(span, k, v, [[outside[i] for i in head] for head in heads])


def _slots(span: Span, k: Tensor, v: Tensor, chosen: list[list[int]]) -> Slots:
    """The first slots, filled with each head's choice of positions in the span."""
    kept: Slots = {}
    for slot in range(span.keep):
        picks = [head[slot] for head in chosen]
        kept[slot] = (
            torch.stack([k[p, h] for h, p in enumerate(picks)]),
            torch.stack([v[p, h] for h, p in enumerate(picks)]),
        )
    return kept
