"""What differs between kinds of devices, in one place."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: out of memory without a type of its own: the CPU's allocator, what CUDA needs for itself
#: (graphs, handles), kernels that Triton loads, workspaces of cuBLAS
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "allocate memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch, on any device, says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` and its default stream the current ones.

    Kernels, events and graphs go to the current device and stream, which are the calling
    thread's own; an engine may be used from any thread, and its steps need one order.
    """
    if device.type != "cuda":
        return nullcontext()
    stream: AbstractContextManager[Any] = torch.cuda.stream(torch.cuda.default_stream(device))
    return stream


def own_types(device: torch.device) -> AbstractContextManager[Any]:
    """Products in the weights' type, even where the caller computes under ``torch.autocast``."""
    if device.type not in ("cpu", "cuda"):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def beside_steps(device: torch.device) -> AbstractContextManager[Any]:
    """Launch copies that wait for nothing, not even for what was launched before them.

    Only for memory that no step in flight writes, and whose writer the host has waited for.
    """
    if device.type != "cuda":
        return nullcontext()
    stream: AbstractContextManager[Any] = torch.cuda.stream(_side_stream(device))
    return stream


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def release_cached_memory() -> None:
    """Give memory that torch keeps for later back to the device."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def host_room(like: Tensor, device: torch.device) -> Tensor | None:
    """Pinned memory for a copy of such a tensor from a GPU; elsewhere none is needed."""
    if device.type != "cuda":
        return None
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def to_host(values: Tensor, room: Tensor | None = None) -> Tensor:
    """Start a copy to the host; on a GPU it lands in pinned memory, some time later.

    Args:
        values: on any device.
        room: where it goes, of :func:`host_room`; None makes some.
    """
    if not values.is_cuda:
        return values
    pinned = room if room is not None else torch.empty_like(values, device="cpu", pin_memory=True)
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


def device_facts(device: torch.device, threads: int | None = None) -> dict[str, Any]:
    """Name and size of a device, for people and records; a CPU's threads are torch's, or given."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return {"device": str(device), "name": found.name, "memory_bytes": found.total_memory}
    number = torch.get_num_threads() if threads is None else threads
    return {"device": str(device), "name": _cpu_name(), "threads": number}


def _cpu_name() -> str:
    """The processor's own name where the system tells it."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
