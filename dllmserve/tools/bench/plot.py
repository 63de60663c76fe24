"""Pictures of results, with matplotlib, which only the extra "bench" brings."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllmserve._needs import missing
from dllmserve.errors import ConfigError

if TYPE_CHECKING:  # loads torch
    from dllmserve.tools.bench.run import Result

SUFFIXES = (".png", ".svg")
MEASURED, REFERENCE, QUIET = "#1f5fa8", "#8a8a8a", "#d9d9d9"
BLUES, GREENS = (MEASURED, "#7fa8d1", QUIET), ("#2f7d4f", "#a9cfb6")
DPI = 150
#: characters of a title's line that fit the picture
_TITLE_WIDTH = 92


def check_plot(path: Path) -> None:
    """Raise ConfigError unless a picture can be written there; asked before measuring.

    Raises:
        ConfigError: matplotlib is missing, or the name or folder is wrong.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"plot must be a file that ends in .png or .svg, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ConfigError(f"plot: there is no folder {str(path.parent)!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(missing("plot", "matplotlib", "bench")) from error


def plot_throughput(results: Sequence[Result], title: str, path: Path) -> None:
    """Output tokens per second against the number of requests, below the roofline."""
    ordered = sorted(results, key=lambda r: r.requests)
    counts = [r.requests for r in ordered]
    rates = [r.tokens_per_second for r in ordered]
    from matplotlib.ticker import LogLocator

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
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_xlabel("requests submitted at once")
    axes.set_ylabel("output tokens per second")
    axes.minorticks_off()
    axes.grid(color=QUIET, linewidth=0.6)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=DPI)


def plot_latency(result: Result, title: str, path: Path) -> None:
    """What the median latency is made of, by what the device does and by what is seen."""
    latency = result.latency
    if latency is None:
        raise ValueError("a result of the throughput benchmark has no latency")
    first = min(latency.first_token, latency.median)
    seen = {"before the first token": first, "after it": latency.median - first}
    figure, axes = new_figure(title, 3.0)
    for name, parts, shades in (
        ("by what the\ndevice does", work_parts(result, latency.median), BLUES),
        ("by what the\nreader sees", seen, GREENS),
    ):
        left = 0.0
        for (label, seconds), color in zip(parts.items(), shades, strict=False):
            text = f"{label} {seconds:.3f} s"
            axes.barh(name, seconds, left=left, color=color, height=0.5, label=text)
            left += seconds
    worst = axes.axvline(latency.p90, color="black", linewidth=1, linestyle=":")
    axes.invert_yaxis()
    axes.margins(x=0.02)
    axes.set_xlabel("seconds")
    axes.spines[["top", "right"]].set_visible(False)
    drawn, texts = axes.get_legend_handles_labels()
    figure.legend(
        [*drawn, worst],
        [*texts, f"90th percentile {latency.p90:.3f} s"],
        frameon=False,
        fontsize=8,
        loc="outside lower center",
        ncols=3,
    )
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


def new_figure(title: str, height: float, panels: int = 1) -> tuple[Any, Any]:
    """A figure of that height in inches, and its axes; several ones below each other."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.subplots(panels, sharex=True)
    lines = [part for line in title.splitlines() for part in textwrap.wrap(line, _TITLE_WIDTH)]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=9)
    return figure, axes
