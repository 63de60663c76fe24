"""Run scenarios: a table for people, one JSON line for programs, exit code 1 for a failure."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chaos.model import KINDS
from chaos.scenario import Ground, Report, Scenario
from chaos.scenarios import SCENARIOS
from dllmserve.tools.bench.serve.http import allow_many_connections


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for.

    Args:
        arguments: of the command line; those of this process by default.

    Returns:
        0 if every scenario passed, else 1.
    """
    by_name = {scenario.name: scenario for scenario in SCENARIOS}
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    names = ", ".join(by_name)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{names} (default: all)")
    parser.add_argument(
        "--model", choices=KINDS, default="full", help="what is served (default: full attention)"
    )
    parser.add_argument("--quick", action="store_true", help="smaller, a few seconds each")
    parser.add_argument("--keep", metavar="FOLDER", help="keep logs and job stores there")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in by_name]
    if unknown:
        parser.error(f"there is no scenario {unknown[0]!r}; there are {names}")
    chosen = [by_name[name] for name in given.names] or [
        scenario for scenario in SCENARIOS if not given.quick or scenario.quick is not None
    ]
    # a connection is a file, and so is one of the server, which inherits the limit
    allow_many_connections()
    console = Console(highlight=False)
    with _folder(given.keep) as folder:
        ground = Ground.make(Path(folder), KINDS[given.model])
        reports = _play(chosen, ground, console, quick=given.quick)
    console.print(_table(chosen, reports))
    sys.stdout.write(json.dumps(_line(chosen, reports, given)) + "\n")
    return 1 if any(report.wrong for report in reports) else 0


def _folder(kept: str | None) -> AbstractContextManager[str]:
    """Where everything is written."""
    if kept is None:
        return tempfile.TemporaryDirectory(prefix="chaos-")
    Path(kept).mkdir(parents=True, exist_ok=True)
    return nullcontext(kept)


def _play(
    chosen: Sequence[Scenario], ground: Ground, console: Console, *, quick: bool
) -> list[Report]:
    """One after the other; what goes wrong is said at once."""
    reports = []
    for scenario in chosen:
        console.print(f"[bold]{scenario.name}[/bold]: {scenario.does}")
        report = asyncio.run(scenario.play(ground, quick=quick))
        for text in report.wrong:
            console.print(Text(f"  {text}", style="red"))
        console.print(f"  {'failed' if report.wrong else 'passed'}: {_figures(report)}")
        reports.append(report)
    return reports


def _table(chosen: Sequence[Scenario], reports: Sequence[Report]) -> Table:
    table = Table(title="Faults", show_lines=True)
    for name in ("scenario", "has to", "measured", "result"):
        table.add_column(name)
    for scenario, report in zip(chosen, reports, strict=True):
        result = "[red]failed[/red]" if report.wrong else "[green]passed[/green]"
        table.add_row(scenario.name, scenario.passes, _figures(report), result)
    return table


def _figures(report: Report) -> str:
    return ", ".join(f"{name} {value}" for name, value in report.measured.items())


def _line(
    chosen: Sequence[Scenario], reports: Sequence[Report], given: argparse.Namespace
) -> object:
    results = {
        scenario.name: {
            "passed": not report.wrong,
            "wrong": report.wrong,
            "measured": report.measured,
        }
        for scenario, report in zip(chosen, reports, strict=True)
    }
    return {
        "chaos": results,
        "model": given.model,
        "quick": given.quick,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "passed": not any(report.wrong for report in reports),
    }


if __name__ == "__main__":
    sys.exit(main())
