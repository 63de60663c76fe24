"""Triton backend: all spans of a step in a fixed number of launches, whatever their shapes.

Spans that attend to themselves alone (refreshes) go through torch's flash attention where it
runs, because it is faster on long sequences; all others, and everything in float32, go through
one kernel that reads pages in place.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from dllmserve.attention.backend import AheadStore, AttentionStep, KVStore, check_spans
from dllmserve.attention.select import Selection, build_selection, row_numbers
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import Span, SpanField
from dllmserve.kernels import missing
from dllmserve.layers.modules import AttentionContext

#: Longer K,V tiles do not fit into a multiprocessor's memory.
MAX_HEAD_DIM = 512
#: Flash attention's limit.
_MAX_FLASH_DIM = 256


class TritonBackend:
    """See :class:`dllmserve.attention.backend.AttentionBackend`."""

    graphs = True

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    def unsupported(self, spec: ModelSpec, device: torch.device) -> list[str]:
        """Needs triton and a CUDA device, whose shared memory bounds the head dimension."""
        reasons = missing(device)
        head_dim = max(layer.head_dim for layer in spec.layers)
        if head_dim > MAX_HEAD_DIM:
            reasons.append(f"head_dim {head_dim} is more than {MAX_HEAD_DIM}")
        return reasons

    def prepare(self, step: AttentionStep) -> AttentionContext:
        """Sort out which kernels the step needs."""
        check_spans(self._spec, step.plan)
        return _TritonContext(step, self._spec)


class _TritonContext:
    """One step's attention. Kernels are imported here, where triton is known to be there."""

    def __init__(self, step: AttentionStep, spec: ModelSpec) -> None:
        from dllmserve.kernels import attention, parts, select

        self._span_attention = attention.span_attention
        self._store_pages = attention.store_pages
        self._keep_best = select.keep_best
        self._step, self._spec = step, spec
        self._ahead = AheadStore(step) if step.ahead else None
        self._turns = parts.room_for_turns(step.kv.device)  # of all layers, one by one
        spans, device = step.plan.spans, step.kv.device
        alone = sum(span.refresh for span in spans)
        # head sizes of layers whose whole spans go through flash attention
        self._flash_dims: set[int] = set()
        if alone:
            dims = {layer.head_dim for layer in spec.layers}
            self._flash_dims = {dim for dim in dims if _flash_runs(step.kv, dim)}
        if self._flash_dims:
            # from the lengths, because a padding span may start anywhere
            ends = step.spans[:, SpanField.Q_LEN].cumsum(0, dtype=torch.int32)
            self._ends = F.pad(ends, (1, 0))  # [S + 1] int32
        self._others = alone < len(spans)
        chosen = [
            (index, span, step.selects[span.row])
            for index, span in zip(step.indices, spans, strict=True)
            if span.selects and span.keep and not step.selects[span.row].attention
        ]
        self._by_attention = _attention_groups(step, spec.logit_shift)
        heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
        self._selection = (
            select.plan_selection(chosen, heads, spec.logit_shift, device, step.group)
            if chosen
            else None
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :class:`dllmserve.layers.modules.AttentionContext`."""
        step, kv = self._step, self._step.kv
        if self._ahead is not None:
            self._ahead.store(kv, layer, k, v)
        caches = (kv.k[layer], kv.v[layer])
        where = (step.spans, step.starts, kv.page_table)
        page, longest = kv.page_size, step.max_q
        own, scale = self._spec.layers[layer], self._spec.scale_of(layer)
        flash = own.head_dim in self._flash_dims
        if flash:  # a whole span has nothing before it that a window could hide
            out = _flash(q, k, v, self._ends, longest, scale)
            self._store_pages(k, v, *caches, *where, page, longest)
        else:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if self._others or not flash:
            self._span_attention(
                *(q, k, v, out, *caches, *where, page, longest),
                scale=scale,
                window=own.window,
                skip_whole=flash,
                blind=step.ahead,  # there may be such spans
                turns=self._turns,
            )
        if self._selection is not None:
            self._keep_best(self._selection, q, k, v, *caches, *where, page)
        for tokens, length, selection in self._by_attention:
            gq, gk, gv = (x[tokens].view(-1, length, *x.shape[1:]) for x in (q, k, v))
            selection.keep(gq, gk, gv, *caches)
        return out


def _attention_groups(step: AttentionStep, shift: int) -> list[tuple[slice, int, Selection]]:
    """Tokens, span length and selection of adjacent spans that select by attention weight."""
    found, start = [], 0
    for shape, members in groupby(step.plan.spans, key=lambda s: _select_shape(s, step)):
        spans = list(members)
        end = start + sum(span.q_len for span in spans)
        if shape is not None:
            rows = row_numbers(spans, step.kv.device)
            settings = step.selects[spans[0].row]
            selection = build_selection(spans[0], rows, step, settings, shift)
            found.append((slice(start, end), spans[0].q_len, selection))
        start = end
    return found


def _select_shape(span: Span, step: AttentionStep) -> tuple[object, ...] | None:
    """What spans that select together have in common; None if they do not, or not so."""
    if not span.selects or not span.keep or not step.selects[span.row].attention:
        return None
    return (span[1:], step.selects[span.row])


def _flash_runs(kv: KVStore, head_dim: int) -> bool:
    """True if torch's flash attention takes such K,V; it knows no float32."""
    k = kv.k[0]
    if not k.is_cuda or k.dtype not in (torch.bfloat16, torch.float16):
        return False
    capable = torch.cuda.get_device_capability(k.device) >= (8, 0)
    return (
        capable and torch.version.hip is None and head_dim % 8 == 0 and head_dim <= _MAX_FLASH_DIM
    )


def _flash(
    q: Tensor,  # [N, Hq, D]
    k: Tensor,  # [N, Hkv, D]
    v: Tensor,  # [N, Hkv, D]
    ends: Tensor,  # [S + 1] int32
    max_q: int,
    scale: float,
) -> Tensor:
    """Every span over its own fresh K,V [N, Hq, D]; of use for whole spans alone.

    torch.nn.attention.varlen, the public way to the same kernel, is not in torch 2.9 and
    learned of grouped heads later still. This operator is in all of 2.9 to 2.13.
    """
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, ends, ends, max_q, max_q, 0.0, False, False, scale=scale
    )[0]
    return out.contiguous()
