"""Many clients that do as they like, and an engine that fails now and then: the sums add up."""

import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dllmserve.errors import EngineDiedError, OutOfMemoryError
from dllmserve.process.calls import Call
from tests.server.stand_in import Server, echo_ids, run, serving, until

PATHS = ("/v1/completions", "/v1/generate", "/v1/generate/stream")


class Moody:
    """Plays calls after a while, fails some, and leaves some to their fate."""

    def __init__(self, server: Server, seed: int) -> None:
        self.engine, self.random = server.engine, random.Random(seed)
        self.engine.hold = True
        self.seen = 0

    async def live(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0.001)
            for call in self.engine.calls[self.seen :]:
                loop.call_later(self.random.random() * 0.03, self.act, call)
            self.seen = len(self.engine.calls)

    def act(self, call: Call) -> None:
        chance = self.random.random()
        if call.ended or chance < 0.1:
            return
        if chance < 0.2:
            call.start()
            call.end(EngineDiedError("no") if chance < 0.15 else OutOfMemoryError("no"))
        else:
            self.engine.play(call)


async def client(server: Server, dice: random.Random, told: Counter[str]) -> None:
    prompt = "".join(dice.choices("abcdef", k=dice.randint(1, 8)))
    length = dice.randint(1, 12)
    path, given = dice.choice(PATHS), {"prompt": prompt, "gen_length": length}
    if dice.random() < 0.2:
        given["timeout"] = 0.02
    if path == "/v1/completions":
        given |= {"stream": dice.random() < 0.5, "n": dice.choice([1, 1, 3])}
    asked = server.begin("POST", path, given)
    if dice.random() < 0.3:
        await asyncio.sleep(dice.random() * 0.03)
        await asked.left()
        return
    answer = await asked.reply()
    told[str(answer.status)] += 1
    if answer.status != 200:
        assert answer.status in (500, 503, 504) and answer.error["message"]
    elif path == "/v1/generate":
        (id,) = answer.json()["request_ids"]
        if dice.random() < 0.3:
            await server.ask("DELETE", f"/v1/result/{id}")
            return
        found = (await server.get(f"/v1/result/{id}?wait=20")).json()
        told[found["status"]] += 1
        if found["status"] == "finished":
            assert found["text"] == expected(prompt, length)
    elif path == "/v1/completions" and not given["stream"]:
        for choice in answer.json()["choices"]:
            assert choice["text"] == expected(prompt, length)


def expected(prompt: str, length: int) -> str:
    return "".join(map(chr, echo_ids([ord(c) for c in prompt], length)))


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_every_request_ends_in_one_way(byte_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    store = "memory" if kind == "memory" else str(tmp_path / "jobs.sqlite3")

    async def main() -> None:
        options: dict[str, Any] = {"max_requests": 24, "request_timeout": 0.6, "store": store}
        async with serving(byte_checkpoint, **options) as server:
            dice, told = random.Random(5), Counter[str]()
            living = asyncio.create_task(Moody(server, 6).live())
            tasks = set()
            for _ in range(300):
                tasks.add(asyncio.create_task(client(server, dice, told)))
                await asyncio.sleep(dice.random() * 0.004)
            await asyncio.gather(*tasks)
            await until(lambda: server.idle() and not server.jobs._live)
            living.cancel()

            assert not server.engine.open_calls
            ends = {
                name: sum(
                    sample.value
                    for family in server.service.metrics.registry.collect()
                    for sample in family.samples
                    if sample.name == f"dllmserve:{name}_total"
                )
                for name in ("request_success", "request_failure", "requests_aborted")
            }
            accepted = server.metric("request_prompt_tokens_count")
            assert accepted == len(server.engine.calls) == sum(ends.values())
            # something of everything has happened
            assert all(count > 0 for count in ends.values()), ends
            assert {"200", "finished"} <= set(told), told
            assert server.metric("requests_aborted_total", reason="shutdown") == 0

    run(main())
