"""The two SDKs that know decisions, unmodified, against a server with the embedded model."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.server.clients.conftest import KEYS
from tests.server.clients.started import Started
from tests.server.test_server_decisions import TRUTH, check_decision, check_system_one

if not hasattr(OpenAI, "decisions"):
    pytest.skip("this openai package has no decisions", allow_module_level=True)

PAIRS = TRUTH["pairs"]
RAIN: Any = {"type": "predicate", "instructions": "It rains."}


@pytest.fixture(scope="module")
def client(server: Started) -> Iterator[OpenAI]:
    """A client that checks every answer against the SDK's own types."""
    with OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,
    ) as made:
        yield made


def of(sdk: str, path: str) -> list[Any]:
    return [p for p in PAIRS if p["sdk"] == sdk and p["path"] == path]


@pytest.mark.parametrize("pair", of("openai", "/v1/decisions"), ids=lambda p: p["name"][:40])
def test_openai(client: OpenAI, pair: dict[str, Any]) -> None:
    asked = {**pair["request"], "model": "tiny"}
    found = client.decisions.create(**asked, safety_identifier="me", prompt_cache_key="a")
    assert found.model == "tiny"
    assert [a.type for a in found.answers] == [q["type"] for q in asked["questions"]]
    assert [a.name for a in found.answers] == [q.get("name") for q in asked["questions"]]
    check_decision(json.loads(found.model_dump_json())["answers"])
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    again = client.decisions.create(**asked)
    assert again.answers == found.answers


def test_openai_options_and_sizes(client: OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "input": "Take an umbrella."}
    plain = client.decisions.create(**ask, questions=[RAIN] * 5)
    assert len(plain.answers) == 5 and plain.usage.output_tokens == 5
    for more in ({"reading": "sequential"}, {"orders": 2}):
        other = client.decisions.create(**ask, questions=[RAIN] * 5, extra_body=more)
        assert other.answers[0] != plain.answers[0] or more == {"reading": "sequential"}
    # more than one prompt's worth
    many = client.decisions.create(**ask, questions=[RAIN] * 150)
    assert len(many.answers) == 150
    values: Any = [{"value": str(i)} for i in range(40)]
    wide: Any = {"type": "choice", "instructions": "Which?", "choices": values}
    (made,) = client.decisions.create(**ask, questions=[wide]).answers
    assert made.type == "choice" and len(made.probabilities) == 40
    raw = client.decisions.with_raw_response.create(**ask, questions=[RAIN])
    assert raw.headers["x-request-id"] and len(raw.parse().answers) == 1


