"""Accuracy against forward passes per answer, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllmserve.tools.evaluation.figures import SettingResult
from dllmserve.tools.evaluation.labels import Spot, place_labels
from dllmserve.tools.evaluation.report import EvalReport
from dllmserve.tools.plot import DPI, GREENS, MEASURED, REFERENCE, legend, log_ticks, new_figure

#: colours of the rules, in the order in which a run has them
_COLORS = (
    MEASURED,
    "#c2571a",
    GREENS[0],
    "#7a4fa3",
    "#b5952c",
    "#a23b52",
    "#3c8d93",
    "#6b6b6b",
    "#d07fb0",
    "#7f9a3d",
)
#: of the caches, likewise
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
_HEIGHT = 5.6


def plot_report(report: EvalReport, path: Path) -> None:
    """Draw every setting with its interval, and the line of those that none beats.

    Args:
        report: the results.
        path: a .png or .svg; :func:`dllmserve.tools.plot.check_plot` tells whether it works.
    """
    results = report.settings
    figure, axes = new_figure(report.title(), _HEIGHT)
    rules = _styles([result.rule for result in results], _COLORS)
    caches = _styles([result.cache for result in results], _MARKERS)
    _draw_frontier(axes, results)
    for result in results:
        _draw_result(axes, result, rules[result.rule], caches[result.cache])
    _scale(axes, results)
    axes.set_xlabel("forward passes per answer (mean)")
    axes.set_ylabel("accuracy in %, with 95 % interval")
    entries = _legend(axes, rules, caches)
    legend(figure, 5 if len(entries) <= 8 else 4, entries)  # names are long
    place_labels(axes, [_spot(result, rules[result.rule]) for result in results])
    figure.savefig(path, dpi=DPI)


def frontier(results: Sequence[SettingResult]) -> list[SettingResult]:
    """Settings that no other one beats, by rising forward passes.

    One beats another if it is better in accuracy or forwards, and no worse in the other.
    """
    best: list[SettingResult] = []
    ordered = sorted(results, key=lambda r: (r.overall.forwards, -r.overall.accuracy))
    for result in ordered:
        if not best or result.overall.accuracy > best[-1].overall.accuracy:
            best.append(result)
    return best


def _styles(names: Sequence[str], choices: Sequence[str]) -> dict[str, str]:
    """One choice for each name, in the order of first use; many names share choices."""
    unique = dict.fromkeys(names)
    return {name: choices[place % len(choices)] for place, name in enumerate(unique)}


def _spot(result: SettingResult, color: str) -> Spot:
    figures = result.overall
    return Spot(
        x=figures.forwards,
        y=100 * figures.accuracy,
        low=100 * figures.low,
        high=100 * figures.high,
        name=result.name,
        color=color,
    )


def _draw_frontier(axes: Any, results: Sequence[SettingResult]) -> None:
    best = frontier(results)
    if len(best) < 2:
        return
    axes.plot(
        [r.overall.forwards for r in best],
        [100 * r.overall.accuracy for r in best],
        "--",
        color=REFERENCE,
        linewidth=1,
        label="frontier",
    )


def _draw_result(axes: Any, result: SettingResult, color: str, marker: str) -> None:
    figures = result.overall
    value = figures.accuracy
    axes.errorbar(
        figures.forwards,
        100 * value,
        # rounding must not make a length negative
        yerr=[[100 * max(value - figures.low, 0)], [100 * max(figures.high - value, 0)]],
        marker=marker,
        markersize=6,
        color=color,
        ecolor=(color, 0.45),
        elinewidth=1,
        capsize=2,
        linestyle="",
    )


def _scale(axes: Any, results: Sequence[SettingResult]) -> None:
    axes.set_xscale("log")
    forwards = [result.overall.forwards for result in results]
    low, high = min(forwards), max(forwards)
    # room for names, and for a tick on either side of a single point
    spread = max(high / low, 2.0) ** 0.12
    axes.set_xlim(low / spread / 1.05, high * spread * 1.05)
    log_ticks(axes, axes.xaxis, (1, 1.5, 2, 3, 5, 7) if high < 8 * low else (1, 2, 5))
    bottom = min(100 * result.overall.low for result in results)
    top = max(100 * result.overall.high for result in results)
    margin = max(0.12 * (top - bottom), 0.2)
    axes.set_ylim(bottom - margin, top + margin)


def _legend(axes: Any, rules: dict[str, str], caches: dict[str, str]) -> list[Any]:
    from matplotlib.lines import Line2D

    line = list(axes.get_legend_handles_labels()[0])  # the frontier alone has a label
    colors = [
        Line2D([], [], marker="o", linestyle="", color=color, label=f"unmask {rule}")
        for rule, color in rules.items()
    ]
    markers = [
        Line2D([], [], marker=marker, linestyle="", color=REFERENCE, label=f"cache {cache}")
        for cache, marker in caches.items()
    ]
    return colors + (markers if len(caches) > 1 else []) + line
