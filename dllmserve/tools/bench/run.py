"""Timed runs of a workload, and the figures that follow from them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dllmserve.core.plan import StepPlan
from dllmserve.errors import EngineError
from dllmserve.llm import LLM
from dllmserve.tools.bench.experts import touched_experts
from dllmserve.tools.bench.roofline import NONE_COUNTED, Ceilings, Floor, ModelCost
from dllmserve.tools.bench.workload import Workload
from dllmserve.tools.text import percentile

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


@dataclass(frozen=True)
class Sample:
    """One timed run.

    Attributes:
        seconds: wall time of the whole call.
        tokens: answer tokens of all requests.
        forwards: forward passes of all requests together; a guided one counts once.
        plans: of the steps.
    """

    seconds: float
    tokens: int
    forwards: int
    plans: Sequence[StepPlan]

    @property
    def steps(self) -> int:
        """Engine steps."""
        return len(self.plans)

    @property
    def entries(self) -> int:
        """Requests in a step, summed over the steps."""
        return sum(len(plan.entries) for plan in self.plans)


@dataclass(frozen=True)
class Spread:
    """Median and extremes of a figure over the runs."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class LatencyFigures:
    """Seconds of requests that ran alone, from the call to the finished answer.

    Attributes:
        median, p90, max: of the end-to-end time over the runs.
        first_token: until the first token was committed, in a run of its own.
    """

    median: float
    p90: float
    max: float
    first_token: float


@dataclass(frozen=True)
class Result:
    """Figures of ``requests`` requests submitted at once.

    Attributes:
        seconds: wall time of each timed run.
        output_tokens: answer tokens of a run, all requests together.
        tokens_per_second: output tokens over wall time.
        steps: engine steps, that is forward passes of the model, of the median run.
        forwards_per_request: steps that a request took part in, on average.
        tokens_per_forward: output tokens over the requests' forward passes.
        requests_per_step: requests in a step, on average.
        ms_per_step: median of wall time over steps.
        floor_seconds: the roofline's time for the steps of the median run.
        roofline_fraction: median of floor over wall time.
        experts_touched: experts that a step touches in a layer with experts, on average over the
            median run; None if nothing was counted.
        experts_uniform: as many as it would be if each expert were as likely as another.
        kernels: of a profiled run; None on a CPU or without a profile.
        peak_allocated, peak_reserved: bytes by torch's allocator; None on a CPU.
        latency: with ``dllmserve bench latency``, else None.
    """

    requests: int
    seconds: list[float]
    output_tokens: int
    tokens_per_second: Spread
    steps: int
    forwards_per_request: float
    tokens_per_forward: float
    requests_per_step: float
    ms_per_step: float
    floor_seconds: float
    roofline_fraction: float
    kernels: KernelTime | None
    peak_allocated: int | None
    peak_reserved: int | None
    latency: LatencyFigures | None = None
    experts_touched: float | None = None
    experts_uniform: float | None = None

    @property
    def roofline_tokens_per_second(self) -> float:
        """Output tokens per second if every step took its floor."""
        return self.output_tokens / self.floor_seconds


class Bench:
    """A loaded engine with a workload.

    Args:
        llm: the engine.
        workload: what it is asked to do.
        ceilings: of its device.
        profile: whether one more run is profiled, on a device with kernels.
        progress: told in a few words what is being done.
    """

    def __init__(
        self,
        llm: LLM,
        workload: Workload,
        ceilings: Ceilings,
        *,
        profile: bool = True,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._llm = llm
        self._workload = workload
        self._ceilings = ceilings
        self._cost = ModelCost.of(llm.spec, llm.plan.dtype.itemsize, llm.config.quantization)
        self._device = llm.plan.device
        self._profile = profile
        self._progress = progress

    def throughput(self, requests: int) -> Result:
        """Submit ``requests`` requests at once, several times over."""
        prompts = self._workload.prompts(requests, self._llm.spec)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        for number in range(self._workload.warmup):
            self._say(requests, "warm-up", number, self._workload.warmup)
            self._generate(prompts)
        samples = []
        for number in range(self._workload.runs):
            self._say(requests, "run", number, self._workload.runs)
            samples.append(self._sample(prompts))
        allocated = reserved = None
        if self._device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self._device)
            reserved = torch.cuda.max_memory_reserved(self._device)
        kernels = None
        if self._profile:
            self._progress(f"n={requests}: profile")
            kernels = profiled(lambda: self._generate(prompts), self._device)
        touched = NONE_COUNTED
        if self._llm.spec.experts is not None:
            self._progress(f"n={requests}: experts")
            touched = touched_experts(self._llm, lambda: self._generate(prompts))
        floor = Floor(self._cost, self._ceilings, touched)
        return _result(samples, requests, floor, kernels, (allocated, reserved))

    def latency(self) -> Result:
        """One request at a time."""
        result = self.throughput(1)
        self._progress("n=1: first token")
        figures = LatencyFigures(
            median=statistics.median(result.seconds),
            p90=percentile(result.seconds, 90),
            max=max(result.seconds),
            first_token=self._first_token(),
        )
        return replace(result, latency=figures)

    def _say(self, requests: int, what: str, number: int, count: int) -> None:
        self._progress(f"n={requests}: {what} {number + 1} of {count}")

    def _generate(self, prompts: list[list[int]]) -> list[dict[str, int]]:
        """Answer the prompts; the usage of each."""
        work = self._workload
        outputs = self._llm.generate(prompts, work.params, use_tqdm=False)
        return [output["usage"] for output in outputs]

    def _sample(self, prompts: list[list[int]]) -> Sample:
        plans: list[StepPlan] = []
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # nothing of the run before is left over
        with self._llm.observe(plans.append):
            start = time.perf_counter()
            usages = self._generate(prompts)
            seconds = time.perf_counter() - start
        return Sample(
            seconds=seconds,
            tokens=sum(usage["completion_tokens"] for usage in usages),
            forwards=sum(usage["forward_passes"] for usage in usages),
            plans=plans,
        )

    def _first_token(self) -> float:
        """Seconds until a request that runs alone has its first token."""
        work = self._workload
        (prompt,) = work.prompts(1, self._llm.spec)
        start = time.perf_counter()
        for step in self._llm.stream(prompt, work.params):
            if any(step.committed):
                return time.perf_counter() - start
        raise EngineError("a request ended without a committed token")


def _result(
    samples: list[Sample],
    requests: int,
    floor: Floor,
    kernels: KernelTime | None,
    peaks: tuple[int | None, int | None],
) -> Result:
    # counts differ between runs only if the device's arithmetic is not repeatable
    middle = sorted(samples, key=lambda s: s.seconds)[(len(samples) - 1) // 2]
    return Result(
        requests=requests,
        seconds=[s.seconds for s in samples],
        output_tokens=middle.tokens,
        tokens_per_second=Spread.of([s.tokens / s.seconds for s in samples]),
        steps=middle.steps,
        forwards_per_request=middle.forwards / requests,
        tokens_per_forward=middle.tokens / middle.forwards,
        requests_per_step=middle.entries / middle.steps,
        ms_per_step=statistics.median(1e3 * s.seconds / s.steps for s in samples),
        floor_seconds=floor.seconds(middle.plans),
        roofline_fraction=statistics.median(floor.seconds(s.plans) / s.seconds for s in samples),
        kernels=kernels,
        peak_allocated=peaks[0],
        peak_reserved=peaks[1],
        experts_touched=floor.experts(middle.plans, floor.touched) if floor.touched else None,
        experts_uniform=floor.experts(middle.plans, NONE_COUNTED),
    )


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
