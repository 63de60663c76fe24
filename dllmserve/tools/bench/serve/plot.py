"""Latency and answered requests against the rate, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllmserve.tools.bench.serve.figures import ServeResult, Times
from dllmserve.tools.plot import BLUES, DPI, GREENS, MEASURED, REFERENCE, log_ticks, new_figure

#: what lies further apart is drawn on a logarithmic axis
_LINEAR_SPAN = 8
#: share of the axis that two of its labels are apart at least
_LABEL_GAP = 0.05


def plot_serve(results: Sequence[ServeResult], title: str, path: Path) -> None:
    """Percentiles of the latency above, requests answered and answered in time below."""
    figure, (above, below) = new_figure(title, 6.0, panels=2)
    numeric = all(result.rate is not None for result in results)
    # nothing lies between a rate and "all at once"
    line = {"linestyle": "-" if numeric else "", "markersize": 4}
    places = _places(results, below)
    _draw_times(above, places, results, line)
    _draw_rates(below, places, results, line)
    for axes in (above, below):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=DPI)


def _places(results: Sequence[ServeResult], axes: Any) -> list[float]:
    """Where each row stands on the horizontal axis, which the panels share."""
    rates = [result.rate for result in results if result.rate is not None]
    numeric = len(rates) == len(results)
    places = rates if numeric else [float(number) for number in range(len(results))]
    if numeric and max(places) > _LINEAR_SPAN * min(places):
        axes.set_xscale("log", base=2)
    scale = math.log if axes.get_xscale() == "log" else float
    least = _LABEL_GAP * (scale(max(places)) - scale(min(places)))
    shown: dict[float, str] = {}
    for place, result in sorted(zip(places, results, strict=True), key=lambda pair: pair[0]):
        if not shown or scale(place) - scale(max(shown)) >= least:
            shown[place] = result.label
    axes.set_xticks(list(shown), list(shown.values()))
    axes.minorticks_off()
    axes.margins(x=0.08)
    return places


def _draw_times(
    axes: Any, places: Sequence[float], results: Sequence[ServeResult], line: dict[str, Any]
) -> None:
    parts: list[tuple[str, list[Times | None], tuple[str, ...]]] = [
        ("total", [result.total for result in results], BLUES),
        ("first text", [result.first_text for result in results], GREENS),
    ]
    seen: list[float] = []
    for name, times, shades in parts:
        for figure, marker, shade in (("p99", "^", 1), ("p90", "s", 1), ("p50", "o", 0)):
            if not any(times):
                continue
            values = [getattr(t, figure) if t is not None else math.nan for t in times]
            look = {"marker": marker, "color": shades[shade], "label": f"{name}, {figure}"}
            axes.plot(places, values, **look, **line)
            seen += [value for value in values if value > 0]
    axes.set_ylabel("seconds from the arrival")
    axes.set_ylim(bottom=0)
    if seen and max(seen) > _LINEAR_SPAN * min(seen):
        axes.set_ylim(auto=True)
        axes.set_yscale("log")
        axes.margins(y=0.12)
        log_ticks(axes, axes.yaxis)


def _draw_rates(
    axes: Any, places: Sequence[float], results: Sequence[ServeResult], line: dict[str, Any]
) -> None:
    """A random process does not bring exactly its rate, so what came is drawn, not the rate."""
    arrived = [result.arrived_per_second or math.nan for result in results]
    answered = [result.requests_per_second for result in results]
    axes.plot(places, arrived, marker="x", color=REFERENCE, label="arrived", **line)
    axes.plot(places, answered, marker="o", color=MEASURED, label="answered", **line)
    if any(result.good for result in results):
        good = [result.good.per_second if result.good else 0.0 for result in results]
        axes.plot(places, good, marker="s", color=GREENS[0], label="in time (good)", **line)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("requests per second")
    axes.set_xlabel("requests per second asked for")
