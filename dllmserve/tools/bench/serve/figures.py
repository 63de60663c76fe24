"""From the outcomes of a row to the figures of its line in the table."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dllmserve.tools.bench.serve.load import Row
from dllmserve.tools.bench.serve.options import ServeOptions
from dllmserve.tools.bench.serve.outcome import OK, REJECTED, UNFINISHED, Outcome
from dllmserve.tools.text import percentile

#: seconds of delay that any client has, and the share of a core above which it has no room
_LATE, _BUSY = 0.01, 0.9


@dataclass(frozen=True)
class Times:
    """Seconds of ``count`` answers; a percentile lies between two values if need be."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Times | None:
        """Of those that are known; None if there are none.

        Example:
            >>> Times.of([1.0, 3.0, None, 2.0]).p50
            2.0
        """
        known = [value for value in values if value is not None]
        if not known:
            return None
        p50, p90, p99 = (percentile(known, percent) for percent in (50, 90, 99))
        return cls(len(known), statistics.fmean(known), p50, p90, p99, max(known))


@dataclass(frozen=True)
class Good:
    """Requests that were answered within the bounds.

    Attributes:
        requests: how many.
        share: of all that have ended, failed and rejected ones included.
        per_second: over the row's seconds.
    """

    requests: int
    share: float
    per_second: float


@dataclass(frozen=True)
class ClientFigures:
    """What the load generator itself had to do with the figures.

    Attributes:
        max_send_delay: most seconds between a scheduled arrival and the client getting to it.
        max_slot_wait: most seconds that a request waited for ``concurrency`` and a connection;
            None without a cap.
        cpu_share: of one core, over the row.
    """

    max_send_delay: float
    max_slot_wait: float | None
    cpu_share: float


@dataclass(frozen=True)
class ServeResult:
    """Figures of one row.

    Attributes:
        rate: requests per second that were asked for; None without a finite one.
        arrivals: "poisson", "gamma", "at once", "closed loop" or "trace".
        requests: that arrived; the sum of the next four.
        ok, rejected, failed, unfinished: how they ended. Only an interrupt leaves some unfinished.
        rejections: by HTTP status, 429 or 503.
        failures: by kind.
        messages: of each kind of failure and rejection, the first message.
        retry_after: refusals that said when to come back.
        seconds: from the start of the row to the end of its last request.
        arrived_per_second: requests over the seconds until the last one arrived, which a random
            process does not bring to exactly ``rate``; None if all came at once.
        requests_per_second: answered ones, over ``seconds``.
        output_tokens, tokens_per_second: by the server's usage; None without.
        tokens_per_forward: output tokens over forward passes, where the server reports both.
        without_usage: answers that did not say how many tokens they have.
        queue: by the server's clock; None if it does not say.
        first_text, total: from the scheduled arrival, of answered requests; the first only of
            streams.
        good: None without a bound.
        polled: whether results had to be asked for again and again.
        client: the load generator's own part.
    """

    rate: float | None
    arrivals: str
    requests: int
    ok: int
    rejected: int
    failed: int
    unfinished: int
    rejections: dict[str, int]
    failures: dict[str, int]
    messages: dict[str, str]
    retry_after: int
    seconds: float
    arrived_per_second: float | None
    requests_per_second: float
    output_tokens: int | None
    tokens_per_second: float | None
    tokens_per_forward: float | None
    without_usage: int
    queue: Times | None
    first_text: Times | None
    total: Times | None
    good: Good | None
    polled: bool
    client: ClientFigures

    @property
    def label(self) -> str:
        """The row's name: its rate, or where it has none, how requests arrive."""
        if self.rate is not None:
            return f"{self.rate:g}"
        return {"at once": "inf", "closed loop": "closed"}.get(self.arrivals, self.arrivals)

    @property
    def late(self) -> bool:
        """Whether the client was so late, or so busy, that it shows in the figures."""
        usual = self.total.p50 if self.total is not None else 0.0
        return self.client.max_send_delay > max(_LATE, usual / 10) or self.client.cpu_share > _BUSY


def result_of(row: Row, options: ServeOptions) -> ServeResult:
    """The figures of a row."""
    outcomes = row.outcomes
    ok = [o for o in outcomes if o.kind == OK]
    kinds = Counter(o.kind for o in outcomes)
    failed = Counter(o.kind for o in outcomes if o.failed)
    seconds = max(row.seconds, 1e-9)
    last = max((o.scheduled - row.start for o in outcomes), default=0.0)
    tokens = [o.output_tokens for o in ok if o.output_tokens is not None]
    return ServeResult(
        rate=row.rate if math.isfinite(row.rate) else None,
        arrivals=_arrivals(row.rate, options),
        requests=len(outcomes),
        ok=len(ok),
        rejected=kinds[REJECTED],
        failed=failed.total(),
        unfinished=kinds[UNFINISHED],
        rejections=dict(Counter(str(o.status) for o in outcomes if o.kind == REJECTED)),
        failures=dict(failed.most_common()),
        messages=_first_messages(outcomes),
        retry_after=sum(o.retry_after for o in outcomes),
        seconds=row.seconds,
        arrived_per_second=len(outcomes) / last if last > 0 else None,
        requests_per_second=len(ok) / seconds,
        output_tokens=sum(tokens) if tokens else None,
        tokens_per_second=sum(tokens) / seconds if tokens else None,
        tokens_per_forward=_tokens_per_forward(ok),
        without_usage=len(ok) - len(tokens),
        queue=Times.of(o.queue_seconds for o in ok),
        first_text=Times.of(o.first for o in ok),
        total=Times.of(o.total for o in ok),
        good=_good(outcomes, options, seconds) if options.bounded else None,
        polled=any(o.polled for o in outcomes),
        client=_client(row, options, seconds),
    )


def within_bounds(outcome: Outcome, options: ServeOptions) -> bool:
    """Whether a request was answered, and as fast as the bounds want."""
    if outcome.kind != OK:
        return False
    bounds = ((outcome.total, options.slo_total), (outcome.first, options.slo_first))
    return all(slo is None or (took is not None and took <= slo) for took, slo in bounds)


def _arrivals(rate: float, options: ServeOptions) -> str:
    if math.isnan(rate):
        return "trace"
    if math.isinf(rate):
        return "closed loop" if options.closed(rate) else "at once"
    return "poisson" if options.burstiness == 1 else "gamma"


def _first_messages(outcomes: Sequence[Outcome]) -> dict[str, str]:
    found: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.message is not None:
            found.setdefault(outcome.kind, outcome.message)
    return found


def _tokens_per_forward(ok: Sequence[Outcome]) -> float | None:
    both = [(o.output_tokens, o.forward_passes) for o in ok]
    known = [(t, f) for t, f in both if t is not None and f is not None]
    forwards = sum(f for _, f in known)
    return sum(t for t, _ in known) / forwards if forwards else None


def _good(outcomes: Sequence[Outcome], options: ServeOptions, seconds: float) -> Good:
    met = sum(within_bounds(o, options) for o in outcomes)
    ended = sum(o.kind != UNFINISHED for o in outcomes)
    return Good(met, met / ended if ended else 0.0, met / seconds)


def _client(row: Row, options: ServeOptions, seconds: float) -> ClientFigures:
    delays = [o.started - o.scheduled for o in row.outcomes]
    waits = [o.sent - o.started for o in row.outcomes if o.sent is not None]
    capped = options.concurrency is not None and not options.closed(row.rate)
    return ClientFigures(
        max_send_delay=max(delays, default=0.0),
        max_slot_wait=max(waits, default=0.0) if capped else None,
        cpu_share=row.cpu_seconds / seconds,
    )
