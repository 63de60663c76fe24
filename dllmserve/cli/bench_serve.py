"""``dllmserve bench serve``: load on a running server, and what its users would have seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from dllmserve._checks import user_path
from dllmserve.cli.bench_output import AsJson, Plot, picture, progress, show
from dllmserve.cli.exit_codes import INTERRUPTED
from dllmserve.cli.failure import short_errors
from dllmserve.cli.options import Group, with_options
from dllmserve.cli.prompts import read_prompts
from dllmserve.errors import ConfigError
from dllmserve.tools.bench.serve.options import (
    DEFAULT_DURATION,
    DEFAULT_REQUESTS,
    ENDPOINTS,
    ServeOptions,
    parse_body,
    parse_headers,
    parse_rates,
)

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

_SERVER, _LOAD, _ASKED, _REPORT = "Server", "Load", "Requests", "Report"
_GROUPS: dict[str, dict[str, str]] = {
    _SERVER: {
        "url": "Base URL of the server.",
        "endpoint": f"One of {', '.join(ENDPOINTS)}: /v1/chat/completions, /v1/completions, or "
        "/v1/generate with /v1/result.",
    },
    _LOAD: {
        "trace": 'Arrivals and prompts from lines of JSON: {"at": seconds, "prompt": text}, and '
        "fields of the request.",
        "duration": "Seconds of arrivals of a row.",
        "burstiness": "Shape of the gamma distribution of the gaps: 1 is a Poisson process, less "
        "is burstier, more is more regular.",
        "concurrency": "Most requests at once. A cap closes the loop: a slow server then gets "
        "fewer requests. With --rate inf, N users who each wait for their answer.",
        "seed": "Of arrivals and built-in prompts.",
        "warmup": "Requests before the first row that do not count.",
        "timeout": "Seconds that a request may take from being sent.",
    },
    _ASKED: {
        "prompts": "One prompt a line, in their order, over and over; JSON lines if the name ends "
        "in .jsonl. (default built-in English instructions)",
        "max_tokens": "Longest answer in tokens.",
        "temperature": "Of every request.",
    },
    _REPORT: {
        "slo_total": "A good request has its whole answer within so many seconds.",
        "slo_first": "A good request has its first text within so many seconds.",
    },
}
_SHOWN = {"duration": f"{DEFAULT_DURATION:g} without --requests", "temperature": "0"}
_NAMES = frozenset(f.name for f in fields(ServeOptions))
_OPTIONS = [
    Group(ServeOptions, panel, texts, skipped=_NAMES - texts.keys(), shown=_SHOWN)
    for panel, texts in _GROUPS.items()
]


def _option(panel: str, metavar: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, metavar=metavar, help=text, rich_help_panel=panel, **more)


Model = Annotated[
    str | None,
    _option(
        _SERVER,
        "NAME",
        "Model in the requests. (default the first that the server lists)",
        "--model",
        "-m",
    ),
]
Stream = Annotated[
    bool | None,
    _option(
        _SERVER,
        " ",
        "Whether answers are streamed. (default yes, but native has no streams)",
        "--stream/--no-stream",
    ),
]
ApiKey = Annotated[
    str | None,
    _option(
        _SERVER,
        "KEY",
        "Bearer token, never shown. The environment hides it from other users.",
        envvar="DLLMSERVE_API_KEY",
    ),
]
Headers = Annotated[
    list[str] | None,
    _option(_SERVER, "TEXT", "Header 'Name: value'; may be given several times."),
]
Rates = Annotated[
    str,
    _option(
        _LOAD,
        "X,X,...",
        "Requests per second, one row each; inf sends all at once. (default 1)",
        "--rate",
        "--rates",
        "-r",
        show_default=False,
    ),
]
Requests = Annotated[
    int | None,
    _option(
        _LOAD,
        "N",
        f"Most requests of a row. (default no limit; {DEFAULT_REQUESTS} with --rate inf)",
        "--requests",
        "-n",
    ),
]
Body = Annotated[str | None, _option(_ASKED, "JSON", "Fields merged into every request.")]
Records = Annotated[str | None, _option(_REPORT, "FILE", "Write one line of JSON per request.")]


@with_options(*_OPTIONS)
def serve(
    rate: Rates = "",
    requests: Requests = None,
    model: Model = None,
    stream: Stream = None,
    api_key: ApiKey = None,
    header: Headers = None,
    body: Body = None,
    records: Records = None,
    as_json: AsJson = False,
    plot: Plot = None,
    **options: Any,
) -> None:
    """Load on a running server, and what its users would have seen of it.

    Requests are sent when they are due, whether or not the ones before are answered, and times
    count from then. Nothing is sent twice. The last line is a JSON object with every figure;
    Ctrl-C reports what was measured so far.
    """
    with short_errors():
        image = picture(plot)
        given = {n: v for group in _OPTIONS for n, v in group.given(options).items()}
        if stream is None:
            stream = given.get("endpoint") != "native"
        if rate or "trace" not in given:
            given["rates"] = parse_rates(rate or "1")
        else:
            given["rates"] = ()
        checked = ServeOptions(
            **given,
            requests=requests,
            model=model,
            stream=stream,
            api_key=api_key or None,
            headers=parse_headers(header or ()),
            body={} if body is None else parse_body(body),
        )
        _run(checked, records, image, as_json)


def _run(options: ServeOptions, records: str | None, image: Path | None, as_json: bool) -> None:
    """Measure and report; also what was measured before an interrupt."""
    import asyncio

    from dllmserve.tools.bench.serve.arrivals import read_trace
    from dllmserve.tools.bench.serve.figures import result_of
    from dllmserve.tools.bench.serve.load import measure
    from dllmserve.tools.bench.serve.report import ServeReport

    entries = None if options.trace is None else read_trace(options.trace)
    source = _source(options, entries)
    with _records_file(records) as file:
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


@contextmanager
def _records_file(name: str | None) -> Iterator[TextIO | None]:
    """The opened file, before anything is measured, so that a wrong name costs nothing."""
    if name is None:
        yield None
        return
    path = user_path(name)
    if path.is_dir():
        raise ConfigError(f"records must be a file, got the folder {name!r}")
    with path.open("w", encoding="utf-8") as file:
        yield file


def _write_records(file: TextIO, measured: Measured, results: list[ServeResult]) -> None:
    for number, (row, result) in enumerate(zip(measured.rows, results, strict=True)):
        for outcome in row.outcomes:
            about = {"row": number, "rate": result.rate, "arrivals": result.arrivals}
            file.write(json.dumps({**about, **outcome.record(row.start)}) + "\n")
