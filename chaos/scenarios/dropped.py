"""Clients that leave: what they asked for is dropped, and everything it held is free again."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence

from chaos.answers import Ask
from chaos.client import Client, Events, LostAnswer
from chaos.load import Tally, chat
from chaos.scenario import Ground, Report, Scenario
from chaos.server import Server

_CLIENTS = 32
_LONGEST_S = 0.8


async def run(ground: Ground, report: Report, *, streams: int, whole: int, free_s: float) -> None:
    """Drop requests at random moments; some come to their end before.

    Nothing of them may be left after ``free_s`` seconds.
    """
    asks = ground.known.usual()
    rng = random.Random(4)
    kinds = ["stream"] * streams + ["whole"] * whole
    rng.shuffle(kinds)
    seen: Counter[str] = Counter()
    async with ground.server(ground.place("dropped")) as server:
        left = iter(kinds)

        async def go_on() -> None:
            for kind in left:
                await _drop(server, rng.choice(asks), kind, rng, seen)

        await asyncio.gather(*[go_on() for _ in range(_CLIENTS)])
        seconds, metrics = await _until_free(server, 5 * free_s)
        _compare(report, seen, metrics)
        report.expect(seconds <= free_s, f"requests were there {seconds:.1f} s after the last drop")
        await _still_right(server, asks, report)
    report.measured["free after s"] = round(seconds, 2)


async def _drop(
    server: Server, ask: Ask, kind: str, rng: random.Random, seen: Counter[str]
) -> None:
    """Ask on a connection of one's own, and close it at a random moment."""
    # half of the streams are dropped some time after their first text
    after_text = kind == "stream" and rng.random() < 0.5
    events = Events()
    async with Client(server.port) as client:
        if kind == "stream":
            asking = client.stream("/v1/chat/completions", ask.chat_body, events)
        else:
            asking = client.post("/v1/chat/completions", ask.chat_body)  # type: ignore[assignment]
        task = asyncio.ensure_future(asking)
        if after_text:
            text = asyncio.ensure_future(events.first_text.wait())
            await asyncio.wait((task, text), return_when=asyncio.FIRST_COMPLETED)
            text.cancel()
            await asyncio.wait((task,), timeout=rng.uniform(0, 0.2))
        else:
            await asyncio.wait((task,), timeout=rng.uniform(0, _LONGEST_S))
        ended = task.done()
        task.cancel()
        status = 200
        try:
            found = await task
            status = found.status
        except asyncio.CancelledError:
            ended = False
        except LostAnswer:
            seen["lost"] += 1
    seen["not 200"] += status != 200
    seen["ended" if ended else "dropped"] += 1
    seen["surely accepted"] += ended or events.began
    seen["dropped after text"] += not ended and events.began


async def _until_free(server: Server, most_s: float) -> tuple[float, dict[str, float]]:
    """Wait until nothing runs or waits; the seconds it took, and the metrics then."""
    began = time.monotonic()
    while True:
        metrics = await server.metrics()
        busy = metrics["num_requests_running"] + metrics["num_requests_waiting"]
        pages = metrics["kv_cache_usage_perc"]
        seconds = time.monotonic() - began
        if (not busy and not pages) or seconds > most_s:
            return seconds, metrics
        await asyncio.sleep(0.02)


def _compare(report: Report, seen: Counter[str], metrics: dict[str, float]) -> None:
    """The server's counts against what the clients did."""
    accepted = int(metrics["request_params_max_tokens_count"])
    aborted = int(metrics.get("requests_aborted_total", 0))
    finished = int(metrics.get("request_success_total", 0))
    failed = int(metrics.get("request_failure_total", 0))
    for what in ("lost", "not 200"):
        report.expect(not seen[what], f"{seen[what]} answers that were waited for: {what}")
    report.expect(
        accepted == aborted + finished + failed,
        f"{accepted} accepted, but {aborted} aborted + {finished} finished + {failed} failed",
    )
    report.expect(not failed, f"{failed} requests failed")
    report.expect(
        seen["surely accepted"] <= accepted <= seen["ended"] + seen["dropped"],
        f"{accepted} accepted, of {seen['ended'] + seen['dropped']} asked",
    )
    # a request may end in the server while its client is leaving, so not all drops are aborts
    finished_unseen = finished - seen["ended"]
    report.expect(
        0 <= finished_unseen and aborted + finished_unseen <= seen["dropped"],
        f"{seen['dropped']} dropped and {seen['ended']} ended, but {aborted} aborted and "
        f"{finished} finished",
    )
    report.expect(
        aborted >= 0.5 * seen["dropped after text"],
        f"{seen['dropped after text']} streams were dropped after text, {aborted} aborted",
    )
    for name in ("outstanding_work", "kv_cache_usage_perc"):
        report.expect(metrics[name] == 0, f"{name} is {metrics[name]} afterwards")
    report.measured |= {
        "dropped": seen["dropped"],
        "ended before": seen["ended"],
        "dropped before accepted": seen["dropped"] + seen["ended"] - accepted,
        "aborted": aborted,
        "finished while dropped": finished_unseen,
    }


async def _still_right(server: Server, asks: Sequence[Ask], report: Report) -> None:
    """Whoever comes next gets right answers."""
    tally = Tally()
    async with Client(server.port) as client:
        for ask in asks:
            await chat(client, ask, tally)
    report.expect_none("wrong afterwards", tally.wrong)


DROPPED = Scenario(
    name="dropped",
    does="500 streams and 200 whole answers whose clients leave at random moments",
    passes="2 s later nothing runs, waits or holds pages; accepted = finished + aborted exactly",
    run=run,
    full={"streams": 500, "whole": 200, "free_s": 2.0},
    quick={"streams": 60, "whole": 24, "free_s": 8.0},
)
