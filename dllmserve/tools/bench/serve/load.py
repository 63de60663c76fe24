"""Sending the requests of a load test when they are due, and noting what became of them.

A request counts from the moment at which it was to arrive. If the server stalls, or the client is
late, the requests that are due meanwhile have waited, and their latencies say so; a client that
counts from its own sending would leave that out, and look best when the server is worst.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

from dllmserve.errors import ConfigError
from dllmserve.tools.bench.serve.arrivals import TraceEntry, arrival_times
from dllmserve.tools.bench.serve.endpoints import Api, Native, OpenAI, error_message, json_object
from dllmserve.tools.bench.serve.http import BAD_ANSWER, HttpClient, Reply, allow_many_connections
from dllmserve.tools.bench.serve.options import ServeOptions, base_url
from dllmserve.tools.bench.serve.outcome import OK, REJECTED, Outcome, RequestFailed
from dllmserve.tools.bench.serve.prompts import Source

TIMEOUT = "timeout"
#: seconds that the server may take to list its models
_HELLO_SECONDS = 30.0
#: seconds before the first arrival, so that it is not late already
_LEAD = 0.01


@dataclass
class Row:
    """What happened at one rate.

    Attributes:
        rate: requests per second that were asked for; infinity is all at once, NaN a trace.
        start: the moment that arrivals count from, by the event loop's clock.
        outcomes: in the order of arrival.
        seconds: from the start to the end of the last request.
        cpu_seconds: of this process in that time.
        interrupted: whether it was cut short.
    """

    rate: float
    start: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    interrupted: bool = False


@dataclass
class Measured:
    """All rows of a load test.

    Attributes:
        model: name that was in the requests.
        server: what the server calls itself.
        rows: one per rate; the last one is cut short if ``interrupted``.
    """

    model: str | None
    server: str | None
    rows: list[Row] = field(default_factory=list)

    @property
    def interrupted(self) -> bool:
        """Whether the measurement was cut short."""
        return bool(self.rows) and self.rows[-1].interrupted


async def measure(
    options: ServeOptions,
    source: Source,
    trace: list[TraceEntry] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Run every row, one after the other.

    Cancelling ends the row under way; it is then the last one, with what was measured so far.

    Args:
        options: of the load test.
        source: of prompts.
        trace: arrivals, in place of ``options.rates``.
        progress: told in a few words what is being done.

    Raises:
        ConfigError: the server does not answer, wants a key or lists no model, or the warm-up
            request failed.
    """
    allow_many_connections()
    headers = dict(options.headers or {})
    if options.api_key is not None:
        headers.setdefault("authorization", f"Bearer {options.api_key}")
    client = HttpClient(base_url(options.url), headers)
    try:
        measured = await _hello(client, options)
        kind = Native if options.endpoint == "native" else OpenAI
        api = kind(client, options, measured.model)
        await _warm_up(api, options, source)
        for rate in (math.nan,) if trace is not None else options.rates:
            run = _Run(api, options, source, rate, trace)
            progress(run.plan())
            measured.rows.append(await run.run())
            if measured.interrupted:
                break
    finally:
        await client.close()
    return measured


