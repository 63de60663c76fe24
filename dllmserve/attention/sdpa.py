"""Reference backend: torch's scaled_dot_product_attention, on any device.

Spans with equal shapes are attended in one batched call. The scheduler packs equal
shapes side by side, so a group is a slice of the packed tokens and nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dllmserve.attention.backend import AheadStore, AttentionStep, KVStore, check_spans
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import Mask, Span, Store
from dllmserve.core.rows import RowSelect
from dllmserve.device import host_to_device
from dllmserve.layers.modules import AttentionContext

if TYPE_CHECKING:
    from dllmserve.attention.select import Selection


@dataclass
class _Sight:
    """What spans of one shape see in a layer, besides themselves if they are fresh."""

    read_slots: Tensor | None  # [b, cached] int64
    mask: Tensor | None  # [q_len, cached + fresh] bool, True = attend


@dataclass
class _Group:
    """Spans of one shape, adjacent in the packed tokens."""

    tokens: slice
    batch: int
    q_len: int
    write_slots: Tensor | None  # [b * q_len] int64
    fresh: bool
    sights: dict[int, _Sight]  # by the layer's window
    select: Selection | None


class SdpaBackend:
    """See :class:`dllmserve.attention.backend.AttentionBackend`."""

    graphs = False

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    def unsupported(self, spec: ModelSpec, device: torch.device) -> list[str]:
        """Runs everywhere."""
        return []

    def prepare(self, step: AttentionStep) -> AttentionContext:
        """Group the plan's spans by shape."""
        kv, selects, spec = step.kv, step.selects, self._spec
        check_spans(spec, step.plan)
        windows = {layer.window for layer in spec.layers}
        groups, start = [], 0
        for _, members in groupby(step.plan.spans, key=lambda s: _shape(s, selects)):
            spans = list(members)
            groups.append(_build(spans, start, step, windows, spec.logit_shift))
            start += len(spans) * spans[0].q_len
        return _SdpaContext(spec, kv, groups, AheadStore(step) if step.ahead else None)


class _SdpaContext:
    """One step's attention."""

    def __init__(
        self, spec: ModelSpec, kv: KVStore, groups: list[_Group], ahead: AheadStore | None
    ) -> None:
        self._spec = spec
        self._kv = kv
        self._groups = groups
        self._ahead = ahead

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :class:`dllmserve.layers.modules.AttentionContext`."""
        k_cache, v_cache = self._kv.k[layer], self._kv.v[layer]
        if self._ahead is not None:
            self._ahead.store(self._kv, layer, k, v)
        window, scale, outs = self._spec.layers[layer].window, self._spec.scale_of(layer), []
        for group in self._groups:
            shape = (group.batch, group.q_len, -1, q.shape[-1])
            gq, gk, gv = (t[group.tokens].view(shape) for t in (q, k, v))
            if group.write_slots is not None:
                k_cache.index_copy_(0, group.write_slots, gk.flatten(0, 1))
                v_cache.index_copy_(0, group.write_slots, gv.flatten(0, 1))
            keys, values, sight = gk, gv, group.sights[window]
            if sight.read_slots is not None:
                keys, values = k_cache[sight.read_slots], v_cache[sight.read_slots]
                if group.fresh:
                    keys, values = torch.cat((keys, gk), 1), torch.cat((values, gv), 1)
            outs.append(_sdpa(gq, keys, values, sight.mask, scale).flatten(0, 1))
            if group.select is not None:
                group.select.keep(gq, gk, gv, k_cache, v_cache)
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _shape(span: Span, selects: dict[int, RowSelect]) -> tuple[int, ...]:
    """Spans with equal shapes share a batched call; the row alone may differ."""
    if not span.selects:
        return span[1:]
    select = selects[span.row]
    return (*span[1:], select.pool_kernel, select.window, select.attention)


def _build(
    spans: list[Span], start: int, step: AttentionStep, windows: set[int], shift: int
) -> _Group:
    kv, selects = step.kv, step.selects
    span, batch, device = spans[0], len(spans), kv.device
    rows = host_to_device([s.row for s in spans], device)  # [b] int64
    positions = torch.arange(span.q_start, span.q_start + span.q_len, device=device)
    end = span.q_start + span.q_len
    cached, fresh, writes = span.ctx_len, True, None
    if span.store == Store.POSITIONS:
        writes = kv.slots(rows, positions).flatten()
        if end < span.ctx_len:
            fresh = False  # the span's own K,V are read back from its slots
        elif span.ctx_len > span.q_start:
            cached = span.q_start  # the span covers the rest of the context itself
    elif span.store == Store.AHEAD:
        fresh = False  # they have been stored already
    select = None
    if span.selects and span.keep:
        from dllmserve.attention.select import build_selection

        select = build_selection(span, rows, step, selects[span.row], shift)
    return _Group(
        tokens=slice(start, start + batch * span.q_len),
        batch=batch,
        q_len=span.q_len,
        write_slots=writes,
        fresh=fresh,
        sights={window: _sight(span, rows, cached, fresh, window, kv) for window in windows},
        select=select,
    )


def _sight(span: Span, rows: Tensor, cached: int, fresh: bool, window: int, kv: KVStore) -> _Sight:
    """What spans of the shape of ``span`` see of ``rows`` [b] and of themselves."""
    # no query sees anything before it
    first = min(max(span.q_start - window + 1, 0), cached) if window else 0
    keys = torch.arange(first, cached, device=kv.device)
    reads = kv.slots(rows, keys) if len(keys) else None
    return _Sight(reads, _mask(span, keys, fresh, window))


def _mask(span: Span, keys: Tensor, fresh: bool, window: int) -> Tensor | None:
    """Which of the cached ``keys`` [n] and fresh ones each query sees, [q_len, keys] bool.

    None if all see all: the queries of a full span see what is not before the first one's window.
    """
    queries = torch.arange(span.q_start, span.q_start + span.q_len, device=keys.device)
    if span.mask == Mask.BLIND:
        # all but the token that the query is to predict, and all of the span itself
        sees = keys[None, :] != queries[:, None] + span.mask_arg
        return torch.cat((sees, sees.new_ones(span.q_len, span.q_len)), dim=1)
    if span.mask == Mask.FULL:
        return None
    # block-causal: a query sees keys of its own block and of earlier ones
    if fresh:
        keys = torch.cat((keys, queries))
    sees = keys[None, :] // span.mask_arg <= queries[:, None] // span.mask_arg
    if window:
        sees &= keys[None, :] > queries[:, None] - window
    return sees


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of q [b, n, Hq, D] over k, v [b, m, Hkv, D] -> [b, n, Hq, D].

    Without a mask every query sees every key, so the query heads of a group are folded
    into the query length and K,V need no copies.
    """
    b, n, heads, dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # [b, Hkv, m, D]
    if group == 1:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=scale)
        return out.transpose(1, 2)
    folded = q.view(b, n, kv_heads, group, dim).permute(0, 2, 3, 1, 4)  # [b, Hkv, g, n, D]
    folded = folded.reshape(b, kv_heads, group * n, dim)
    wide = mask.repeat(group, 1) if mask is not None else None
    out = F.scaled_dot_product_attention(folded, k, v, attn_mask=wide, scale=scale)
    out = out.view(b, kv_heads, group, n, dim).permute(0, 3, 1, 2, 4)
    return out.reshape(b, n, heads, dim)
