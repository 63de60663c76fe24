"""Pictures of the engine's benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dllmserve.tools.plot import (
    BLUES,
    DPI,
    GREENS,
    MEASURED,
    REFERENCE,
    legend,
    log_ticks,
    new_figure,
)

if TYPE_CHECKING:  # loads torch
    from dllmserve.tools.bench.run import Result


def plot_throughput(results: Sequence[Result], title: str, path: Path) -> None:
    """Output tokens per second against the number of requests, below the roofline."""
    ordered = sorted(results, key=lambda r: r.requests)
    counts = [r.requests for r in ordered]
    rates = [r.tokens_per_second for r in ordered]
    figure, axes = new_figure(title, 4.4)
    low = [rate.median - rate.min for rate in rates]
    high = [rate.max - rate.median for rate in rates]
    floor = [r.roofline_tokens_per_second for r in ordered]
    axes.plot(counts, floor, "--", marker="s", markersize=4, color=REFERENCE, label="roofline")
    axes.errorbar(
        counts,
        [rate.median for rate in rates],
        yerr=[low, high],
        marker="o",
        capsize=3,
        color=MEASURED,
        label="measured: median, min to max",
    )
    for result in ordered:
        axes.annotate(
            f"{result.tokens_per_second.median:,.0f}\n({result.roofline_fraction:.0%})",
            (result.requests, result.tokens_per_second.min),
            textcoords="offset points",
            xytext=(0, -10),
            ha="center",
            va="top",
            fontsize=8,
            color=MEASURED,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.margins(x=0.12, y=0.2)
    log_ticks(axes, axes.yaxis)
    axes.set_xlabel("requests submitted at once")
    axes.set_ylabel("output tokens per second")
    legend(figure, 2)
    figure.savefig(path, dpi=DPI)


def plot_latency(result: Result, title: str, path: Path) -> None:
    """What the median latency is made of, by what the device does and by what is seen."""
    latency = result.latency
    if latency is None:
        raise ValueError("a result of the throughput benchmark has no latency")
    first = min(latency.first_token, latency.median)
    seen = {"before the first token": first, "after it": latency.median - first}
    figure, axes = new_figure(title, 3.0)
    axes.grid(visible=False)
    for name, parts, shades in (
        ("by what the\ndevice does", work_parts(result, latency.median), BLUES),
        ("by what the\nreader sees", seen, GREENS),
    ):
        left = 0.0
        for (label, seconds), color in zip(parts.items(), shades, strict=False):
            text = f"{label} {seconds:.3f} s"
            axes.barh(name, seconds, left=left, color=color, height=0.5, label=text)
            left += seconds
    worst = f"90th percentile {latency.p90:.3f} s"
    axes.axvline(latency.p90, color="black", linewidth=1, linestyle=":", label=worst)
    axes.invert_yaxis()
    axes.margins(x=0.02)
    axes.set_xlabel("seconds")
    legend(figure, 3)
    figure.savefig(path, dpi=DPI)


def work_parts(result: Result, whole: float) -> dict[str, float]:
    """Seconds of a run by what the device does; they add up to ``whole``.

    The kernel share comes from the profiled run, whose host is slower, so the split between
    kernels and none is an estimate.
    """
    floor = min(result.floor_seconds, whole)
    if result.kernels is None:
        return {"roofline's floor": floor, "everything else": whole - floor}
    busy = max(result.kernels.share * whole, floor)
    return {
        "roofline's floor": floor,
        "kernels beyond it": busy - floor,
        "no kernel running": whole - busy,
    }
