"""Schemas and tools over HTTP with real engines: what random models answer is valid, too."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from dllmserve.config import EngineConfig
from dllmserve.server.app import create_app
from dllmserve.server.config import ServerConfig
from dllmserve.server.settings import Settings
from tests.checkpoints import write_byte_model
from tests.engine.test_tool_form import LISTED
from tests.process.left import nothing_left
from tests.server.stand_in import Exchange

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
#: with the chat templates of their own, if they have one
MODELS = (("llada", None), ("sdar", None), ("fast-dllm", None), ("qwen3", None), ("llada", LISTED))
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "count": {"type": "integer", "minimum": 3, "maximum": 99},
        "mood": {"enum": ["good", "bad"]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
    },
    "required": ["count", "mood", "tags"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string", "maxLength": 3}},
}
NAMES = ("add", "subtract")
TOOLS = [{"type": "function", "function": {"name": n, "parameters": SCHEMA}} for n in NAMES]
FLAT = [{"type": "function", "name": n, "parameters": SCHEMA} for n in NAMES]
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300}


def check(text: str) -> None:
    """Valid by SCHEMA."""
    value = json.loads(text)
    assert list(value) == ["count", "mood", "tags"]
    assert type(value["count"]) is int and 3 <= value["count"] <= 99
    assert value["mood"] in ("good", "bad") and len(value["tags"]) <= 2
    assert all(isinstance(tag, str) and len(tag) <= 3 for tag in value["tags"])


def check_calls(message: dict[str, Any], least: int = 1) -> None:
    calls = message.get("tool_calls") or []
    assert len(calls) >= least
    for call in calls:
        assert call["function"]["name"] in NAMES
        check(call["function"]["arguments"])


@pytest.mark.parametrize(("family", "template"), MODELS)
def test_answers_are_valid(family: str, template: str | None, tmp_path: Path) -> None:
    directory = write_byte_model(tmp_path / family, family, max_len=2048)
    if template is not None:
        settings = {"eos_token": "<|end|>", "chat_template": template}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    config = ServerConfig(job_store="memory", shutdown_timeout=0.0)
    engine = EngineConfig(model=str(directory), max_num_seqs=4, kv_pages=1024, threads=1)
    app = create_app(Settings(config, engine, None))

    async def ask(path: str, body: dict[str, Any]) -> Any:
        reply = await Exchange(app, "POST", path, body, {}).reply()
        assert reply.status == 200, reply.body
        return reply

    async def main() -> None:
        async with app.router.lifespan_context(app):
            tokenizer = app.state.service.llm.tokenizer
            assert tokenizer.tool_form.native == (template is not None)
            # tests/engine has each of them at both; the server does not tell them apart
            for temperature in (0.0, 1.5) if (family, template) == MODELS[0] else (1.5,):
                told = {**ASK, "temperature": temperature, "seed": 5}
                chats = [
                    {**told, "response_format": FORMAT},
                    {**told, "tools": TOOLS, "tool_choice": "required"},
                    {
                        **told,
                        "tools": TOOLS,
                        "tool_choice": "required",
                        "parallel_tool_calls": False,
                    },
                    {**told, "tools": TOOLS},
                    {**told, "tools": TOOLS, "response_format": FORMAT},
                    {**told, "choice": ["yes", "no"]},
                ]
                answers = await asyncio.gather(*(ask(CHAT, body) for body in chats))
                messages = [answer.json()["choices"][0]["message"] for answer in answers]
                check(messages[0]["content"])
                check_calls(messages[1])
                check_calls(messages[2])
                assert len(messages[2]["tool_calls"]) == 1
                check_calls(messages[3], 0)
                check_calls(messages[4], 0)
                if "tool_calls" not in messages[4]:
                    check(messages[4]["content"])
                assert messages[5]["content"] in ("yes", "no")
                body = {"input": "Hi", "tools": FLAT, "tool_choice": "required", "stream": True}
                body |= {"max_output_tokens": 300, "temperature": temperature, "seed": 5}
                events = (await ask(RESPONSES, body)).events()
                items = events[-1][1]["response"]["output"]
                assert items and events[-1][0] == "response.completed"
                for item in items:
                    assert item["name"] in NAMES
                    check(item["arguments"])

    with nothing_left():
        asyncio.run(asyncio.wait_for(main(), 250))
