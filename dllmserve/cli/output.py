"""What commands with a report have in common: options, progress, files, and the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import typer
from rich.console import Console, RenderableType

from dllmserve._checks import user_path
from dllmserve.cli.options import Group
from dllmserve.errors import ConfigError
from dllmserve.knobs import knob
from dllmserve.tools.plot import check_plot
from dllmserve.tools.text import WIDTH

STDOUT = "-"


@dataclass(frozen=True)
class Output:
    """Where the report of a benchmark goes."""

    json: bool = knob(False, "Print one JSON object and nothing else.")
    plot: str | None = knob(None, "Draw a .png or .svg (needs the extra bench).")
    records: str | None = knob(None, "Write one line of JSON per request.")


OUTPUT = Group(
    Output,
    "Options",
    metavars={"plot": "FILE", "records": "FILE"},
    skipped=frozenset({"records"}),
    flags=frozenset({"json"}),
)


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
