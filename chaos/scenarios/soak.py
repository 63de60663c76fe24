"""A longer while under load: memory, descriptors and threads do not grow."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass

import psutil

from chaos.load import Load
from chaos.scenario import Ground, Report, Scenario

#: megabytes a minute by which a process may grow, after the first third
SLOPE_MB = 1.0
_EVERY_S = 1.0


@dataclass
class Sample:
    """One look at a process."""

    at: float
    rss: int
    files: int
    threads: int


async def run(ground: Ground, report: Report, *, seconds: float, clients: int) -> None:
    """Load, and look at both processes every second."""
    asks = ground.known.asks(30, (8, 64), seed=10)
    # as in a server that has run for long: results are dropped while others come, and every page
    # of the K,V store has been used, as the system only counts those that have
    options = ("--result-ttl", "5", "--kv-pages", "256")
    async with ground.server(ground.place("soak"), *options) as server:
        engine = server.engine()
        if engine is None:
            raise AssertionError("there is no engine")
        watched = {"API": server.process, "engine": engine}
        samples: dict[str, list[Sample]] = {name: [] for name in watched}
        async with Load(server.port, asks, clients=clients, seed=10) as load:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                await asyncio.sleep(_EVERY_S)
                for name, process in watched.items():
                    samples[name].append(_look(process))
    report.expect_none("wrong", load.tally.wrong)
    for name, found in samples.items():
        _judge(report, name, found[len(found) // 3 :])
    report.measured["right"] = load.tally.counts["right"]


def _look(process: psutil.Process) -> Sample:
    with process.oneshot():
        rss = process.memory_info().rss
        return Sample(time.monotonic(), rss, process.num_fds(), process.num_threads())


def _judge(report: Report, name: str, samples: list[Sample]) -> None:
    """Growth from the first half of the samples to the second."""
    half = len(samples) // 2
    # what the allocator gives back now and then is no trend, so medians are compared
    grown = _grown([s.rss for s in samples]) / 2**20
    per_minute = 60 * grown / (samples[half].at - samples[0].at)
    report.expect(per_minute < SLOPE_MB, f"{name}: memory grows {per_minute:.1f} MB a minute")
    files = [s.files for s in samples]
    threads = [s.threads for s in samples]
    for what, values in (("descriptors", files), ("threads", threads)):
        more = _grown(values)
        report.expect(more <= 2, f"{name}: {more:g} more {what}")
    report.measured |= {
        f"{name} MB": round(samples[-1].rss / 2**20),
        f"{name} MB a minute": round(per_minute, 2),
        f"{name} descriptors": max(files),
        f"{name} threads": max(threads),
    }


def _grown(values: list[int]) -> float:
    """By how much the median of the second half is higher than that of the first."""
    half = len(values) // 2
    return statistics.median(values[half:]) - statistics.median(values[:half])


SOAK = Scenario(
    name="soak",
    does="16 clients, all ways and settings, 180 s",
    passes="after a minute memory grows less than 1 MB a minute, descriptors and threads stay",
    run=run,
    full={"seconds": 180.0, "clients": 16},
)
