"""The report of a load test: a header and two tables for people, one record for machines."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group

from dllmserve import __version__
from dllmserve.tools.bench.serve.figures import ServeResult
from dllmserve.tools.bench.serve.options import DEFAULT_DURATION, DEFAULT_REQUESTS, ServeOptions
from dllmserve.tools.text import counted, header, known, rate_text, table

#: version of the record's layout, raised when a key changes its meaning or goes away
SCHEMA = 1
#: a line of a table: names of columns, which may repeat, and what stands there
_Cells = list[tuple[str, str]]


@dataclass(frozen=True)
class ServeReport:
    """Everything that ``dllmserve bench serve`` has to say.

    Attributes:
        options: what was asked for.
        model: name in the requests.
        server: what the server calls itself.
        results: one per row.
        interrupted: whether the last row was cut short.
    """

    options: ServeOptions
    model: str | None
    server: str | None
    results: Sequence[ServeResult]
    interrupted: bool = False

    def header(self) -> str:
        """What was measured, and how; lines of at most text.WIDTH columns."""
        lines = {
            "server": self._server_text(),
            "requests": self._requests_text(),
            "arrivals": self._arrivals_text(),
            "seconds": self._seconds_text(),
        }
        return header(lines, self.notes())

    def table(self) -> Group:
        """Two tables with a line per row: what became of the requests, and how long it took."""
        counts = table([_count_cells(result) for result in self.results], gap=1)
        times = table([_time_cells(result) for result in self.results], gap=1)
        return Group(counts, "", times)

    def title(self) -> str:
        """What was measured, for a picture."""
        return f"{self._server_text()}\n{self._arrivals_text()}"

    def notes(self) -> list[str]:
        """What a reader of the figures should know."""
        found = []
        if self.interrupted:
            left = self.results[-1].unfinished
            found.append(f"interrupted: the last row is cut short, {left} unfinished")
        found += [note for result in self.results for note in _row_notes(result)]
        if self.options.concurrency is not None and any(
            r.arrivals != "closed loop" for r in self.results
        ):
            found.append(
                f"concurrency={self.options.concurrency} makes this a partly closed loop: when the "
                "cap is reached the server gets fewer requests than the rate says; the wait for "
                "the cap is in the figures"
            )
        if any(r.arrivals == "closed loop" for r in self.results):
            found.append(
                "closed loop: a slow server gets fewer requests, so the figures say how fast "
                f"{self.options.concurrency} patient users are served, not what happens under load"
            )
        if any(r.polled for r in self.results):
            found.append(
                "the server does not hold ?wait=: results are asked for every 0.05 s, and times "
                "are up to that much too long"
            )
        return found

    def record(self) -> dict[str, Any]:
        """The JSON record; docs/benchmarks.md describes it."""
        return {
            "benchmark": "serve",
            "schema": SCHEMA,
            "versions": {"dllmserve": __version__, "python": platform.python_version()},
            "server": self.server,
            "model": self.model,
            "options": self.options.public(),
            "interrupted": self.interrupted,
            "notes": self.notes(),
            "results": [asdict(result) for result in self.results],
        }

    def _server_text(self) -> str:
        options = self.options
        name = f", server {self.server}" if self.server else ""
        model = f", model {self.model}" if self.model else ""
        how = "streamed" if options.stream else "not streamed"
        how = "submit and poll" if options.endpoint == "native" else how
        return f"{options.url}, {options.endpoint}, {how}{model}{name}"

    def _requests_text(self) -> str:
        options = self.options
        prompts = options.trace or options.prompts
        source = f"prompts of {prompts}" if prompts else "built-in prompts"
        more = "".join(f", {name}={value!r}" for name, value in (options.body or {}).items())
        sampling = f"max_tokens {options.max_tokens}, temperature {options.temperature:g}{more}"
        count = counted(options.warmup, "warm-up request")
        return f"{source}, {sampling}, timeout {options.timeout:g} s, {count}"

    def _arrivals_text(self) -> str:
        options = self.options
        given = [] if options.requests is None else [counted(options.requests, "request")]
        given += [] if options.duration is None else [f"{options.duration:g} s"]
        if not given and options.trace is None:
            finite = any(math.isfinite(rate) for rate in options.rates)
            given = [f"{DEFAULT_DURATION:g} s" if finite else f"{DEFAULT_REQUESTS} requests"]
        limit = f", at most {' and '.join(given)} a row" if given else ""
        cap = "" if options.concurrency is None else f", at most {options.concurrency} at once"
        return self._process_text() + limit + cap

    def _process_text(self) -> str:
        options = self.options
        if options.trace is not None:
            return f"at the times of {options.trace}"
        if not any(math.isfinite(rate) for rate in options.rates):
            return "all at once" if options.concurrency is None else "closed loop"
        rates = ", ".join(f"{rate:g}" for rate in options.rates)
        gamma = f"gamma-distributed gaps of shape {options.burstiness:g}"
        process = "Poisson process" if options.burstiness == 1 else gamma
        return f"{process}, {rates} requests/s, seed {options.seed}"

    def _seconds_text(self) -> str:
        closed = self.results and all(r.arrivals == "closed loop" for r in self.results)
        start = "from sending" if closed else "from the scheduled arrival"
        bounds = (("first text", self.options.slo_first), ("total", self.options.slo_total))
        good = " and ".join(f"{name} <= {slo:g} s" for name, slo in bounds if slo is not None)
        return f"{start}, answered requests only" + (f"; good: {good}" if good else "")


def _row_notes(result: ServeResult) -> Iterator[str]:
    if result.rejected:
        statuses = ", ".join(f"{n} with {status}" for status, n in result.rejections.items())
        asked = f", {result.retry_after} said when to come back" if result.retry_after else ""
        yield f"rate {result.label}: {result.rejected} rejected ({statuses}{asked})"
    for kind, number in result.failures.items():
        message = result.messages.get(kind)
        first = f", the first: {message}" if message else ""
        yield f"rate {result.label}: {number} failed, {kind}{first}"
    if result.without_usage:
        yield (
            f"rate {result.label}: {result.without_usage} of {counted(result.ok, 'answer')} came "
            "without usage; their tokens are not counted"
        )
    if result.late:
        client = result.client
        yield (
            f"rate {result.label}: the client could not keep up: up to "
            f"{client.max_send_delay:.3f} s late, {client.cpu_share:.0%} of a core; the figures "
            "are of client and server together"
        )


def _count_cells(result: ServeResult) -> _Cells:
    good = result.good
    return [
        ("rate", result.label),
        ("requests", str(result.requests)),
        ("arrived\n/s", known(result.arrived_per_second, _per_second)),
        ("ok", str(result.ok)),
        ("rejected", str(result.rejected)),
        ("failed", str(result.failed)),
        ("answered\n/s", _per_second(result.requests_per_second)),
        ("tokens\n/s", known(result.tokens_per_second, rate_text)),
        ("tokens/\nforward", known(result.tokens_per_forward, "{:.2f}".format)),
        ("good", known(good, lambda found: f"{found.share:.1%}")),
        ("good\n/s", known(good, lambda found: _per_second(found.per_second))),
        ("client\nlate", _seconds(result.client.max_send_delay)),
    ]


def _time_cells(result: ServeResult) -> _Cells:
    cells = [("rate", result.label)]
    parts = (("queue", result.queue), ("first text", result.first_text), ("total", result.total))
    for name, times in parts:
        for figure in ("mean", "p50", "p90", "p99"):
            value = None if times is None else getattr(times, figure)
            # the part's name stands above its first column
            above = name if figure == "mean" else ""
            cells.append((f"{above}\n{figure}", known(value, _seconds)))
    return cells


def _per_second(value: float) -> str:
    return f"{value:.2f}" if value < 100 else rate_text(value)


def _seconds(value: float) -> str:
    """Four digits are more than two runs agree on."""
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.1f}"
