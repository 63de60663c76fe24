"""What differs between kinds of devices, in one place."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch, on any device, says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    # the CPU's allocator, and what CUDA itself needs (graphs, handles), have no own type
    signs = ("DefaultCPUAllocator", "allocate memory", "CUDA error: out of memory")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def release_cached_memory() -> None:
    """Give memory that torch keeps for later back to the device."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
