"""Clients that are slow on purpose: all are closed in time, and nobody else notices them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from chaos.answers import Ask
from chaos.load import Load, chat, percentile
from chaos.raw import Reader, half_header, slow_body
from chaos.scenario import Ground, Report, Scenario
from chaos.server import Server

#: seconds that a closed connection may be late, at the least
SLACK_S = 2.0
#: every event of a stream names the model, so a long name makes small answers that are large
#: on the wire: more than all buffers on the way can hold
_NAME = "m" * 10_000
_LARGE: dict[str, Any] = {
    "messages": [{"role": "user", "content": "sort a list"}],
    "max_tokens": 24,
    "temperature": 0.0,
    # one whole character, and so one event, a step
    "block_length": 1,
    "logit_bias": {"65": 100},
    "stream": True,
}
_LARGE_PATH = "/v1/chat/completions"
_CLIENTS = 6
Slow = Callable[[int, float], Awaitable[float | None]]


async def run(
    ground: Ground,
    report: Report,
    *,
    headers: int,
    bodies: int,
    readers: int,
    limit_s: float,
    noise_s: float,
) -> None:
    """Normal traffic beside slow clients, against the same beside clients that read.

    The server gives ``limit_s`` seconds for headers, for a body, and for reading. A busy machine
    may add ``noise_s`` seconds.
    """
    limit = str(limit_s)
    options = (
        *("--header-timeout", limit, "--body-timeout", limit, "--write-timeout", limit),
        *("--served-model-name", _NAME),
    )
    asks = ground.known.short()
    async with ground.server(ground.place("slow"), *options) as server:
        await _traffic(server, asks, report, asyncio.sleep(0.3))  # warm
        idle = await _traffic(server, asks, report, asyncio.sleep(limit_s))
        began = time.monotonic()
        baseline = await _traffic(server, asks, report, _read_all(server, readers, limit_s / 2))
        reading_s = time.monotonic() - began
        crowd = _Crowd(server, report, limit_s, max(SLACK_S, 5 * noise_s))
        slow = crowd.all(headers, bodies, readers, reading_s)
        beside = await _traffic(server, asks, report, slow)
        metrics = await server.metrics()
    rejected = int(metrics.get("admission_rejections_total", 0))
    report.expect(not rejected, f"{rejected} requests were refused")
    base, loaded = (percentile(seconds, 0.99) for seconds in (baseline, beside))
    # what a busy machine adds is not a factor
    allowed = 2 * max(base, noise_s)
    report.expect(loaded <= allowed, f"p99 is {loaded:.2f} s beside slow clients, was {base:.2f} s")
    report.measured |= {
        "p99 s alone": round(percentile(idle, 0.99), 3),
        "p99 s beside readers": round(base, 3),
        "p99 s beside slow clients": round(loaded, 3),
        "normal requests": len(beside),
    }


async def _traffic(
    server: Server, asks: list[Ask], report: Report, until: Awaitable[object]
) -> list[float]:
    """Normal clients until something is through; the seconds of each answer."""
    async with Load(server.port, asks, clients=_CLIENTS, ways={chat: 1}, seed=5) as load:
        await until
    report.wrong += load.tally.wrong[:3]
    return load.tally.seconds


async def _read_all(server: Server, readers: int, arrive_s: float) -> None:
    """The same large answers, asked for over some seconds and read as they come."""

    async def one(place: int) -> None:
        reader = Reader(server.port, _LARGE_PATH, _LARGE)
        await asyncio.sleep(arrive_s * place / readers)
        await reader.ask()
        await reader.read()
        reader.close()

    await asyncio.gather(*[one(i) for i in range(readers)])


class _Crowd:
    """Slow clients of all kinds.

    Args:
        server: that they connect to.
        report: for what goes wrong.
        limit_s: the server's limits.
        slack_s: how late it may be.
    """

    def __init__(self, server: Server, report: Report, limit_s: float, slack_s: float) -> None:
        self._server, self._report = server, report
        self._limit_s, self._slack_s = limit_s, slack_s

    async def all(self, headers: int, bodies: int, readers: int, reading_s: float) -> None:
        """So many of each, at once."""
        await asyncio.gather(
            self._closed_in_time("half headers", half_header, headers),
            self._closed_in_time("slow bodies", slow_body, bodies),
            self._not_read(readers, reading_s),
        )

    async def _closed_in_time(self, what: str, slow: Slow, count: int) -> None:
        limit, port = self._limit_s, self._server.port
        seconds = await asyncio.gather(*[slow(port, limit + 10) for _ in range(count)])
        closed = [s for s in seconds if s is not None]
        late = sum(s > limit + self._slack_s for s in closed) + count - len(closed)
        early = sum(s < 0.8 * limit for s in closed)
        expect, measured = self._report.expect, self._report.measured
        expect(not late, f"{late} of {count} {what} were not closed in {limit + self._slack_s:g} s")
        expect(not early, f"{early} of {count} {what} were closed before their time")
        measured[f"{what} closed"] = f"{len(closed)} of {count}"
        measured[f"{what}, longest s"] = round(max(closed, default=0.0), 1)

    async def _not_read(self, count: int, reading_s: float) -> None:
        """Ask for large answers and never read; the system knows who is still connected."""
        server, expect, measured = self._server, self._report.expect, self._report.measured
        readers = [Reader(server.port, _LARGE_PATH, _LARGE) for _ in range(count)]
        began = time.monotonic()
        for reader in readers:
            await reader.ask()
            await asyncio.sleep(self._limit_s / 2 / count)
        # what the answers take to be made, and then the limit
        allowed = reading_s + self._limit_s + self._slack_s
        while (left := _connected(server, readers)) and time.monotonic() - began < allowed + 10:
            await asyncio.sleep(0.1)
        seconds = time.monotonic() - began
        sizes = []
        for reader in readers:
            sizes.append(await reader.read())
            reader.close()
        expect(not left, f"{left} streams that are not read are still there")
        expect(seconds <= allowed, f"unread streams were there {seconds:.1f} s")
        measured["unread streams closed"] = f"{count - left} of {count}"
        measured["unread streams gone after s"] = round(seconds, 1)
        # less would mean that nobody had to wait for a reader
        whole = len(_NAME) * _LARGE["max_tokens"]
        expect(max(sizes) < whole, "an answer fits into the buffers: nothing was tested")
        measured["bytes taken of one, most"] = f"{max(sizes)} of {whole}"


def _connected(server: Server, readers: list[Reader]) -> int:
    """How many of the readers the server has a connection with."""
    ours = {reader.port for reader in readers}
    found = server.process.net_connections(kind="tcp")
    return sum(bool(c.raddr) and c.raddr.port in ours for c in found)


SLOW_CLIENTS = Scenario(
    name="slow-clients",
    does="300 half-open headers, 200 slow bodies and 100 streams that are never read, at once",
    passes="all closed within their limit + 2 s; p99 of normal traffic at most twice its baseline",
    run=run,
    full={"headers": 300, "bodies": 200, "readers": 100, "limit_s": 3.0, "noise_s": 0.1},
    quick={"headers": 40, "bodies": 30, "readers": 8, "limit_s": 1.0, "noise_s": 1.0},
)
