"""Union of kernel intervals, and what counts as a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType

from dllmserve.tools.bench.run import kernel_intervals, kernel_time, profiled


@dataclass
class Event:
    """A raw profiler event, as far as it is read."""

    label: str
    start: int
    length: int
    kind: Any = DeviceType.CUDA
    annotation: bool = False

    def name(self) -> str:
        return self.label

    def start_ns(self) -> int:
        return self.start

    def duration_ns(self) -> int:
        return self.length

    def device_type(self) -> Any:
        return self.kind

    def is_user_annotation(self) -> bool:
        return self.annotation


@pytest.mark.parametrize(
    ("intervals", "busy", "span"),
    [
        ([(0, 10)], 10, 10),
        ([(0, 10), (10, 20)], 20, 20),  # they touch
        ([(0, 10), (30, 40)], 20, 40),  # a gap
        ([(30, 40), (0, 10)], 20, 40),  # any order
        ([(0, 10), (5, 15)], 15, 15),  # two streams overlap
        ([(0, 100), (10, 20), (50, 60)], 100, 100),  # inside another
        ([(0, 100), (10, 20), (90, 120), (150, 160)], 130, 160),
        ([(5, 5), (7, 9)], 2, 4),  # an empty one
        ([(1000, 1010), (1000, 1010)], 10, 10),
    ],
)
def test_union(intervals: list[tuple[int, int]], busy: int, span: int) -> None:
    found = kernel_time(intervals)
    assert found is not None
    assert found.kernels == len(intervals)
    assert found.share == pytest.approx(busy / span)
    assert found.busy_seconds == pytest.approx(busy / 1e9)
    assert found.span_seconds == pytest.approx(span / 1e9)


def test_no_kernels() -> None:
    assert kernel_time([]) is None


def test_only_kernels_count() -> None:
    events = [
        Event("gemm", 5, 10),
        Event("Memcpy HtoD (Pageable -> Device)", 0, 50),
        Event("Memset (Device)", 0, 50),
        Event("cudaLaunchKernel", 0, 3, kind=DeviceType.CPU),
        Event("a range of the caller", 0, 500, annotation=True),
        Event("void softmax<float>()", 20, 5),
    ]
    assert kernel_intervals(events) == [(5, 15), (20, 25)]


def test_a_cpu_has_no_kernels() -> None:
    assert profiled(lambda: pytest.fail("it ran"), torch.device("cpu")) is None