def test_openai_errors(client: OpenAI, guarded_server: Started) -> None:
    cases: list[tuple[dict[str, Any], type[openai.APIStatusError], str | None]] = [
        ({"questions": []}, openai.BadRequestError, "questions"),
        ({"model": "nope"}, openai.NotFoundError, "model"),
        ({"extra_body": {"orders": 99}}, openai.BadRequestError, "orders"),
        ({"questions": [{"type": "choice"}]}, openai.BadRequestError, "questions[0].instructions"),
        ({"input": "a" * 10**6}, openai.BadRequestError, None),
    ]
    for given, kind, param in cases:
        asked: dict[str, Any] = {"model": "tiny", "input": "a", "questions": [RAIN], **given}
        with pytest.raises(kind) as info:
            client.decisions.create(**asked)
        assert info.value.param == param and info.value.message
    stranger = OpenAI(base_url=f"{guarded_server.url}/v1", api_key="unknown", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.decisions.create(model="tiny", input="a", questions=[RAIN])
    stranger.close()


def test_async_openai(server: Started) -> None:
    async def main() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            calls = [
                client.decisions.create(model="tiny", input=f"It is {i}.", questions=[RAIN])
                for i in range(8)
            ]
            found = await asyncio.gather(*calls)
            assert [len(decision.answers) for decision in found] == [1] * 8

    asyncio.run(main())


def test_the_tool_runner_of_openai(client: OpenAI) -> None:
    """It refuses a reply that lacks any field."""
    from openai.lib.decisions_tool_runner import DecisionCandidate, DecisionsToolRunner

    done: list[str] = []

    def candidates(observation: Any) -> list[DecisionCandidate]:
        found: list[DecisionCandidate] = [
            {"id": "stop", "description": "nothing is left to do", "done": True}
        ]
        if len(done) < 2:
            found.append({"id": "go", "description": "go on", "execute": lambda: done.append("go")})
        return found

    runner = DecisionsToolRunner(observe=lambda: f"so far: {done}", candidates=candidates)
    result = runner.run(client, {"model": "tiny", "input": "Go on twice."}, max_steps=5)
    assert result["status"] == "unverified" and len(result["decisions"]) >= 1


def test_the_pages_own_examples(server: Started) -> None:
    page = (Path(__file__).parents[3] / "docs" / "decisions.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python no-run\n(.*?)```", page, re.S)
    assert len(blocks) == 2
    for block in blocks:
        if "typesafe_sdk" in block:
            pytest.importorskip("typesafe_sdk")
        exec(block.replace("http://127.0.0.1:8000", server.url), {})


@pytest.fixture(scope="module")
def typesafe(server: Started) -> Iterator[Any]:
    """A client of the other SDK."""
    sdk = pytest.importorskip("typesafe_sdk")
    with sdk.TypeSafeClient(
        api_key="none", base_url=server.url, model="tiny", timeout=60, retry=None
    ) as made:
        yield made


@pytest.mark.parametrize("pair", of("typesafe_sdk", "/v1/systemone"), ids=lambda p: p["name"][:40])
def test_typesafe(typesafe: Any, pair: dict[str, Any]) -> None:
    asked = pair["request"]
    found = typesafe.system_one(state=asked["state"], questions=asked["questions"])
    assert found.model == "tiny" and set(found.answers) == set(asked["questions"])
    check_system_one(found.raw_http_response.json()["answers"])
    assert found.usage.input_tokens > 50 and found.request_id


def test_typesafe_with_large_states(typesafe: Any) -> None:
    """Sent compressed wherever the SDK can."""
    state = {"items": [{"name": f"item {i}", "note": "x" * 20} for i in range(40)]}
    asked = {"ok": {"type": "noul", "instructions": "Is it complete?"}}
    assert typesafe.system_one(state=state, questions=asked).nouls["ok"].noul > 0
    models = typesafe.models.list()
    assert [model.name for model in models.models] == ["tiny"] and models.request_id
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", models.models[0].release_date)


def test_typesafe_errors(typesafe: Any, guarded_server: Started) -> None:
    sdk = pytest.importorskip("typesafe_sdk")
    ask: dict[str, Any] = {"state": "a", "questions": {"q": {"type": "noul", "instructions": "b"}}}
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"model": "jev-latest"}, "TypeSafeNotFoundError", "does not exist"),
        ({"questions": {"q": {"type": "x"}}}, "TypeSafeUnprocessableEntityError", "questions.q"),
        ({"questions": {"q": {"type": "box"}}}, "TypeSafeBadRequestError", "vision model"),
        ({"extra_body": {"orders": 0}}, "TypeSafeUnprocessableEntityError", "orders"),
        ({"state": "a" * 10**6}, "TypeSafeBadRequestError", "characters"),
        ({"state": "a" * 3 * 10**6}, "TypeSafeAPIError", "limited to"),
    ]
    for given, kind, words in cases:
        with pytest.raises(getattr(sdk, kind)) as info:
            typesafe.system_one(**{**ask, **given})
        assert words in str(info.value) and info.value.request_id, kind
    picture = sdk.Image(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(sdk.TypeSafeAPIError) as info:
        typesafe.system_one(state=picture, questions=ask["questions"])
    assert info.value.status == 415
    with sdk.TypeSafeClient(api_key="unknown", base_url=guarded_server.url) as stranger:
        with pytest.raises(sdk.TypeSafeAuthenticationError):
            stranger.system_one(**ask, model="tiny")
    with sdk.TypeSafeClient(api_key=KEYS[3], base_url=guarded_server.url) as known:
        with pytest.raises(sdk.TypeSafeNotFoundError):
            known.system_one(**ask)
