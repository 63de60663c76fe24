"""AttentionBackend: how a step's spans attend. All backends pass one parity test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import StepPlan
from dllmserve.core.rows import RowSelect
from dllmserve.models.base import AttentionContext


def host_to_device(
    values: Sequence[int] | Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """A 1-D tensor of host numbers on the device; on a GPU this is one small copy."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


@dataclass
class KVStore:
    """Paged K and V of all layers.

    Attributes:
        k, v: [layers, slots, Hkv, D]; slot = page * page_size + offset. Page 0 is trash.
        page_table: [rows + 1, pages_per_row] int64 page numbers; unused entries are 0.
        page_size: tokens per page.
    """

    k: Tensor
    v: Tensor
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
        shape = (spec.num_layers, (num_pages + 1) * page_size, spec.num_kv_heads, spec.head_dim)
        return cls(
            k=torch.empty(shape, dtype=dtype, device=device),
            v=torch.empty(shape, dtype=dtype, device=device),
            page_table=torch.zeros(num_rows + 1, pages_per_row, dtype=torch.int64, device=device),
            page_size=page_size,
        )

    def slots(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Slots of ``positions`` [n] (or [b, n]) int64 for ``rows`` [b] int64 -> [b, n]."""
        page, offset = positions // self.page_size, positions % self.page_size
        pages = self.page_table[rows]  # [b, pages_per_row]
        if positions.dim() == 1:
            return pages[:, page] * self.page_size + offset
        return pages.gather(1, page) * self.page_size + offset


class AttentionBackend(Protocol):
    """Attends the spans of a plan. Add a file and a line in registry.ATTENTION_BACKENDS."""

    def unsupported(self, spec: ModelSpec, device: torch.device) -> list[str]:
        """Reasons why this backend cannot serve the model on the device."""
        ...

    def prepare(
        self, plan: StepPlan, kv: KVStore, selects: dict[int, RowSelect]
    ) -> AttentionContext:
        """Set up one step.

        Args:
            plan: the step.
            kv: the store that spans read and write.
            selects: row -> selection settings, read by spans that select.
        """
        ...
