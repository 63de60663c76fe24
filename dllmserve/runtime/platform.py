"""What differs between kinds of devices, in one place."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch, on any device, says that memory ran out."""
    text = str(error)
    cpu = "DefaultCPUAllocator" in text or "allocate memory" in text
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or cpu


def release_cached_memory() -> None:
    """Give memory that torch keeps for later back to the device."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
