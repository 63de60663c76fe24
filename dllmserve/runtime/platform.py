"""What differs between kinds of devices, in one place."""

from __future__ import annotations

import torch
from torch import Tensor


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


def to_host(values: Tensor) -> Tensor:
    """Start a copy to the host; on a GPU it lands in pinned memory, some time later."""
    if not values.is_cuda:
        return values
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return pinned.copy_(values, non_blocking=True)


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """Mark the end of what was launched so far; None where nothing runs on its own."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def fetch(values: Tensor) -> Tensor:
    """A copy on the host, waited for."""
    copy = to_host(values)
    event = record_event(values.device)
    if event is not None:
        event.synchronize()
    return copy
