"""kill -9 of the engine under load: accepted work is answered, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time

from chaos.client import Client
from chaos.load import Load, Way, chat, job, stream
from chaos.scenario import Ground, Report, Scenario
from chaos.server import Server, shared_memory

#: seconds within which a new engine has to be ready
READY_S = 15.0
#: seconds that an engine works at least before it is killed
_SHORTEST_S = 0.3


async def run(
    ground: Ground,
    report: Report,
    *,
    kills: int,
    clients: int,
    longest_s: float,
    ranks: int = 1,
) -> None:
    """Kill engines one after the other while clients ask in all ways.

    Each gets a random time to work, up to ``longest_s`` seconds. Of several ranks, any may be
    the one.
    """
    asks = ground.known.usual()
    rng = random.Random(2)
    before = shared_memory()
    ready: list[float] = []
    unready = 0
    shared = ("--tensor-parallel-size", str(ranks)) if ranks > 1 else ()
    place = ground.place(f"kills-{ranks}")
    async with ground.server(place, *shared) as server:
        ways: dict[Way, int] = {job: 1, chat: 1, stream: 1}
        async with Load(server.port, asks, clients=clients, ways=ways, seed=2) as load:
            for number in range(kills):
                wait_s, victim = rng.uniform(_SHORTEST_S, longest_s), rng.randrange(ranks)
                if not number:
                    victim = ranks - 1  # also where there is but one kill
                seconds, seen_unready = await _kill(server, wait_s, victim)
                ready.append(seconds)
                unready += seen_unready
        metrics = await server.metrics()
    ground.note_preempted(report, metrics)
    tally = load.tally
    report.expect_none("wrong, lost or hung", tally.wrong)
    early = tally.counts["cut early"]
    report.expect(not early, f"{early} streams were cut before any of their text had come")
    report.expect(max(ready) <= READY_S, f"ready again after {max(ready):.1f} s")
    report.expect(unready == kills, f"/ready said 503 after {unready} of {kills} kills only")
    restarts = int(metrics["engine_restarts_total"])
    report.expect(restarts == kills, f"{restarts} restarts after {kills} kills")
    report.expect_none("left behind", await server.leftovers())
    new = shared_memory() - before
    report.expect(not new, f"left in /dev/shm: {sorted(new)}")
    report.measured |= {
        "kills": kills,
        "right": tally.counts["right"],
        "streams cut with an error": tally.counts["cut"],
        "hung": tally.counts["hung"],
        "ready again, longest s": round(max(ready), 1),
    }


async def _kill(server: Server, wait_s: float, victim: int) -> tuple[float, bool]:
    """Kill the engine, or one rank of it, in the middle of its work.

    Returns:
        The seconds until the next engine was ready, and whether /ready said 503 in between.
    """
    await until_busy(server)
    await asyncio.sleep(wait_s)
    ranks = server.ranks()
    if len(ranks) <= victim:
        raise AssertionError(f"the engine has {len(ranks)} processes")
    os.kill(ranks[victim].pid, signal.SIGKILL)
    began = time.monotonic()
    unready = False
    async with Client(server.port) as client:
        while time.monotonic() - began < 2 * READY_S:
            if not await server.is_ready(client):
                unready = True
            elif unready:
                break
            await asyncio.sleep(0.01)
    server.engine()
    return time.monotonic() - began, unready


async def until_busy(server: Server) -> None:
    """Wait until requests take part in forward passes."""
    with contextlib.suppress(KeyError):
        while (await server.metrics())["num_requests_running"] < 1:
            await asyncio.sleep(0.02)


ENGINE_KILLS = Scenario(
    name="engine-kills",
    does="20 kill -9 of the engine process, 16 clients: jobs, whole answers and streams",
    passes="no accepted request lost or wrong, no client hangs, begun streams end with an error "
    "event and [DONE], ready again within 15 s, nothing left behind",
    run=run,
    full={"kills": 20, "clients": 16, "longest_s": 2.5},
    quick={"kills": 1, "clients": 8, "longest_s": 0.6},
)

RANK_KILLS = Scenario(
    name="rank-kills",
    does="20 kill -9 of a random rank of an engine with --tensor-parallel-size 2, 16 clients",
    passes="as for engine-kills: one rank takes the others with it, and all come back",
    run=run,
    full={"kills": 20, "clients": 16, "longest_s": 2.5, "ranks": 2},
    quick={"kills": 1, "clients": 8, "longest_s": 0.6, "ranks": 2},
)
