"""More than the server takes: it says so at once, stays healthy and does not grow."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from openai import APIStatusError, AsyncOpenAI

from chaos.answers import Ask
from chaos.client import Client
from chaos.load import Tally, percentile, take_all
from chaos.scenario import Ground, Report, Scenario
from chaos.server import Server
from chaos.watch import FAILED_S, watching

_OPTIONS = ("--max-requests", "64")
#: megabytes by which the API process may grow
GROWTH_MB = 50.0
#: share of a wave that the official client's own retries have to bring through
WAVE_SHARE = 0.95


async def run(
    ground: Ground, report: Report, *, clients: int, rounds: int, wave: int, health_s: float
) -> None:
    """All clients at once, without waiting after a 503; then a wave of the official client.

    /health has to answer within ``health_s`` seconds.
    """
    asks = ground.known.short()
    tally, rng = Tally(), random.Random(6)
    async with ground.server(ground.place("overload"), *_OPTIONS) as server:
        await take_all(server.port, [(rng.choice(asks), _once) for _ in range(128)], 64, Tally())
        before = server.process.memory_info().rss
        turns = [(rng.choice(asks), _once) for _ in range(clients * rounds)]
        async with watching(server.port) as health, _highest_rss(server) as highest:
            await take_all(server.port, turns, clients, tally)
        share, seconds = await _wave(server, asks, wave, rng)
    counts = tally.counts
    report.expect_none("neither 200 nor 503 with Retry-After, or wrong", tally.wrong)
    asked = counts["right"] + counts["refused"] + len(tally.wrong)
    report.expect(asked == len(turns), f"{asked} of {len(turns)} requests came to an end")
    report.expect(counts["refused"] > 0, "nothing was refused: this was no overload")
    slowest = max(health, default=FAILED_S)
    report.expect(slowest < health_s, f"/health took {slowest:.2f} s")
    grown = (highest[-1] - before) / 2**20
    report.expect(grown < GROWTH_MB, f"the API process grew by {grown:.0f} MB")
    report.expect(share >= WAVE_SHARE, f"{share:.1%} of the wave succeeded")
    report.measured |= {
        "requests": len(turns),
        "200": counts["right"],
        "503": counts["refused"],
        "/health, longest s": round(slowest, 3),
        "/health p99 s": round(percentile(health, 0.99), 3),
        "looks at /health": len(health),
        "RSS growth MB": round(grown, 1),
        "wave succeeded": f"{share:.1%}",
        "wave s": round(seconds, 1),
    }


async def _once(client: Client, ask: Ask, tally: Tally) -> None:
    """One request, not tried again."""
    answer = await client.post("/v1/chat/completions", ask.chat_body)
    if answer.status == 503 and answer.retry_after is not None and answer.retry_after >= 1:
        tally.counts["refused"] += 1
    elif answer.status != 200:
        tally.bad(f"{ask.name}: {answer.status} {answer.body[:100]!r}")
    elif answer.json()["choices"][0]["message"]["content"] != ask.choices[0].text:
        tally.bad(f"{ask.name}: a wrong text")
    else:
        tally.right(answer.seconds)


@asynccontextmanager
async def _highest_rss(server: Server) -> AsyncIterator[list[int]]:
    """Resident memory of the API process, measured all the while; the highest comes last."""
    process, found = server.process, [0]

    async def measure() -> None:
        while True:
            found.append(max(found[-1], process.memory_info().rss))
            await asyncio.sleep(0.05)

    task = asyncio.create_task(measure())
    try:
        yield found
    finally:
        task.cancel()


async def _wave(
    server: Server, asks: Sequence[Ask], count: int, rng: random.Random
) -> tuple[float, float]:
    """So many requests of the official client at once, with its own two retries."""
    began = time.monotonic()
    async with AsyncOpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", timeout=60
    ) as sdk:

        async def one(ask: Ask) -> bool:
            try:
                answer = await sdk.chat.completions.create(
                    model="model",
                    messages=[{"role": "user", "content": ask.content}],
                    max_tokens=ask.gen_length,
                    extra_body=dict(ask.fields),
                )
            except APIStatusError:
                return False
            return answer.choices[0].message.content == ask.choices[0].text

        good = await asyncio.gather(*[one(rng.choice(asks)) for _ in range(count)])
    return sum(good) / count, time.monotonic() - began


OVERLOAD = Scenario(
    name="overload",
    does="400 clients at once, room for 64, nobody waits after a 503; 200 requests at once of "
    "the official client",
    passes="200 or 503 with Retry-After only, /health under 1 s, the API process grows by less "
    "than 50 MB; with the client's own retries 95 % of the wave succeed",
    run=run,
    full={"clients": 400, "rounds": 20, "wave": 200, "health_s": 1.0},
    quick={"clients": 100, "rounds": 3, "wave": 70, "health_s": 5.0},
)
