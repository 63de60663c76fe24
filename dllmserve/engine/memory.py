"""What the device's memory is spent on, worked out before any weight is loaded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from dllmserve.config import EngineConfig
from dllmserve.core.budget import MemoryBudget
from dllmserve.core.model_spec import ModelSpec
from dllmserve.engine.advice import does_not_fit
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
    size = dtype.itemsize
    page_bytes = options.page_size * spec.kv_values() * size
    # in torch, a layer gathers the context of a step's reuse spans, at worst all pages, and
    # joins it with the fresh K,V: twice a layer's share of the pages
    gather_bytes = 0 if fused else 2 * page_bytes // spec.num_layers
    total, free = device_memory(device)
    bare = MemoryBudget(
        total=total,
        free=free,
        utilization=options.gpu_memory_utilization,
        weights=spec.parameters() * size,
        activations=tokens * _widest(spec) * size,
        logits=_logit_bytes(options, spec, size, fused),
        tables=_table_bytes(options, spec, max_len),
        pages=0,
    )
    pages = count_pages(options, bare, page_bytes + gather_bytes, max_len)
    memory = replace(
        bare,
        activations=bare.activations + pages * gather_bytes,
        pages=pages * page_bytes,
    )
    check_fit(options, memory, dtype, tokens=tokens, max_len=max_len)
    return memory, pages


def count_pages(
    options: EngineConfig, bare: MemoryBudget, bytes_per_page: int, max_len: int
) -> int:
    """K,V pages that fit beside everything else, or as many as the options say.

    Args:
        options: ``kv_pages`` decides if it is given.
        bare: the plan without pages.
        bytes_per_page: what each page costs.
        max_len: longest canvas; more than ``max_num_seqs`` of them are never needed.
    """
    if options.kv_pages is not None:
        return options.kv_pages
    wanted = options.max_num_seqs * -(-max_len // options.page_size)
    return min(wanted, max(bare.allowed - bare.fixed, 0) // bytes_per_page)


def check_fit(
    options: EngineConfig, memory: MemoryBudget, dtype: torch.dtype, *, tokens: int, max_len: int
) -> None:
    """Raise OutOfMemoryError, with the option to change, if the plan is too large."""
    if memory.planned > memory.allowed:
        message = does_not_fit(options, memory, dtype, tokens=tokens, max_len=max_len)
        raise OutOfMemoryError(message)


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
