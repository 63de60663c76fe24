"""Too few file descriptors: whoever waits is served when others have left."""

from __future__ import annotations

import asyncio
import os
import signal
import time

from chaos.client import Client
from chaos.load import Tally, chat, percentile, take_all
from chaos.raw import half_header
from chaos.scenario import Ground, Report, Scenario
from chaos.server import Server

_OPTIONS = ("--header-timeout", "1", "--keep-alive-timeout", "1")
_BACK_S = 15.0


async def run(
    ground: Ground, report: Report, *, open_files: int, clients: int, requests: int, kill: bool
) -> None:
    """More clients than descriptors: idle ones, then working ones, then (kill) a dead engine."""
    asks = ground.known.short()
    folder = ground.place("descriptors")
    async with ground.server(folder, *_OPTIONS, open_files=open_files) as server:
        # connections that do nothing take all descriptors; the server has to close them
        await asyncio.gather(*[half_header(server.port, 30) for _ in range(clients)])
        idle = await _until_answered(server)
        tally = Tally()
        turns = [(asks[i % len(asks)], chat) for i in range(requests)]
        await take_all(server.port, turns, clients, tally)
        working = await _until_answered(server)
        if kill:
            await _kill_engine(server, clients)
        restarted = await _until_answered(server)
        after = Tally()
        async with Client(server.port) as client:
            for ask in asks:
                await chat(client, ask, after)
        files = server.process.num_fds()
        restarts = int((await server.metrics())["engine_restarts_total"])
    report.expect(restarts == kill, f"{restarts} new engines, {int(kill)} died")
    for what, seconds in {"idle": idle, "working": working, "engine": restarted}.items():
        report.expect(seconds < _BACK_S, f"{what}: no answer for {seconds:.1f} s")
    lost = [text for text in tally.wrong if "connection" not in text and "503" not in text]
    report.expect_none("wrong", lost + after.wrong)
    report.expect(tally.counts["right"] > 0, "nobody was answered")
    report.expect_none("left behind", await server.leftovers())
    report.measured |= {
        "clients": clients,
        "descriptors": open_files,
        "right": tally.counts["right"],
        "refused": len(tally.wrong) - len(lost),
        "p99 s": round(percentile(tally.seconds, 0.99), 2),
        "answers again after s": round(max(idle, working), 1),
        "with a new engine after s": round(restarted, 1),
        "descriptors at the end": files,
    }


async def _kill_engine(server: Server, clients: int) -> None:
    """Let the engine die while there is little left to start another one with."""
    holding = [asyncio.ensure_future(half_header(server.port, 30)) for _ in range(clients)]
    await asyncio.sleep(0.5)
    engine = server.engine()
    if engine is None:
        raise AssertionError("the server has no engine")
    os.kill(engine.pid, signal.SIGKILL)
    await asyncio.gather(*holding)


async def _until_answered(server: Server) -> float:
    """Seconds until /ready says 200 on a new connection."""
    began = time.monotonic()
    while time.monotonic() - began < 2 * _BACK_S:
        async with Client(server.port) as client:
            try:
                if await asyncio.wait_for(server.is_ready(client), 5):
                    break
            except TimeoutError:
                continue
        await asyncio.sleep(0.05)
    return time.monotonic() - began


DESCRIPTORS = Scenario(
    name="descriptors",
    does="200 clients at a server that may open 64 files: idle, working, and with a dead engine",
    passes="it goes on as soon as descriptors are free; no wrong answers; a new engine starts",
    run=run,
    full={"open_files": 64, "clients": 200, "requests": 600, "kill": True},
    quick={"open_files": 64, "clients": 80, "requests": 80, "kill": False},
)
