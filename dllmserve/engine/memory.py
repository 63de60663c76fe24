"""What the device's memory is spent on, worked out before any weight is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dllmserve.config import EngineConfig
from dllmserve.core.budget import MemoryBudget
from dllmserve.core.model_spec import ModelSpec
from dllmserve.engine.advice import Change, does_not_fit
from dllmserve.errors import OutOfMemoryError
from dllmserve.sampling_params import MAX_GEN_LENGTH

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def plan_memory(
    options: EngineConfig,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tokens: int,
    max_len: int,
    fused: bool,
) -> tuple[MemoryBudget, int]:
    """The memory plan, and the number of K,V pages that it leaves room for.

    Args:
        tokens: query tokens of the largest step.
        max_len: longest canvas.
        fused: Triton kernels read pages in place and reduce logits in one pass; plain torch
            operations gather and copy.

    Raises:
        OutOfMemoryError: the parts do not fit together; the message has the equation.
    """
    total, free = device_memory(device)
    bare = estimate(options, spec, dtype, tokens=tokens, max_len=max_len, fused=fused)
    bare = replace(bare, total=total, free=free)
    cost = PageCost.of(options, spec, dtype, fused=fused)
    memory, pages = with_pages(options, bare, cost, max_len)
    check_fit(memory, options, spec, dtype, tokens=tokens, max_len=max_len, fused=fused)
    return memory, pages


@dataclass(frozen=True)
class PageCost:
    """Bytes that each K,V page costs: itself, and what is gathered of it in a step."""

    page: int
    gather: int

    @classmethod
    def of(
        cls, options: EngineConfig, spec: ModelSpec, dtype: torch.dtype, *, fused: bool
    ) -> PageCost:
        """Triton reads pages in place; in torch a layer gathers the context of a step's reuse
        spans, at worst all pages, and joins it with the fresh K,V: twice a layer's share.
        """  # noqa: D205
        page = options.page_size * spec.kv_values() * dtype.itemsize
        return cls(page, 0 if fused else 2 * page // spec.num_layers)


def estimate(
    options: EngineConfig,
    spec: ModelSpec,
    dtype: torch.dtype,
    *,
    tokens: int,
    max_len: int,
    fused: bool,
) -> MemoryBudget:
    """Bytes of everything but the pages, on a device of no size yet."""
    size = dtype.itemsize
    return MemoryBudget(
        total=0,
        free=0,
        utilization=options.gpu_memory_utilization,
        weights=spec.parameters() * size,
        activations=tokens * _widest(spec) * size,
        logits=_logit_bytes(options, spec, size, fused),
        tables=_table_bytes(options, spec, max_len),
        pages=0,
    )


def with_pages(
    options: EngineConfig, bare: MemoryBudget, cost: PageCost, max_len: int
) -> tuple[MemoryBudget, int]:
    """The plan with K,V pages, and their number: as many as fit, or as the options say.

    Args:
        options: ``kv_pages`` decides if it is given.
        bare: the plan without pages.
        cost: of a page.
        max_len: longest canvas; more than ``max_num_seqs`` of them are never needed.
    """
    pages = options.kv_pages
    if pages is None:
        wanted = options.max_num_seqs * -(-max_len // options.page_size)
        pages = min(wanted, max(bare.allowed - bare.fixed, 0) // (cost.page + cost.gather))
    memory = replace(
        bare,
        activations=bare.activations + pages * cost.gather,
        pages=pages * cost.page,
    )
    return memory, pages


def check_fit(
    memory: MemoryBudget,
    options: EngineConfig,
    spec: ModelSpec,
    dtype: torch.dtype,
    *,
    tokens: int,
    max_len: int,
    fused: bool,
) -> None:
    """Raise OutOfMemoryError, with the option to change, if the plan is too large."""
    if memory.planned <= memory.allowed:
        return

    def planned(change: Change) -> int:
        """Bytes of the plan with some options changed, and room for one canvas at least."""
        changed = replace(options, **change.options)
        kind = change.dtype or dtype
        length, step = change.max_len or max_len, change.tokens or tokens
        bare = estimate(changed, spec, kind, tokens=step, max_len=length, fused=fused)
        cost = PageCost.of(changed, spec, kind, fused=fused)
        pages = changed.kv_pages
        if pages is None:
            pages = -(-length // changed.page_size)
        return bare.fixed + pages * (cost.page + cost.gather)

    raise OutOfMemoryError(
        does_not_fit(options, memory, planned, dtype, tokens=tokens, max_len=max_len)
    )


def _widest(spec: ModelSpec) -> int:
    """Numbers per token in the widest moment of a layer."""
    q = spec.num_heads * spec.head_dim
    kv = spec.num_kv_heads * spec.head_dim
    # the MLP holds gate, up and their product; attention holds q, k, v twice (before and
    # after the rotation) and its output; the residual stream and its norm are always there
    return max(3 * spec.mlp_size, 2 * (q + 2 * kv) + q) + 3 * spec.hidden_size


def _logit_bytes(options: EngineConfig, spec: ModelSpec, size: int, fused: bool) -> int:
    """Logits of max_logit_rows rows and what their statistics need beside them."""
    # torch: float32 logits, candidates, shifted, exponentials, weights; with entropy two
    # more. Triton: the sorting of filtered rows, which come in smaller chunks
    extra = 4 if fused else 7 * 4
    return options.max_logit_rows * spec.embedding_size * (size + extra)


def _table_bytes(options: EngineConfig, spec: ModelSpec, max_len: int) -> int:
    """State table (ids, flags, quotas), page table and rotary tables."""
    per_row = max_len * 9 + min(max_len, MAX_GEN_LENGTH) * 8 + max_len // options.page_size * 8
    return (options.max_num_seqs + 1) * per_row + max_len * spec.head_dim * 4


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of the device, and those that are free; on a CPU all count as free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # what this process has freed but keeps cached can be used again
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return total, free + cached
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _CGROUP_LIMIT.is_file():
        limit = _CGROUP_LIMIT.read_text().strip()
        if limit.isdigit():
            total = min(total, int(limit))
    return total, total
