"""``dllmserve bench serve``: load on a running server, and what its users would have seen."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from dllmserve.cli import INTERRUPTED
from dllmserve.cli.commands import short_errors
from dllmserve.cli.options import Group, with_options
from dllmserve.cli.output import OUTPUT, opened, picture, progress, show
from dllmserve.cli.prompts import read_prompts
from dllmserve.tools.bench.serve.options import ServeOptions, parse_body, parse_headers
from dllmserve.tools.text import numbers

if TYPE_CHECKING:  # only once something is measured
    from dllmserve.tools.bench.serve.arrivals import TraceEntry
    from dllmserve.tools.bench.serve.figures import ServeResult
    from dllmserve.tools.bench.serve.load import Measured
    from dllmserve.tools.bench.serve.prompts import Source

EPILOG = """
[bold]Examples[/bold]

dllmserve bench serve --rates 1,2,4,8 --slo-total 5 --plot load.png

dllmserve bench serve --endpoint native --rate 2 --duration 60 --body '{"steps": 32}'

dllmserve bench serve --url https://host/v1 --trace monday.jsonl --records monday-out.jsonl
"""

OPTIONS = Group(
    ServeOptions,
    "Options",
    names={
        "rates": "--rate --rates -r",
        "requests": "--requests -n",
        "model": "--model -m",
        "headers": "--header",
    },
    metavars={"rates": "X,X,...", "model": "NAME", "body": "JSON", "trace": "FILE"},
    lists={"headers": "TEXT"},
    shown={"rates": "1"},
)


@with_options(OPTIONS, replace(OUTPUT, panel="Report", skipped=frozenset()))
def serve(**options: Any) -> None:
    """Load on a running server, and what its users would have seen of it.

    Requests are sent when they are due, whether or not the ones before are answered, and times
    count from then. Nothing is sent twice. The last line is a JSON object with every figure;
    Ctrl-C reports what was measured so far.
    """
    with short_errors():
        image = picture(options["plot"])
        given = OPTIONS.given(options)
        given["api_key"] = given.get("api_key", os.environ.get("DLLMSERVE_API_KEY")) or None
        given.setdefault("stream", given.get("endpoint") != "native")
        if "rates" in given:
            given["rates"] = (*numbers("rate", given["rates"], float, "numbers > 0 or inf"),)
        elif "trace" in given:
            given["rates"] = ()
        for name, read in (("headers", parse_headers), ("body", parse_body)):
            if name in given:
                given[name] = read(given[name])
        _run(ServeOptions(**given), options["records"], image, options["json"])


def _run(options: ServeOptions, records: str | None, image: Path | None, as_json: bool) -> None:
    """Measure and report; also what was measured before an interrupt."""
    import asyncio

    from dllmserve.tools.bench.serve.arrivals import read_trace
    from dllmserve.tools.bench.serve.figures import result_of
    from dllmserve.tools.bench.serve.load import measure
    from dllmserve.tools.bench.serve.report import ServeReport

    entries = None if options.trace is None else read_trace(options.trace)
    source = _source(options, entries)
    with opened(records, "records") as file:
        measured = asyncio.run(measure(options, source, entries, progress))
        results = [result_of(row, options) for row in measured.rows]
        if file is not None:
            _write_records(file, measured, results)
    report = ServeReport(
        options, measured.model, measured.server, results, interrupted=measured.interrupted
    )
    show(report, as_json)
    if image is not None:
        from dllmserve.tools.bench.serve.plot import plot_serve

        plot_serve(results, report.title(), image)
    if measured.interrupted:
        raise typer.Exit(INTERRUPTED)


def _source(options: ServeOptions, entries: list[TraceEntry] | None) -> Source:
    from dllmserve.tools.bench.serve.prompts import builtin, listed, traced

    if entries is not None:
        return traced(entries)
    if options.prompts is not None:
        return listed(read_prompts((), options.prompts, demo=False))
    return builtin(options.seed)


def _write_records(file: TextIO, measured: Measured, results: list[ServeResult]) -> None:
    for number, (row, result) in enumerate(zip(measured.rows, results, strict=True)):
        for outcome in row.outcomes:
            about = {"row": number, "rate": result.rate, "arrivals": result.arrivals}
            file.write(json.dumps({**about, **outcome.record(row.start)}) + "\n")
