"""The whole server, with a real engine in its process."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dllmserve import LLM, SamplingParams
from dllmserve.config import EngineConfig
from dllmserve.server.app import create_app
from dllmserve.server.config import ServerConfig
from dllmserve.server.settings import Settings
from dllmserve.server.store import SqliteStore
from tests.process.left import nothing_left
from tests.server.stand_in import Server, until

CHAT = [{"role": "user", "content": "Hi <|end|>"}]
SHORT = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "block_length": 4}
LONG = {"gen_length": 120, "steps": 120, "temperature": 0, "ignore_eos": True}


@asynccontextmanager
async def whole(directory: Path, store: Path, **options: Any) -> AsyncIterator[Server]:
    config = ServerConfig(job_store=str(store), shutdown_timeout=0.0)
    app = create_app(Settings(config, EngineConfig(model=str(directory), device="cpu", **options)))
    service = app.state.service
    async with app.router.lifespan_context(app):
        yield Server(app, service, app.state.jobs, service.llm.fleet)


async def same_answers(server: Server, llm: LLM) -> None:
    params = SamplingParams(
        temperature=0.0, gen_length=24, steps=24, block_length=4, ignore_eos=True
    )
    (expected,) = llm.generate(["Hello"], params, use_tqdm=False)
    given = {"prompt": "Hello", **SHORT}
    answer = (await server.post("/v1/completions", given)).json()
    assert answer["choices"][0]["text"] == expected["text"]
    assert answer["usage"]["forward_passes"] == expected["usage"]["forward_passes"]
    stream = await server.post("/v1/completions", {**given, "stream": True})
    pieces = [data["choices"][0]["text"] for _, data in stream.events()[:-1]]
    assert "".join(pieces) == expected["text"] and len([p for p in pieces if p]) > 2
    native = {**SHORT, "prompt": "Hello", "gen_length": 24, "steps": 24}
    (id,) = (await server.post("/v1/generate", native)).json()["request_ids"]
    found = (await server.get(f"/v1/result/{id}?wait=30")).json()
    assert found["text"] == expected["text"]
    events = (await server.post("/v1/generate/stream", native)).events()
    assert events[-1] == ("done", expected)
    assert sum(name == "step" for name, _ in events) == 24

    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode_chat(CHAT, literal_contents=True)
    (expected,) = llm.generate([ids], params, use_tqdm=False)
    answer = (await server.post("/v1/chat/completions", {"messages": CHAT, **SHORT})).json()
    assert answer["choices"][0]["message"]["content"] == expected["text"]

    drawn = {"prompt": [65, 66], "max_tokens": 8, "seed": 5, "n": 3}
    choices = (await server.post("/v1/completions", drawn)).json()["choices"]
    texts = [
        llm.generate(
            [[65, 66]],
            SamplingParams(gen_length=8, quality="balanced", seed=5 + n),
            use_tqdm=False,
        )[0]["text"]
        for n in range(3)
    ]
    assert [choice["text"] for choice in choices] == texts and len(set(texts)) == 3


def check_metrics(server: Server) -> None:
    assert server.metric("request_success_total", finished_reason="length") == 5 + 3
    assert server.metric("generation_tokens_total") == 5 * 24 + 3 * 8
    assert server.metric("diffusion_num_committed_tokens_total") == 5 * 24 + 3 * 8
    assert server.metric("diffusion_num_denoising_steps_total") == 5 * 24 + 3 * 8
    assert server.metric("engine_steps_total") > 0
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert server.metric(name) == 0
    assert server.metric("request_failure_total") == server.metric("requests_aborted_total") == 0


async def killed(server: Server, llm: LLM) -> None:
    """An engine that is killed is a delay, and nothing else."""
    (expected,) = llm.generate(["Hello"], SamplingParams(**LONG), use_tqdm=False)
    (id,) = (await server.post("/v1/generate", {"prompt": "Hello", **LONG})).json()["request_ids"]
    asked = server.begin(
        "POST", "/v1/completions", {"prompt": "Hello", **LONG, "block_length": 120}
    )
    await until(lambda: sum(run.call.running for run in server.service.runs) == 2)
    (pid,) = server.engine.engine_pids
    os.kill(pid, signal.SIGKILL)
    await until(lambda: server.service.status == "restarting")
    assert (await server.get("/ready")).status == 503
    answer = await asked.reply()
    assert answer.json()["choices"][0]["text"] == expected["text"]
    assert (await server.get(f"/v1/result/{id}?wait=60")).json()["text"] == expected["text"]
    assert (await server.get("/ready")).status == 200
    assert server.metric("engine_restarts_total") == 1
    assert server.engine.engine_pids != [pid]


def test_from_the_first_request_to_the_last(
    byte_checkpoint: Path, engines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    llm: LLM = engines(byte_checkpoint)
    store = tmp_path / "jobs.sqlite3"

    async def main() -> None:
        async with whole(byte_checkpoint, store) as server:
            await same_answers(server, llm)
            await until(lambda: server.metric("num_requests_running") == 0)
            check_metrics(server)
            await killed(server, llm)
            # the next server takes it up
            (id,) = (await server.post("/v1/generate", {"prompt": "x", **LONG})).json()[
                "request_ids"
            ]
            await until(lambda: len(server.service.runs) == 1)
        kept = SqliteStore(store)
        await kept.open()
        assert [record.id for record in await kept.unfinished()] == [id]
        await kept.close()

    with nothing_left():
        asyncio.run(asyncio.wait_for(main(), 200))
