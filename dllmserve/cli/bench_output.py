"""What the commands of ``dllmserve bench`` have in common: options, progress and the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console, RenderableType

from dllmserve._checks import user_path
from dllmserve.tools.bench.plot import check_plot
from dllmserve.tools.bench.text import WIDTH

AsJson = Annotated[
    bool, typer.Option("--json", metavar=" ", help="Print one JSON object and nothing else.")
]
Plot = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Draw a .png or .svg (needs the extra bench)."),
]


class Shown(Protocol):
    """A report, for people and for machines."""

    def header(self) -> str:
        """What was measured, on what."""

    def table(self) -> RenderableType:
        """The figures."""

    def record(self) -> dict[str, Any]:
        """The JSON object."""


def picture(plot: str | None) -> Path | None:
    """Where the picture goes; checked before minutes of measuring."""
    if plot is None:
        return None
    path = user_path(plot)
    check_plot(path)
    return path


def progress(text: str) -> None:
    """A line per run, to a terminal alone; a live display would take time from the engine."""
    if sys.stderr.isatty():
        typer.echo(text, err=True)


def show(report: Shown, as_json: bool) -> None:
    """Print a report; its last line is the JSON object."""
    if not as_json:
        typer.echo(report.header() + "\n")
        # wider than any table, which takes what it needs: a cell that is cut off is no use
        console = Console(highlight=False, emoji=False, width=2 * WIDTH)
        console.print(report.table())
        typer.echo()
    typer.echo(json.dumps(report.record()))