class _Run:
    """One row under way."""

    def __init__(
        self,
        api: Api,
        options: ServeOptions,
        source: Source,
        rate: float,
        trace: list[TraceEntry] | None,
    ) -> None:
        self._api, self._options, self._source = api, options, source
        self._trace = trace
        self._row = Row(rate)
        self._clock = asyncio.get_running_loop().time
        limit = options.concurrency
        self._slots = None if limit is None else asyncio.Semaphore(limit)

    def plan(self) -> str:
        """What is about to be done, in a few words."""
        rate = self._row.rate
        most, until = self._options.limits(rate)
        if self._trace is not None:
            return f"trace of {len(self._trace)} requests"
        amount = f"{most} requests" if math.isinf(until) else f"{until:g} s"
        return f"rate {rate:g}: {amount}"

    async def run(self) -> Row:
        """Send everything and wait for every answer."""
        row = self._row
        cpu = time.process_time()
        row.start = self._clock() + _LEAD
        try:
            if self._options.closed(row.rate):
                await self._closed_loop()
            else:
                await self._open_loop()
        except asyncio.CancelledError:
            row.interrupted = True
        ended = [o.finished for o in row.outcomes if o.finished is not None]
        last = self._clock() if row.interrupted else max(ended, default=row.start)
        row.seconds = max(last - row.start, 0.0)
        row.cpu_seconds = time.process_time() - cpu
        return row

    async def _open_loop(self) -> None:
        async with asyncio.TaskGroup() as group:
            for index, at in enumerate(self._arrivals()):
                due = self._row.start + at
                if (early := due - self._clock()) > 0:
                    await asyncio.sleep(early)
                group.create_task(self._one(index, due))

    def _arrivals(self) -> Iterator[float]:
        most, until = self._options.limits(self._row.rate)
        if self._trace is not None:
            times = iter([entry.at for entry in self._trace])
        else:
            options = self._options
            times = arrival_times(self._row.rate, options.burstiness, options.seed)
        for _ in range(most):
            at = next(times, math.inf)
            if at >= until:  # also the end of a trace
                return
            yield at

    async def _closed_loop(self) -> None:
        """As many users as the cap says; each asks again when its answer has come."""
        most, until = self._options.limits(self._row.rate)
        numbers = count()

        async def user() -> None:
            while (now := self._clock()) - self._row.start < until:
                if (index := next(numbers)) >= most:
                    return
                await self._one(index, now)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._options.concurrency or 1, most)):
                group.create_task(user())

    async def _one(self, index: int, due: float) -> None:
        outcome = Outcome(index, due, self._clock())
        self._row.outcomes.append(outcome)
        if self._slots is None:
            await self._ask(outcome)
        else:
            async with self._slots:
                await self._ask(outcome)

    async def _ask(self, outcome: Outcome) -> None:
        body = self._api.body(*self._source(outcome.index))
        await ask(self._api, body, outcome, self._options.timeout)


async def ask(api: Api, body: bytes, outcome: Outcome, timeout: float) -> None:
    """Send one request and note how it ended."""
    try:
        async with asyncio.timeout(timeout):
            await api.ask(body, outcome)
        outcome.kind = OK
    except TimeoutError:
        outcome.fail(RequestFailed(TIMEOUT, f"no answer within {timeout:g} s", outcome.status))
    except RequestFailed as failure:
        outcome.fail(failure)
    if outcome.finished is None:
        outcome.finished = asyncio.get_running_loop().time()


async def _hello(client: HttpClient, options: ServeOptions) -> Measured:
    """Find out that the server is there, and the name of its model."""
    reply = Reply()
    try:
        async with asyncio.timeout(_HELLO_SECONDS):
            await client.exchange("GET", "/v1/models", b"", reply)
    except TimeoutError as error:
        raise ConfigError(
            f"the server at {options.url} has not answered within {_HELLO_SECONDS:g} s"
        ) from error
    except RequestFailed as failure:
        if failure.kind == BAD_ANSWER:
            raise ConfigError(
                f"what listens at {options.url} does not speak HTTP/1.1 ({failure.message})"
            ) from failure
        raise ConfigError(
            f"no server answers at {options.url} ({failure.message}); start one with: dllmserve "
            "serve, or name another with --url"
        ) from failure
    if reply.status in (401, 403):
        advice = "was refused" if options.api_key else "is wanted: --api-key or DLLMSERVE_API_KEY"
        raise ConfigError(f"an API key {advice}; {options.url} said {reply.status}")
    model = options.model
    if model is None and options.endpoint != "native":
        model = _first_model(reply)
        if model is None:
            said = error_message(reply) if reply.status != 200 else "no model"
            raise ConfigError(
                f"no --model was given and {options.url}/v1/models names none "
                f"(HTTP {reply.status}: {said})"
            )
    return Measured(model, reply.headers.get("server"))


def _first_model(reply: Reply) -> str | None:
    try:
        listed = json_object(reply).get("data")
    except RequestFailed:
        return None
    first = listed[0] if isinstance(listed, list) and listed else None
    name = first.get("id") if isinstance(first, dict) else None
    return name if isinstance(name, str) else None


async def _warm_up(api: Api, options: ServeOptions, source: Source) -> None:
    """Requests that do not count; the first one that fails says what is wrong with all."""
    clock = asyncio.get_running_loop().time
    for number in range(options.warmup):
        # from the other end, so that they are not the ones that count
        outcome = Outcome(-1 - number, clock(), clock())
        await ask(api, api.body(*source(outcome.index)), outcome, options.timeout)
        if outcome.kind != OK:
            kind = f"rejected with {outcome.status}" if outcome.kind == REJECTED else outcome.kind
            raise ConfigError(
                f"the warm-up request failed: {kind}: {outcome.message or 'no reason was given'}; "
                "--warmup 0 starts without it"
            )
