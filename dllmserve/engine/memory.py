"""What the device's memory is spent on, worked out before any weight is loaded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from dllmserve.core.budget import MemoryBudget
from dllmserve.engine.advice import does_not_fit
from dllmserve.engine.sizing import Sizing
from dllmserve.errors import OutOfMemoryError

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def plan_memory(sizing: Sizing, device: torch.device) -> tuple[MemoryBudget, int]:
    """The memory plan, and the number of K,V pages that it leaves room for.

    Raises:
        OutOfMemoryError: the parts do not fit together; the message has the equation.
    """
    total, free = device_memory(device)
    if device.type == "cpu":  # which all ranks share
        ranks = sizing.options.tensor_parallel_size
        total, free = total // ranks, free // ranks
    return checked_plan(sizing, replace(sizing.bare(), total=total, free=free))


def checked_plan(sizing: Sizing, bare: MemoryBudget) -> tuple[MemoryBudget, int]:
    """A plan without pages, worked out or measured, with the pages that fit, and their number.

    Raises:
        OutOfMemoryError: too large; the message has the option to change.
    """
    memory, pages = sizing.with_pages(bare)
    if memory.planned > memory.allowed:
        raise OutOfMemoryError(does_not_fit(sizing, memory, Sizing.least))
    return memory, pages


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
