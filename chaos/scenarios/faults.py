"""Faults inside the engine: the request behind one fails, all others are answered."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable

from chaos.client import Client
from chaos.faulty_engine import FAULTS, POISON
from chaos.load import Load, Way, chat, job, result_of
from chaos.scenario import Ground, Report, Scenario
from chaos.scenarios.engine_kills import until_busy
from chaos.server import Server

_SERVE = (sys.executable, "-m", "chaos.faulty_server", "serve")
#: engines that a fault may cost, at least and at most; two are enough to find its prompt, but a
#: kill may also come from outside and says less
_COSTS = {"out of memory": (0, 0), "kill": (2, 5)}
_COST = (2, 2)
_LONG = {"gen_length": 64, "temperature": 0.0}

#: sends the poison; what is wrong with the answer, or None
Poisoner = Callable[[Client, list[int]], Awaitable[str | None]]


async def _poison_completion(client: Client, prompt: list[int]) -> str | None:
    """A whole answer."""
    body = {"prompt": prompt, "max_tokens": 64, "temperature": 0.0}
    answer = await client.post("/v1/completions", body)
    # the official client would send it again, were it not told not to
    again = answer.headers.get("x-should-retry") != "false"
    if prompt[1] == FAULTS.index("out of memory"):
        return (
            None if answer.status == 503 and answer.code == "out_of_memory" else _is(answer.status)
        )
    if answer.status != 500 or answer.code != "engine_died" or again:
        return f"{_is(answer.status)} {answer.code}, to be tried again: {again}"
    return None


async def _poison_stream(client: Client, prompt: list[int]) -> str | None:
    """A stream, which has not begun to give text."""
    body = {"prompt": prompt, "max_tokens": 64, "temperature": 0.0}
    events = await client.stream("/v1/completions", body)
    good = events.error in ("engine_died", "out_of_memory") and events.done and not events.began
    return None if good else f"the stream has error {events.error}, [DONE]: {events.done}"


async def _poison_job(client: Client, prompt: list[int]) -> str | None:
    """A job."""
    answer = await client.post("/v1/generate", {"prompt": prompt, **_LONG})
    result = await result_of(client, answer.json()["request_ids"][0])
    good = result["status"] == "failed" and result.get("error")
    return None if good else f"the job is {result}"


def _is(status: int) -> str:
    return f"the answer has status {status}"


_WAYS: tuple[Poisoner, ...] = (_poison_completion, _poison_stream, _poison_job)


async def run(
    ground: Ground, report: Report, *, faults: tuple[str, ...], clients: int, watchdog_s: float
) -> None:
    """One fault after the other, under load, each in another way to ask."""
    asks = ground.known.usual()
    longest = 0.0
    folder = ground.place("faults")
    options = ("--watchdog-timeout", str(watchdog_s))
    async with ground.server(folder, *options, program=_SERVE) as server:
        # whole answers and jobs only: streams that had begun may end with an error
        ways: dict[Way, int] = {job: 1, chat: 3}
        async with Load(server.port, asks, clients=clients, ways=ways, seed=8) as load:
            for number, fault in enumerate(faults):
                before = await server.metrics()
                poison = _WAYS[number % len(_WAYS)]
                wrong, unready, seconds = await _one(server, fault, poison)
                after = await server.metrics()
                restarts = int(after["engine_restarts_total"] - before["engine_restarts_total"])
                least, most = _COSTS.get(fault, _COST)
                report.expect(wrong is None, f"{fault}: {wrong}")
                report.expect(
                    least <= restarts <= most, f"{fault}: {restarts} new engines, not {most}"
                )
                report.expect(
                    unready == (most > 0), f"{fault}: /ready {'never ' * (not unready)}said 503"
                )
                longest = max(longest, seconds)
    report.expect_none("bystanders wrong or lost", load.tally.wrong)
    report.expect_none("left behind", await server.leftovers())
    report.measured |= {
        "faults": len(faults),
        "bystanders right": load.tally.counts["right"],
        "longest from poison to ready s": round(longest, 1),
    }


async def _one(server: Server, fault: str, poison: Poisoner) -> tuple[str | None, bool, float]:
    """Send one poisoned prompt.

    Returns:
        What is wrong with its answer, whether /ready said 503, and seconds until all was well.
    """
    await until_busy(server)
    began = time.monotonic()
    async with Client(server.port) as client:
        asking = asyncio.ensure_future(poison(client, [POISON, FAULTS.index(fault)]))
        unready = False
        while not asking.done() or not await server.is_ready(client):
            unready |= not await server.is_ready(client)
            server.engine()
            await asyncio.sleep(0.02)
        wrong = await asking
    return wrong, unready, time.monotonic() - began


FAULTS_INSIDE = Scenario(
    name="faults",
    does="exception, crash by a signal, exit, kill, hang, freeze, garbage on the socket, out of "
    "memory: caused by one prompt inside the engine, under load; watchdog 2 s",
    passes="that request fails and is not to be tried again; all others are right; two new "
    "engines (up to five for a kill); /ready 503 and back",
    run=run,
    full={"faults": FAULTS, "clients": 8, "watchdog_s": 2.0},
    # neither waits for the watchdog, which must not take a busy machine for a hang
    quick={"faults": ("out of memory", "segfault"), "clients": 4, "watchdog_s": 20.0},
)
