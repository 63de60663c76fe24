"""kill -9 of the server: its engine dies with it, and the next server finishes the jobs."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Sequence

from chaos.answers import Ask
from chaos.client import Client, LostAnswer
from chaos.load import result_of
from chaos.scenario import Ground, Report, Scenario
from chaos.server import Server

_SUBMITTERS = 4

#: acknowledged jobs: id -> what was asked
Accepted = dict[int, Ask]


async def run(ground: Ground, report: Report, *, rounds: int, jobs: int) -> None:
    """Submit jobs, kill the server in the middle of them, start another one, ask for all."""
    asks = ground.known.usual()
    folder = ground.place("server-kill")
    rng = random.Random(3)
    accepted: Accepted = {}
    finished_before: dict[int, str] = {}
    wrong: list[str] = []
    orphans: list[str] = []
    unfinished = 0
    for _ in range(rounds):
        async with ground.server(folder) as server:
            found = await _all_results(server, accepted, finished_before)
            wrong += found
            new = await _submit_until_killed(server, asks, jobs, rng, finished_before)
            report.expect(not new.keys() & accepted.keys(), "a job id was given twice")
            accepted |= new
            unfinished += len(new.keys() - finished_before.keys())
            orphans += await server.leftovers()
    async with ground.server(folder) as server:
        wrong += await _all_results(server, accepted, finished_before)
        orphans += await server.leftovers() if await server.end() else []
    report.expect_none("lost or wrong jobs", wrong)
    report.expect_none("left behind", orphans)
    report.expect(unfinished >= rounds, f"only {unfinished} jobs were unfinished at the kills")
    report.measured |= {
        "kills": rounds,
        "jobs": len(accepted),
        "unfinished when killed": unfinished,
        "read before a kill": len(finished_before),
    }


async def _submit_until_killed(
    server: Server, asks: Sequence[Ask], jobs: int, rng: random.Random, read: dict[int, str]
) -> Accepted:
    """Submit a half, read some results, submit the rest from several clients and kill.

    Returns:
        Those that were acknowledged. Results that were read in between go into ``read``.
    """
    accepted: Accepted = {}

    async def submit() -> None:
        async with Client(server.port) as client:
            while True:
                ask = rng.choice(asks)
                try:
                    answer = await client.post("/v1/generate", ask.native_body())
                except LostAnswer:
                    return  # killed
                accepted[answer.json()["request_ids"][0]] = ask

    async with Client(server.port) as client:
        for _ in range(jobs // 2):
            ask = rng.choice(asks)
            answer = await client.post("/v1/generate", ask.native_body())
            accepted[answer.json()["request_ids"][0]] = ask
        for id in list(accepted)[: jobs // 5]:
            read[id] = (await result_of(client, id))["text"]
    tasks = [asyncio.create_task(submit()) for _ in range(_SUBMITTERS)]
    while len(accepted) < jobs and not all(task.done() for task in tasks):
        await asyncio.sleep(0.002)
    server.engine()
    os.kill(server.pid, signal.SIGKILL)
    await asyncio.gather(*tasks)
    await server.ended(5.0)
    return accepted


async def _all_results(server: Server, accepted: Accepted, read: dict[int, str]) -> list[str]:
    """Ask for every job; what is wrong, in words."""
    wrong = []
    async with Client(server.port) as client:
        for id, ask in accepted.items():
            result = await result_of(client, id, "?wait=20")
            text = result.get("text")
            if result["status"] != "finished" or text != ask.choices[0].text:
                wrong.append(f"job {id}, {ask.name}: {result}"[:300])
            elif id in read and text != read[id]:
                wrong.append(f"job {id} was {read[id]!r} and is {text!r}"[:300])
    return wrong


SERVER_KILL = Scenario(
    name="server-kill",
    does="kill -9 of the server while clients submit jobs, then another server on its job store",
    passes="its engine dies with it; every acknowledged job is finished and right, read results "
    "are still there, no id is given twice",
    run=run,
    full={"rounds": 4, "jobs": 100},
    quick={"rounds": 1, "jobs": 30},
)
