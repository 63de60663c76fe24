"""Signals to stop: what is under way is finished, or ended, and nothing stays behind."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from chaos.answers import Ask
from chaos.client import Client, Hung, LostAnswer
from chaos.load import Tally, judge_stream, result_of
from chaos.scenario import Ground, Report, Scenario
from chaos.server import Server

#: seconds that the end may take beyond its limit
SLACK_S = 5.0
_CLIENTS = 12
_SETTINGS = ("greedy", "drawn", "dual cache")


@dataclass(frozen=True)
class Way:
    """How a server is stopped.

    Attributes:
        name: for people.
        timeout_s: its --shutdown-timeout.
        number: the signal.
        twice: the signal is sent again at once.
        finishes: whether what is under way comes to its end.
    """

    name: str
    timeout_s: float
    number: signal.Signals = signal.SIGTERM
    twice: bool = False
    finishes: bool = True


DRAIN = Way("SIGTERM", 30)
ABORT = Way("SIGTERM, no time", 0, finishes=False)
TWICE = Way("SIGTERM twice", 30, twice=True, finishes=False)
INTERRUPT = Way("SIGINT", 30, signal.SIGINT)


async def run(
    ground: Ground, report: Report, *, drains: int, aborts: int, twice: int, interrupts: int
) -> None:
    """Start a server on the job store of the one before, load it, stop it; again and again."""
    asks = ground.known.asks(6, (90, 110), settings=_SETTINGS, seed=7)
    ways = [*[DRAIN] * drains, *[ABORT] * aborts, *[TWICE] * twice, *[INTERRUPT] * interrupts]
    stops = _Stops(ground, asks, report)
    for number, way in enumerate(ways):
        before = len(report.wrong)
        await stops.one(way, random.Random(number))
        report.wrong[before:] = [f"{way.name}: {text}" for text in report.wrong[before:]]
    if stops.pending:
        async with stops.server(DRAIN) as server:
            await stops.settle(server)
    report.measured |= {"stops": len(ways), **stops.seen}
    report.measured |= {f"{name}, longest s": round(s, 1) for name, s in stops.longest.items()}


class _Stops:
    """Servers that follow each other on one job store.

    Attributes:
        seen: what became of requests.
        longest: seconds of the longest end, by way.
        pending: jobs that were acknowledged and whose results have not been read.
    """

    def __init__(self, ground: Ground, asks: Sequence[Ask], report: Report) -> None:
        self.seen: Counter[str] = Counter()
        self.longest: dict[str, float] = {}
        self.pending: dict[int, Ask] = {}
        self._ground, self._folder = ground, ground.place("sigterm")
        self._asks, self._report = asks, report

    def server(self, way: Way) -> Server:
        """The next server."""
        return self._ground.server(self._folder, "--shutdown-timeout", str(way.timeout_s))

    async def settle(self, server: Server) -> None:
        """Read the results that the server before owes."""
        async with Client(server.port) as client:
            for id, ask in self.pending.items():
                result = await result_of(client, id)
                good = result.get("text") == ask.choices[0].text
                self._report.expect(good, f"job {id} of the server before: {result}"[:300])
        self.seen["jobs finished by the next server"] += len(self.pending)
        self.pending.clear()

    async def one(self, way: Way, rng: random.Random) -> None:
        """One server's life and end."""
        async with self.server(way) as server:
            await self.settle(server)
            tally = Tally()
            asking = asyncio.ensure_future(self._ask_all(server, tally))
            await self._until_accepted(server)
            await asyncio.sleep(rng.uniform(0, 0.3))
            server.engine()
            began = time.monotonic()
            server.signal(way.number)
            looking = asyncio.create_task(self._look(server))
            if way.twice:
                await asyncio.sleep(0.1)
                server.signal(way.number)
            code = await server.ended(way.timeout_s + SLACK_S)
            seconds = time.monotonic() - began
            await asking
            unready = await looking
        self._report.expect(code == 0, f"exit code {code} after {seconds:.1f} s")
        self._report.wrong += await server.leftovers()
        self.longest[way.name] = max(self.longest.get(way.name, 0.0), seconds)
        self._judge(way, tally, unready)

    def _judge(self, way: Way, tally: Tally, unready: int) -> None:
        counts = tally.counts
        errors = counts["cut"] + counts["cut early"] + counts["5xx"]
        self._report.wrong += tally.wrong[:3]
        if way.finishes:
            self._report.expect(not errors, f"{errors} requests were not finished")
            self._report.expect(unready > 0, "/ready never said 503 while it drained")
        self.seen["finished"] += counts["right"]
        self.seen["ended with an error"] += errors
        self.seen["jobs read before the end"] += counts["job"]

    async def _ask_all(self, server: Server, tally: Tally) -> None:
        """One request for each client: streams, whole answers and jobs."""

        async def one(number: int) -> None:
            ask, way = self._asks[number % len(self._asks)], _KINDS[number % len(_KINDS)]
            async with Client(server.port) as client:
                try:
                    await way(self, client, ask, tally)
                except (LostAnswer, Hung) as error:
                    tally.bad(f"{way.__name__}, {ask.name}: {error}")

        await asyncio.gather(*[one(i) for i in range(_CLIENTS)])

    async def _stream(self, client: Client, ask: Ask, tally: Tally) -> None:
        events = await client.stream("/v1/chat/completions", ask.chat_body)
        judge_stream(ask, events, tally, 0.0)

    async def _whole(self, client: Client, ask: Ask, tally: Tally) -> None:
        answer = await client.post("/v1/chat/completions", ask.chat_body)
        if answer.status == 503 and answer.code is not None:
            tally.counts["5xx"] += 1
        elif answer.status != 200:
            tally.bad(f"{answer.status} {answer.body[:100]!r}")
        elif answer.json()["choices"][0]["message"]["content"] != ask.choices[0].text:
            tally.bad(f"whole, {ask.name}: a wrong text")
        else:
            tally.right(answer.seconds)

    async def _job(self, client: Client, ask: Ask, tally: Tally) -> None:
        answer = await client.post("/v1/generate", ask.native_body())
        (id,) = answer.json()["request_ids"]
        try:
            answer = await client.get(f"/v1/result/{id}?wait=40")
        except LostAnswer:
            tally.counts["job polls cut"] += 1
            self.pending[id] = ask
            return
        if answer.status == 200 and answer.json()["status"] == "finished":
            tally.counts["job"] += 1
            if answer.json()["text"] != ask.choices[0].text:
                tally.bad(f"job {id}: a wrong text")
        else:
            self.pending[id] = ask

    async def _until_accepted(self, server: Server) -> None:
        """Wait until all requests are under way."""
        while (metrics := await server.metrics())["num_requests_running"] < _CLIENTS:
            if metrics.get("request_success_total", 0) > 0:
                return
            await asyncio.sleep(0.01)

    async def _look(self, server: Server) -> int:
        """Look at /ready and ask for more until the port is closed; how often it said 503."""
        unready = 0
        while server.running:
            async with Client(server.port) as client:
                try:
                    ready = await client.get("/ready")
                    unready += ready.status == 503
                    if unready:
                        self._report.expect(ready.status == 503, "/ready said 200 again")
                        more = await client.post("/v1/chat/completions", self._asks[0].chat_body)
                        refused = more.status == 503 and more.retry_after is not None
                        self._report.expect(refused, f"a new request got {more.status}")
                except LostAnswer:
                    self.seen["refused connections"] += 1
            await asyncio.sleep(0.05)
        return unready


_KINDS = (_Stops._stream, _Stops._whole, _Stops._job)

SIGTERM = Scenario(
    name="sigterm",
    does="SIGTERM under load 15 times, with no time to drain 3 times, twice in a row 2 times, "
    "SIGINT once; each server goes on with the jobs of the one before",
    passes="exit code 0; drained requests are finished, others end with an error; /ready 503 and "
    "new requests refused meanwhile; nothing left; over within the limit + 5 s; no job lost",
    run=run,
    full={"drains": 15, "aborts": 3, "twice": 2, "interrupts": 1},
    quick={"drains": 1, "aborts": 0, "twice": 0, "interrupts": 0},
)
