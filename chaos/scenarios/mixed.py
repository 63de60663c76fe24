"""Mixed load: every answer equals that of the same request run alone."""

from __future__ import annotations

import random

from chaos.load import Tally, chat, job, percentile, polled_job, stream, take_all
from chaos.scenario import Ground, Report, Scenario

#: share of each way to ask, in percent
_SHARES = {stream: 40, chat: 40, job: 14, polled_job: 6}


async def run(
    ground: Ground, report: Report, *, clients: int, requests: int, distinct: int, longest: int
) -> None:
    """Ask ``distinct`` requests in all ways, in random order, and compare every answer."""
    asks = ground.known.asks(distinct, (8, longest))
    rng = random.Random(1)
    ways = [way for way, share in _SHARES.items() for _ in range(share)]
    rng.shuffle(ways)
    turns = [(asks[i % distinct], ways[i % len(ways)]) for i in range(requests)]
    rng.shuffle(turns)
    tally = Tally()
    async with ground.server(ground.place("mixed")) as server:
        await take_all(server.port, turns, clients, tally)
        metrics = await server.metrics()
    ground.note_preempted(report, metrics, must=True)
    report.expect_none("wrong", tally.wrong)
    right = tally.counts["right"]
    report.expect(right == len(turns), f"{right} of {len(turns)} answers are right")
    refused = tally.counts["refused"]
    failures = metrics.get("request_failure_total", 0)
    report.expect(failures == 0, f"the server counts {failures} failed requests")
    report.measured |= {
        "requests": len(turns),
        "right": right,
        "503 and asked again": refused,
        "p50 s": round(percentile(tally.seconds, 0.5), 2),
        "p99 s": round(percentile(tally.seconds, 0.99), 2),
    }


MIXED = Scenario(
    name="mixed",
    does="64 clients, 3,000 requests: streams, submit and poll, whole answers; 15 settings",
    passes="every text, finish reason and token count equals the same request run alone",
    run=run,
    full={"clients": 64, "requests": 3000, "distinct": 60, "longest": 64},
    quick={"clients": 16, "requests": 120, "distinct": 15, "longest": 24},
)
