"""What commands with a report have in common: options, progress, files, and the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol, TextIO

import typer
from rich.console import Console, RenderableType

from dllmserve._checks import user_path
from dllmserve.errors import ConfigError
from dllmserve.tools.plot import check_plot
from dllmserve.tools.text import WIDTH

STDOUT = "-"

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


@contextmanager
def opened(name: str | None, what: str) -> Iterator[TextIO | None]:
    """The file, before anything is measured, so that a wrong name costs nothing.

    Args:
        name: of the file, or "-" for standard output.
        what: it holds, for errors.
    """
    if name is None or name == STDOUT:
        yield None if name is None else sys.stdout
        return
    path = user_path(name)
    if path.is_dir():
        raise ConfigError(f"{what} must be a file, got the folder {name!r}")
    with path.open("w", encoding="utf-8") as file:
        yield file


def show_tables(report: Shown) -> None:
    """Print a report for people."""
    typer.echo(report.header() + "\n")
    # wider than any table, which takes what it needs: a cell that is cut off is no use
    Console(highlight=False, emoji=False, width=2 * WIDTH).print(report.table())


def show(report: Shown, as_json: bool) -> None:
    """Print a report; its last line is the JSON object."""
    if not as_json:
        show_tables(report)
        typer.echo()
    typer.echo(json.dumps(report.record()))
