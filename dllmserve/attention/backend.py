"""AttentionBackend: how a step's spans attend. All backends pass one parity test."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import Mask, SpanField, StepPlan, Store
from dllmserve.core.rows import RowSelect
from dllmserve.device import host_to_device
from dllmserve.layers.modules import AttentionContext
from dllmserve.parallel.group import SOLO, Group


@dataclass
class KVStore:
    """Paged K and V of all layers.

    Attributes:
        k, v: [slots, Hkv, D] of each layer, with its own Hkv and D; slot = page * page_size +
            offset. Page 0 is trash.
        page_table: [rows + 1, pages_per_row] int64 page numbers; unused entries are 0.
        page_size: tokens per page.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    page_table: Tensor
    page_size: int

    @classmethod
    def create(
        cls,
        spec: ModelSpec,
        *,
        num_pages: int,
        page_size: int,
        num_rows: int,
        pages_per_row: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVStore:
        """Allocate the store, uninitialised: a slot is never read before it is written."""
        slots = (num_pages + 1) * page_size
        shapes = [(slots, layer.num_kv_heads, layer.head_dim) for layer in spec.layers]
        sizes = [prod(shape) for shape in shapes]

        def room() -> tuple[Tensor, ...]:
            whole = torch.empty(sum(sizes), dtype=dtype, device=device)  # in one piece
            parts = zip(torch.split(whole, sizes), shapes, strict=True)
            return tuple(part.view(shape) for part, shape in parts)

        return cls(
            k=room(),
            v=room(),
            page_table=torch.zeros(num_rows + 1, pages_per_row, dtype=torch.int64, device=device),
            page_size=page_size,
        )

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self.page_table.device

    def slots(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Slots of ``positions`` [n] (or [b, n]) int64 for ``rows`` [b] int64 -> [b, n]."""
        page, offset = positions // self.page_size, positions % self.page_size
        pages = self.page_table[rows]  # [b, pages_per_row]
        if positions.dim() == 1:
            return pages[:, page] * self.page_size + offset
        return pages.gather(1, page) * self.page_size + offset


@dataclass(frozen=True)
class AttentionStep:
    """What a backend is told about a step.

    Attributes:
        plan: the host's view. A padded step holds more spans on the device than the plan;
            padding has q_len 0 and the trash row.
        kv: the store that spans read and write.
        selects: row -> selection settings, read by spans that select.
        spans: [S, len(SpanField)] int32 on the device.
        starts: [S] int32 on the device, first packed token of each span.
        indices: index in ``spans`` of each span of the plan.
        tokens: packed tokens; those of padding come last and belong to no span.
        max_q: upper bound of q_len.
        positions, owners: [N] int64, canvas position and span of each token, S for padding.
            Only steps with spans that store AHEAD need them.
        ahead: True if there may be spans that store AHEAD, or blind ones.
        group: ranks that share the heads.
    """

    plan: StepPlan
    kv: KVStore
    selects: dict[int, RowSelect]
    spans: Tensor
    starts: Tensor
    indices: tuple[int, ...]
    tokens: int
    max_q: int
    positions: Tensor | None = None
    owners: Tensor | None = None
    ahead: bool = False
    group: Group = SOLO


def token_slots(step: AttentionStep, stores: tuple[Store, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Row, position and slot [N] int64 of each token whose span stores in one of these ways.

    The others, and padding, have row -1 and a slot of the trash page.
    """
    if step.positions is None or step.owners is None:
        raise ValueError("the positions and owners of a step's tokens are not known")
    spans = step.spans.long()[step.owners.clamp(max=len(step.spans) - 1)]  # [N, len(SpanField)]
    store = spans[:, SpanField.STORE]
    wanted = step.owners < len(step.spans)
    wanted &= torch.stack([store == kind for kind in stores]).any(dim=0)
    slots = step.kv.slots(spans[:, 0], step.positions[:, None])[:, 0]
    rows = spans[:, 0].masked_fill(~wanted, -1)
    return rows, step.positions, slots.masked_fill(~wanted, 0)


def check_spans(spec: ModelSpec, plan: StepPlan) -> None:
    """Refuse what is not defined where layers attend in their own ways (a bug, never user input).

    A window is one of positions, so slots have to be positions.

    Raises:
        ValueError: a span selects, stores ahead or is blind.
    """
    if not spec.attention:
        return
    for span in plan.spans:
        if span.store not in (Store.NONE, Store.POSITIONS) or span.mask == Mask.BLIND:
            raise ValueError(f"layers that attend in their own ways cannot attend {span}")


class AheadStore:
    """Stores the fresh K,V of spans that store AHEAD, before anything attends.

    Args:
        step: with positions and owners.
    """

    def __init__(self, step: AttentionStep) -> None:
        #: [N] int64; tokens of other spans go to the trash page
        self.slots = token_slots(step, (Store.AHEAD,))[2]

    def store(self, kv: KVStore, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k and v [N, Hkv, D] of a layer."""
        kv.k[layer].index_copy_(0, self.slots, k)
        kv.v[layer].index_copy_(0, self.slots, v)


def unpadded_step(
    plan: StepPlan, kv: KVStore, selects: dict[int, RowSelect] | None = None
) -> AttentionStep:
    """The step of a plan alone.

    Example:
        >>> backend.prepare(unpadded_step(plan, kv)).attend(0, q, k, v)
    """
    lengths = [span.q_len for span in plan.spans]
    fields = [field for span in plan.spans for field in span]
    starts = list(accumulate(lengths, initial=0))
    device = kv.device
    ahead = any(s.store == Store.AHEAD or s.mask == Mask.BLIND for s in plan.spans)
    positions = [p for s in plan.spans for p in range(s.q_start, s.q_start + s.q_len)]
    owners = [i for i, length in enumerate(lengths) for _ in range(length)]
    return AttentionStep(
        plan=plan,
        kv=kv,
        selects=selects or {},
        spans=host_to_device(fields, device, torch.int32).view(-1, len(SpanField)),
        starts=host_to_device(starts[:-1], device, torch.int32),
        indices=tuple(range(len(lengths))),
        tokens=starts[-1],
        max_q=max(lengths, default=0),
        positions=host_to_device(positions, device),
        owners=host_to_device(owners, device),
        ahead=ahead,
    )


class AttentionBackend(Protocol):
    """Attends the spans of a plan. Add a file and a line in :mod:`dllmserve.catalog`."""

    #: True if a step may be captured in a CUDA graph and replayed with other spans, as long
    #: as none of them is whole or selects. Of such a step ``prepare`` and ``attend`` then use
    #: only the device tensors, ``tokens`` and ``max_q``: no host value of any span. False: the
    #: backend is never given a padded step.
    graphs: bool

    def unsupported(self, spec: ModelSpec, device: torch.device) -> list[str]:
        """Reasons why this backend cannot serve the model on the device."""
        ...

    def prepare(self, step: AttentionStep) -> AttentionContext:
        """Set up one step."""
        ...
