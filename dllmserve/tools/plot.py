"""What pictures of results have in common: matplotlib, which only the extra "bench" brings."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllmserve._needs import missing
from dllmserve.errors import ConfigError

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


def new_figure(title: str, height: float, panels: int = 1) -> tuple[Any, Any]:
    """A figure of that height in inches, and its axes; several ones below each other."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.subplots(panels, sharex=True)
    for one in axes if panels > 1 else [axes]:
        one.set_axisbelow(True)
        one.grid(color=QUIET, linewidth=0.6)
        one.spines[["top", "right"]].set_visible(False)
    lines = [part for line in title.splitlines() for part in textwrap.wrap(line, _TITLE_WIDTH)]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=9)
    return figure, axes


def log_ticks(axes: Any, axis: Any, subs: Sequence[float] = (1, 2, 5)) -> None:
    """Label a logarithmic axis with round numbers, written out."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.minorticks_off()


def legend(figure: Any, columns: int, handles: Sequence[Any] | None = None) -> None:
    """A legend below the picture, of these handles, or of all that have a label."""
    look = {"frameon": False, "fontsize": 8, "loc": "outside lower center", "ncols": columns}
    figure.legend(**look, **({} if handles is None else {"handles": handles}))
