"""What the log says of requests, and that it does not say what users wrote."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dllmserve.errors import EngineDiedError
from tests.server.stand_in import KEYS, run, secret, serving, until

SECRET = "xyzzy-42"
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": SECRET, "max_tokens": 8}),
    ("/v1/completions", {"prompt": SECRET, "max_tokens": 8, "stream": True, "echo": True}),
    ("/v1/completions", {"prompt": [SECRET, 5]}),
    ("/v1/completions", {"prompt": SECRET * 900}),
    ("/v1/completions", {"prompt": "a", "model": SECRET}),
    ("/v1/completions", {"prompt": "a", "stop": [SECRET, ""]}),
    ("/v1/completions", {SECRET: 1}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET}]}),
    ("/v1/chat/completions", {"messages": [{"role": SECRET, "content": "a"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET + "\ud800"}]}),
    ("/v1/generate", {"prompt": SECRET, "gen_length": 8}),
    ("/v1/generate", {"prompt": SECRET, "remasking": SECRET}),
    ("/v1/generate_batch", {"prompts": [SECRET, ""]}),
    ("/v1/generate/stream", {"prompt": SECRET, "gen_length": 8}),
    ("/v1/infill", {"template": [SECRET, {"hole": 4, "name": SECRET}]}),
    ("/v1/infill", {"template": [SECRET, {"hole": 4, "choice": [SECRET, 5]}]}),
    ("/infill", {"input_prefix": SECRET, "input_suffix": SECRET, "n_predict": 4}),
    ("/v1/completions", {"prompt": "a", "suffix": SECRET, "max_tokens": 4}),
    (f"/v1/{SECRET}", {"prompt": SECRET}),
]


def everything(caplog: pytest.LogCaptureFixture) -> str:
    """All records with all that they carry, as a formatter might write them."""
    return "\n".join(repr(vars(record)) + record.getMessage() for record in caplog.records)


def test_what_users_write_is_not_logged(
    byte_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "dllmserve")

    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for path, given in ASKED:
                await server.post(path, given, **{"x-request-id": f"{SECRET}\n"})
            await server.get(f"/v1/result/{SECRET}?wait={SECRET}")
            await server.get("/v1/result/0?wait=5")
            server.engine.hold = True
            for given in ASKED[0][1], ASKED[1][1]:
                before = len(server.engine.calls)
                asked = server.begin("POST", "/v1/completions", given)
                await until(lambda seen=before: len(server.engine.calls) > seen)
                server.engine.calls[-1].end(EngineDiedError("no"))
                await asked.reply()

    run(main())
    logged = everything(caplog)
    assert SECRET not in logged
    assert logged.count("EngineDiedError") >= 2


def test_what_a_request_cost_is_in_its_line(
    byte_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dllmserve.access")

    async def main() -> None:
        async with serving(byte_checkpoint, keys=KEYS) as server:
            for path, given in ASKED[0], ASKED[1], ASKED[10], ASKED[13]:
                await server.post(path, given, **secret("ann"))

    run(main())
    lines = [vars(record) for record in caplog.records if record.name == "dllmserve.access"]
    assert [line["key_name"] for line in lines] == ["ann"] * 4
    assert [line["prompt_tokens"] for line in lines] == [len(SECRET)] * 4
    assert [line.get("completion_tokens") for line in lines] == [8, 8, None, 8]
    assert all(line["queue_ms"] >= 0 for line in lines if "queue_ms" in line)
    assert lines[2]["jobs"] == 1


def test_prompts_are_logged_if_the_operator_wants_it(
    byte_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dllmserve.access")

    async def main() -> None:
        async with serving(byte_checkpoint, log_prompts=True) as server:
            for path, given in ASKED[0], ASKED[7], ASKED[10], ASKED[13]:
                await server.post(path, given)
            await server.post("/v1/generate", {"prompt": "long" * 50, "gen_length": 1})
            await server.post("/v1/generate", {"prompt": list(range(100)), "gen_length": 1})

    run(main())
    prompts = [getattr(r, "prompts", "") for r in caplog.records if r.name == "dllmserve.access"]
    assert all(SECRET in text for text in prompts[:4])
    assert len(prompts[4]) == 200
    assert prompts[5] == json.dumps([list(range(100))])[:200]
