"""What a flood of one API key costs another: its waiting and its time to answer.

    python -m benchmarks.fair_keys

One server, two keys. Bob asks modestly: each of a few clients sends its next request when it has
its answer. Alice asks as modestly as bob in one round ("modest"); in others she sends from
hundreds of clients ("flood"), whole batches of jobs ("jobs"), or the same with answers that are
many times as long as bob's ("long"). Whoever is refused waits as Retry-After says, alice at most
half a second. Bob's refusals are part of his time to answer. The clients run on the same machine,
so what they cost is the server's loss, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

from benchmarks.served import served
from dllmserve.tools.bench.serve.http import HttpClient, Reply

KEYS = {name: secrets.token_urlsafe(24) for name in ("alice", "bob")}
#: seconds that alice waits at most when she is refused
IMPATIENCE_S = 0.5


@contextmanager
def server(options: list[str]) -> Iterator[int]:
    """A server with two keys; gives its port once it is ready."""
    fixed = ["--log-level", "error", "--job-store", "memory", "--shutdown-timeout", "0"]
    keys = ",".join(f"{name}={secret}" for name, secret in KEYS.items())
    with served([*fixed, *options], {"DLLMSERVE_API_KEYS": keys}) as port:
        yield port


@dataclass
class Tally:
    """What one key got.

    Attributes:
        answers: finished requests; prompts of accepted batches.
        refused: answers with 429 or 503.
        queue, total: seconds in the queue, and from the first try to the answer.
    """

    answers: int = 0
    refused: int = 0
    queue: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add another round."""
        self.answers += other.answers
        self.refused += other.refused
        self.queue += other.queue
        self.total += other.total


class Key:
    """The clients of one key."""

    def __init__(self, port: int, name: str) -> None:
        headers = {"Authorization": f"Bearer {KEYS[name]}"}
        self._client = HttpClient(f"http://127.0.0.1:{port}", headers)
        self._patience = IMPATIENCE_S if name == "alice" else 30.0
        self.tally = Tally()

    async def ask(self, path: str, fields: dict[str, object]) -> dict[str, object]:
        """Send a request until it is taken."""
        body = json.dumps(fields).encode()
        while True:
            reply = Reply()
            await self._client.exchange("POST", path, body, reply)
            if reply.status == 200:
                return dict(json.loads(bytes(reply.body)))
            if reply.status not in (429, 503):
                raise RuntimeError(f"{reply.status}: {bytes(reply.body[:300])!r}")
            self.tally.refused += 1
            await asyncio.sleep(min(self._patience, float(reply.headers.get("retry-after") or 1)))

    async def completions(self, length: int, pause: float = 0.0) -> None:
        """Ask for one completion after the other, with a pause in between."""
        while True:
            await asyncio.sleep(random.uniform(0.0, 2 * pause))
            began = time.perf_counter()
            answer = await self.ask("/v1/completions", body_of(length, prompt="The president"))
            usage = answer["usage"]
            assert isinstance(usage, dict)
            self.tally.answers += 1
            self.tally.queue.append(float(usage["queue_time"]))
            self.tally.total.append(time.perf_counter() - began)

    async def batches(self, length: int, size: int) -> None:
        """Submit one batch of jobs after the other, and fetch nothing."""
        while True:
            await self.ask("/v1/generate_batch", body_of(length, prompts=["The people"] * size))
            self.tally.answers += size

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


def body_of(length: int, **more: object) -> dict[str, object]:
    """A request that takes one forward pass a token."""
    fixed = {"temperature": 0.0, "ignore_eos": True, "cache": "dual", "block_length": 16}
    return {**fixed, "gen_length": length, "steps": length, **more}


@asynccontextmanager
async def busy(*clients: object) -> AsyncIterator[None]:
    """Run clients meanwhile."""
    tasks = [asyncio.create_task(client) for client in clients]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


async def measure(port: int, kind: str, args: argparse.Namespace) -> dict[str, Tally]:
    """Both keys at once: what each got in the measured time."""
    alice, bob = Key(port, "alice"), Key(port, "bob")
    long = args.answer * (args.times if kind == "long" else 1)
    if kind == "modest":
        load = [alice.completions(args.answer, args.pause) for _ in range(args.clients)]
    elif kind == "flood":
        load = [alice.completions(args.answer) for _ in range(args.flood)]
    else:
        load = [alice.batches(long, args.batch) for _ in range(8)]
    async with busy(*load):
        await asyncio.sleep(args.settle)
        alice.tally = Tally()
        async with busy(*(bob.completions(args.answer, args.pause) for _ in range(args.clients))):
            await asyncio.sleep(args.seconds)
    await alice.close()
    await bob.close()
    return {"alice": alice.tally, "bob": bob.tally}


def cell(name: str, seconds: list[float], base: list[float]) -> str:
    """Mean, 90th percentile, and the mean over that of a modest alice."""
    if len(seconds) < 2:
        return f"{name} never"
    mean, worst = statistics.mean(seconds), statistics.quantiles(seconds, n=10)[-1]
    return f"{name} {mean:6.3f} (p90 {worst:6.3f}) x{mean / statistics.mean(base):5.2f}"


def main() -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=4, help="of bob, and of a modest alice")
    parser.add_argument("--flood", type=int, default=300, help="clients of alice in a flood")
    parser.add_argument("--batch", type=int, default=128, help="prompts of a batch of alice")
    parser.add_argument("--answer", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--times", type=int, default=8, help="alice's long answers over bob's")
    parser.add_argument("--pause", type=float, default=0.0, help="mean seconds between requests")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--settle", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kinds", default="modest,flood,jobs,long")
    args, options = parser.parse_known_args()

    print(f"bob: {args.clients} clients; seconds, and times those of a modest alice", flush=True)
    base: Tally | None = None
    for kind in args.kinds.split(","):
        bob, alice = Tally(), Tally()
        for _ in range(args.rounds):
            with server(options) as port:
                found = asyncio.run(measure(port, kind, args))
            bob.add(found["bob"])
            alice.add(found["alice"])
        base = base or bob
        cells = [cell("queue", bob.queue, base.queue), cell("total", bob.total, base.total)]
        print(
            f"{kind:>7}: {'  '.join(cells)}  bob {bob.answers} answers, {bob.refused} refusals; "
            f"alice {alice.answers}, {alice.refused}",
            flush=True,
        )


if __name__ == "__main__":
    main()
