"""What the device's memory is spent on, worked out before any weight is loaded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from dllmserve.config import EngineConfig
from dllmserve.core.budget import MemoryBudget, size_text
from dllmserve.core.model_spec import ModelSpec
from dllmserve.engine.core import OOM_ADVICE
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
) -> tuple[MemoryBudget, int]:
    """The memory plan, and the number of K,V pages that it leaves room for.

    Args:
        tokens: query tokens of the largest step.
        max_len: longest canvas.

    Raises:
        OutOfMemoryError: the parts do not fit together; the message has the equation.
    """
    size = dtype.itemsize
    page_bytes = options.page_size * spec.kv_values() * size
    # a layer gathers the context of a step's reuse spans, at worst all pages, and joins it
    # with the fresh K,V: twice a layer's share of the pages
    gather_bytes = 2 * page_bytes // spec.num_layers
    total, free = _device_memory(device)
    bare = MemoryBudget(
        total=total,
        free=free,
        utilization=options.gpu_memory_utilization,
        weights=spec.parameters() * size,
        activations=tokens * _widest(spec) * size,
        logits=_logit_bytes(options, spec, size),
        tables=_table_bytes(options, spec, max_len),
        pages=0,
    )
    wanted = options.max_num_seqs * -(-max_len // options.page_size)
    room = max(bare.allowed - bare.planned, 0)
    pages = min(wanted, room // (page_bytes + gather_bytes))
    if options.kv_pages is not None:
        pages = options.kv_pages
    memory = replace(
        bare,
        activations=bare.activations + pages * gather_bytes,
        pages=pages * page_bytes,
    )
    if memory.planned > memory.allowed:
        raise OutOfMemoryError(
            f"the engine needs {size_text(memory.planned)} and may use "
            f"{size_text(memory.allowed)}: {memory.equation()}; {OOM_ADVICE}"
            + (", or kv_pages" if options.kv_pages is not None else "")
            + (", or use dtype='bfloat16'" if dtype == torch.float32 else "")
        )
    return memory, pages


def _widest(spec: ModelSpec) -> int:
    """Numbers per token in the widest moment of a layer."""
    q = spec.num_heads * spec.head_dim
    kv = spec.num_kv_heads * spec.head_dim
    # the MLP holds gate, up and their product; attention holds q, k, v twice (before and
    # after the rotation) and its output; the residual stream and its norm are always there
    return max(3 * spec.mlp_size, 2 * (q + 2 * kv) + q) + 3 * spec.hidden_size


def _logit_bytes(options: EngineConfig, spec: ModelSpec, size: int) -> int:
    """Logits of max_logit_rows rows and the float32 rows that the statistics hold."""
    # float32 logits, candidates, shifted, exponentials, weights; with entropy two more
    return options.max_logit_rows * spec.embedding_size * (size + 7 * 4)


def _table_bytes(options: EngineConfig, spec: ModelSpec, max_len: int) -> int:
    """State table (ids, flags, quotas), page table and rotary tables."""
    per_row = max_len * 9 + min(max_len, MAX_GEN_LENGTH) * 8 + max_len // options.page_size * 8
    return (options.max_num_seqs + 1) * per_row + max_len * spec.head_dim * 4


def _device_memory(device: torch.device) -> tuple[int, int]:
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
