"""Owners: whoever has another key finds nothing, whatever id they ask for."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Sequence

from chaos.client import Client
from chaos.scenario import Ground, Report, Scenario
from chaos.server import Server
from dllmserve import SamplingParams

_BATCH = 100
#: as few forwards as the model allows
_PARAMS = {
    "gen_length": 6,
    "unmask": "threshold",
    "threshold": 0.0,
    "temperature": 0.0,
    "ignore_eos": True,
}
#: everything a client can do with an id
_FOREIGN = (("GET", ""), ("GET", "?wait=1"), ("GET", "?details=true"), ("DELETE", ""))


async def run(ground: Ground, report: Report, *, owners: int, jobs: int) -> None:
    """Every owner submits jobs, reads all of them, and asks for as many of the others'."""
    folder = ground.place("isolation")
    keys = [secrets.token_urlsafe(24) for _ in range(owners)]
    file = folder / "keys.txt"
    file.write_text("".join(f"{key}\n" for key in keys))
    file.chmod(0o600)
    prompts = [[[i % 250, j % 250, (i * 31 + j) % 250] for j in range(jobs)] for i in range(owners)]
    texts = _answers(ground, [prompt for mine in prompts for prompt in mine])
    # ids that can be guessed, so that nothing but the owner protects a job
    options = (
        *("--api-key-file", str(file), "--request-id-scheme", "sequential", "--open-metrics"),
        *("--max-requests", "1024"),
    )
    async with ground.server(folder, *options) as server:
        clients = [Client(server.port, key) for key in keys]
        submitted = await asyncio.gather(
            *[_submit(client, mine) for client, mine in zip(clients, prompts, strict=True)]
        )
        ids = [id for mine in submitted for id in mine]
        report.expect(len(set(ids)) == owners * jobs, "an id was given twice")
        rights = dict(zip(ids, texts, strict=True))
        foreign: list[str] = []
        wrong: list[str] = []
        for owner, client in enumerate(clients):
            others = [id for i, mine in enumerate(submitted) if i != owner for id in mine]
            rng = random.Random(owner)
            own = _read_own(client, submitted[owner], rights)
            crossed = _read_foreign(client, rng.sample(others, jobs))
            bad, leaked = await asyncio.gather(own, crossed)
            wrong += bad
            foreign += leaked
        deleted = await _deleted_stay_hidden(clients, submitted)
        for client in clients:
            await client.close()
        stranger = await _strangers(server, ids[:50])
    report.expect_none("foreign reads", foreign)
    report.expect_none("own jobs wrong or missing", wrong)
    report.expect_none("deleted jobs told to others", deleted)
    report.expect_none("answers without a key", stranger)
    report.measured |= {"owners": owners, "jobs": len(ids), "foreign requests": owners * jobs}


def _answers(ground: Ground, prompts: Sequence[list[int]]) -> list[str]:
    """What the model says to each prompt."""
    params = SamplingParams(**_PARAMS)  # type: ignore[arg-type]
    outputs = ground.known.llm.generate(list(prompts), params, use_tqdm=False)
    return [output["text"] for output in outputs]


async def _submit(client: Client, prompts: Sequence[list[int]]) -> list[int]:
    ids: list[int] = []
    while len(ids) < len(prompts):
        body = {"prompts": prompts[len(ids) : len(ids) + _BATCH], **_PARAMS}
        answer = await client.post("/v1/generate_batch", body)
        if answer.status == 503 and answer.retry_after:
            await asyncio.sleep(answer.retry_after)
        elif answer.status == 200:
            ids += answer.json()["request_ids"]
        else:
            raise AssertionError(f"status {answer.status} for a batch: {answer.body[:200]!r}")
    return ids


async def _read_own(client: Client, ids: Sequence[int], texts: dict[int, str]) -> list[str]:
    wrong = []
    for id in ids:
        answer = await client.get(f"/v1/result/{id}?wait=60")
        if answer.status != 200 or answer.json()["text"] != texts[id]:
            wrong.append(f"job {id}: {answer.status} {answer.body[:100]!r}")
    return wrong


async def _read_foreign(client: Client, ids: Sequence[int]) -> list[str]:
    leaked = []
    for place, id in enumerate(ids):
        method, query = _FOREIGN[place % len(_FOREIGN)]
        answer = await client.ask(method, f"/v1/result/{id}{query}")
        if answer.status != 404:
            leaked.append(f"{method} of job {id}: {answer.status} {answer.body[:100]!r}")
    return leaked


async def _deleted_stay_hidden(
    clients: Sequence[Client], submitted: Sequence[Sequence[int]]
) -> list[str]:
    """A deleted job is gone (410) for its owner and was never there (404) for others."""
    wrong = []
    for owner, mine in enumerate(submitted):
        id, path = mine[0], f"/v1/result/{mine[0]}"
        statuses = [
            (await clients[owner].ask("DELETE", path)).status,
            (await clients[owner].get(path)).status,
            (await clients[owner - 1].get(path)).status,
        ]
        if statuses != [204, 410, 404]:
            wrong.append(f"job {id}: DELETE, GET, foreign GET gave {statuses}")
    return wrong


async def _strangers(server: Server, ids: Sequence[int]) -> list[str]:
    """No key and a wrong key get 401, whatever the id."""
    wrong = []
    for key in (None, "wrong"):
        async with Client(server.port, key) as client:
            statuses = {(await client.get(f"/v1/result/{id}")).status for id in ids}
        if statuses != {401}:
            wrong.append(f"key {key}: {statuses}")
    return wrong


ISOLATION = Scenario(
    name="isolation",
    does="16 API keys with 500 jobs each, ids that can be guessed; each reads its own jobs and "
    "reads, polls and deletes as many of the others'",
    passes="404 for every foreign id, deleted ones too; 401 without a key; own texts right",
    run=run,
    full={"owners": 16, "jobs": 500},
    quick={"owners": 4, "jobs": 40},
)
