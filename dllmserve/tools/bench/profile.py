"""How much of the time a kernel was running: the union of kernel intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

#: device activities that are no kernels; the profiler names them so
_TRANSFERS = ("Memcpy", "Memset")


@dataclass(frozen=True)
class KernelTime:
    """Kernels of one profiled run.

    Attributes:
        share: of the time between the first kernel's start and the last one's end in
            which at least one kernel was running.
        kernels: how many ran.
        busy_seconds, span_seconds: the two times.
    """

    share: float
    kernels: int
    busy_seconds: float
    span_seconds: float


def profiled(run: Callable[[], object], device: torch.device) -> KernelTime | None:
    """Profile a run; None on a device without kernels, or if the profiler saw none."""
    if device.type != "cuda":
        return None
    # host activities are left out: recording them would slow the host down further
    # acc_events only says what happens in one cycle anyway; without it torch warns
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
        torch.cuda.synchronize(device)
    results: Any = profiler.profiler
    return kernel_time(kernel_intervals(results.kineto_results.events()))


def kernel_intervals(events: Iterable[Any]) -> list[tuple[int, int]]:
    """Start and end, in nanoseconds, of the kernels among the profiler's raw events."""
    return [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.device_type() == DeviceType.CUDA
        and not event.is_user_annotation()
        and not event.name().startswith(_TRANSFERS)
    ]


def kernel_time(intervals: Iterable[tuple[int, int]]) -> KernelTime | None:
    """Times of kernels that may overlap, come in any order; None without any."""
    ordered = sorted(intervals)
    if not ordered:
        return None
    busy, end = 0, ordered[0][0]
    for start, stop in ordered:
        busy += max(stop - max(start, end), 0)
        end = max(end, stop)
    span = end - ordered[0][0]
    return KernelTime(busy / span if span else 1.0, len(ordered), busy / 1e9, span / 1e9)
