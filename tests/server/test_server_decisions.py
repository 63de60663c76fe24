"""/v1/decisions and /v1/systemone: every documented pair and error, and what guards them."""

import gzip
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dllmserve.server.http.coding import zstd
from tests.server.stand_in import KEYS, LIMITS, SPEC, Server, make_server, run, secret, until

TRUTH = json.loads((Path(__file__).parents[1] / "truth" / "decisions.json").read_text())
NAME = "llada-8b-instruct"
DECISIONS, SYSTEM_ONE = "/v1/decisions", "/v1/systemone"
RAIN = {"type": "predicate", "instructions": "It rains."}
ASK = {"input": "Take an umbrella.", "questions": [RAIN]}
STATE: dict[str, Any] = {
    "state": "a",
    "questions": {"rain": {"type": "noul", "instructions": "Does it rain?"}},
}
LENGTH = 8192


@asynccontextmanager
async def deciding(directory: Path, length: int = LENGTH, **options: Any) -> AsyncIterator[Server]:
    """A started server whose stand-in has room for decisions."""
    app, server = make_server(directory, served_model_name=NAME, **options)
    server.engine._known = msgspec.structs.replace(
        server.engine._known,
        spec=replace(SPEC, max_model_len=length),
        limits=replace(LIMITS, max_model_len=length, max_num_batched_tokens=length),
    )
    async with app.router.lifespan_context(app):
        yield server
    await until(server.idle)


def alike(found: Any, expected: Any, place: str = "") -> None:
    """The same keys in the same order, and values of the same types; texts are the same."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), place
        for key, value in expected.items():
            alike(found[key], value, f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, value in enumerate(expected):
            alike(found[number], value, f"{place}[{number}]")
    elif isinstance(expected, float):
        assert isinstance(found, int | float) and not isinstance(found, bool), place
    elif isinstance(expected, int) and not isinstance(expected, bool):
        assert type(found) is int, place
    elif place.endswith((".choice", "created", "owned_by", "description", "release_date")):
        assert type(found) is type(expected), place
    else:
        assert found == expected, place


def check_numbers(chances: list[float], made: dict[str, Any]) -> None:
    """What must hold between the numbers of an answer."""
    count, most = len(chances), max(chances)
    assert math.fsum(chances) == pytest.approx(1, abs=1e-12)
    expected = 1.0 if count == 1 else (count * most - 1) / (count - 1)
    assert made["confidence"] == pytest.approx(expected)


def check_decision(answers: list[dict[str, Any]]) -> None:
    for made in answers:
        if made["type"] == "predicate":
            assert 0 <= made["probability"] <= 1
            continue
        chances = [p["probability"] for p in made["probabilities"]]
        check_numbers(chances, made)
        if made["type"] == "choice":
            best = made["probabilities"][chances.index(max(chances))]["value"]
            assert made["choice"] == best and type(made["choice"]) is type(best)
        else:
            mean = sum(p["value"] * p["probability"] for p in made["probabilities"])
            assert made["score"] == pytest.approx(mean)


def check_system_one(answers: dict[str, dict[str, Any]]) -> None:
    for made in answers.values():
        if made["type"] == "noul":
            assert 0 <= made["noul"] <= 1
            continue
        chances = made["probabilities"]
        check_numbers(list(chances.values()), made)
        if made["type"] == "choice":
            assert chances[made["choice"]] == max(chances.values())
        else:
            mean = sum(int(level) * chance for level, chance in chances.items())
            assert made["score"] == pytest.approx(mean)
            assert list(made["legend"]) == list(chances)


@pytest.mark.parametrize("pair", TRUTH["pairs"], ids=lambda pair: pair["name"][:40])
def test_every_pair(pair: dict[str, Any], byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with deciding(byte_checkpoint) as server:
            answer = await server.ask(pair["method"], pair["path"], pair["request"])
            assert answer.status == pair["status"], answer
            found, expected = answer.json(), json.loads(json.dumps(pair["response"]))
            if pair["path"] == DECISIONS:
                for place, made in enumerate(expected["answers"]):
                    if made["type"] == "refusal":  # no model here declines to answer
                        shown = {"type": "predicate", "name": made["name"], "probability": 0.5}
                        expected["answers"][place] = shown
                check_decision(found["answers"])
                usage = found["usage"]
                assert usage["output_tokens"] == len(found["answers"])
                total = usage["input_tokens"] + usage["output_tokens"]
                assert usage["total_tokens"] == total and usage["input_tokens"] > 100
            elif pair["path"] == SYSTEM_ONE:
                check_system_one(found["answers"])
            else:  # the list of models: what it has besides is of no client's interest
                found["data"] = [
                    {k: card[k] for k in expected["data"][0]} for card in found["data"]
                ]
            alike(found, expected)

    run(main())


@pytest.mark.parametrize("case", TRUTH["errors"], ids=lambda case: case["name"])
def test_every_error(case: dict[str, Any], byte_checkpoint: Path) -> None:
    given = case["request"]
    if given == "model, input and 401 predicate questions":
        given = {"model": NAME, "input": "a", "questions": [RAIN] * 401}

    async def main() -> None:
        async with deciding(byte_checkpoint) as server:
            answer = await server.post(case["path"], given)
            assert (answer.status, answer.json()) == (case["status"], case["response"])
            assert not server.engine.calls

    run(main())


def test_questions_of_a_request_are_one_request_of_the_engine(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with deciding(byte_checkpoint, 20_000) as server:
            for count in (1, 100, 400):
                asked = {"input": "a", "questions": [{**RAIN, "name": f"q{count}"}] * count}
                before = len(server.engine.calls)
                answer = await server.post(DECISIONS, asked)
                assert answer.status == 200, answer
                (call,) = server.engine.calls[before:]
                assert len(call.submit.candidates) == len(call.submit.holes) == count
                assert call.submit.params.steps_per_block == 1
                assert call.submit.params.temperature == 0
                found = answer.json()
                assert [made["name"] for made in found["answers"]] == [f"q{count}"] * count
                assert found["usage"]["output_tokens"] == count
            assert server.metric("num_requests_finished_total", finished_reason="length") >= 0

    run(main())


def test_255_choices_and_orders_and_sequences(byte_checkpoint: Path) -> None:
    wide = [{"value": f"v{i}"} for i in range(255)]
    choice = {"type": "choice", "instructions": "Which?", "choices": wide}

    async def main() -> None:
        async with deciding(byte_checkpoint, max_prompts=4) as server:
            answer = await server.post(DECISIONS, {"input": "a", "questions": [choice]})
            (made,) = answer.json()["answers"]
            check_decision([made])
            # the second letter behind each of ten first ones, four at a time
            assert len(server.engine.calls) == 1 + 10
            assert made["choice"] == "v0" and len(made["probabilities"]) == 255
            del server.engine.calls[:]
            asked = {"input": "a", "questions": [RAIN, RAIN], "orders": 2, "timeout": 9}
            answer = await server.post(DECISIONS, asked)
            assert len(server.engine.calls) == 2
            # the stand-in likes label A best, whatever it says
            (first, _) = answer.json()["answers"]
            assert first["probability"] == pytest.approx(0.5)
            del server.engine.calls[:]
            await server.post(DECISIONS, {**ASK, "questions": [RAIN] * 3, "reading": "sequential"})
            given = [len(call.submit.holes) for call in server.engine.calls]
            assert given == [3, 2, 1]

    run(main())


def test_what_does_not_fit_is_refused_or_spread(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with deciding(byte_checkpoint, 600) as server:
            many = {"input": "a", "questions": [RAIN] * 30}
            answer = await server.post(DECISIONS, many)
            assert answer.status == 200 and 1 < len(server.engine.calls) < 30
            assert len(answer.json()["answers"]) == 30
            answer = await server.post(DECISIONS, {**many, "reading": "sequential"})
            assert answer.status == 400
            assert (answer.error["param"], answer.error["code"]) == ("reading", "invalid_parameter")
            for size in (600, 100_000):
                answer = await server.post(DECISIONS, {**ASK, "input": "b" * size})
                assert answer.status == 400
                assert answer.error["code"] == "context_length_exceeded"
                assert "questions[0]" in answer.error["message"]
                answer = await server.post(SYSTEM_ONE, {**STATE, "state": "b" * size})
                told = answer.json()["detail"]
                assert answer.status == 400 and told["error_type"] == "context_length_exceeded"

    run(main())


WRONG_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({**ASK, "reading": "both"}, "reading", "must be one of 'parallel', 'sequential'"),
    ({**ASK, "orders": 0}, "orders", "must be an integer in [1, 32], got 0"),
    ({**ASK, "orders": "2"}, "orders", "must be an integer"),
    ({**ASK, "timeout": -1}, "timeout", "must be a number in (0, 86400]"),
    ({"questions": [RAIN]}, "input", "is missing"),
    ({"input": "a"}, "questions", "is missing"),
    ({**ASK, "temperature": 0}, "temperature", "is not a parameter of this endpoint"),
    ({**ASK, "input": None}, "input", "expected a list, got null"),
    ({**ASK, "questions": [{"\ud800": 1}]}, "questions[0].type", "expected one of predicate"),
    ({**ASK, "questions": [{**RAIN, "\ud800": 1}]}, "questions[0].\\ud800", "is not known"),
    ({**ASK, "questions": {}}, "questions", "expected a list, got {}"),
]


@pytest.mark.parametrize(("given", "param", "words"), WRONG_FIELDS)
def test_wrong_fields_of_decisions(
    given: dict[str, Any], param: str, words: str, byte_checkpoint: Path
) -> None:
    async def main() -> None:
        async with deciding(byte_checkpoint) as server:
            answer = await server.post(DECISIONS, given)
            assert (answer.status, answer.error["param"]) == (400, param)
            assert words in answer.error["message"]

    run(main())


def noul(**more: Any) -> dict[str, Any]:
    return {"state": "a", "questions": {"q": {"type": "noul", **more}}}


WRONG_STATES: list[tuple[Any, list[Any], str]] = [
    ({**STATE, "state": None}, ["body", "state"], "content_type"),
    ({**STATE, "state": 5}, ["body", "state"], "content_type"),
    ({**STATE, "state": "\ud800"}, ["body", "state"], "content"),
    ({**STATE, "state": {"a": [[[]] * 9999] * 2}}, ["body", "state"], "content"),
    ({**STATE, "orders": 33}, ["body", "orders"], "less_than_equal"),
    ({**STATE, "unknown": 1}, ["body", "unknown"], "extra_forbidden"),
    ({"state": "a"}, ["body", "questions"], "missing"),
    ({"state": "a", "questions": {}}, ["body", "questions"], "too_short"),
    (
        {"state": "a", "questions": {"\ud800": STATE["questions"]["rain"]}},
        ["body", "questions"],
        "content",
    ),
    (
        {"state": "a", "questions": {"q": {"type": "choice", "criteria": {"\ud800": "a"}}}},
        ["body", "questions", "q", "choice", "criteria"],
        "content",
    ),
    ({"state": "a", "questions": {"q": 5}}, ["body", "questions", "q"], "model_attributes_type"),
    ({"state": "a", "questions": {"q": {}}}, ["body", "questions", "q"], "union_tag_not_found"),
    (
        {"state": "a", "questions": {"q": {"type": "x"}}},
        ["body", "questions", "q"],
        "union_tag_invalid",
    ),
    (noul(), ["body", "questions", "q", "noul"], "missing_question"),
    (noul(criteria={}), ["body", "questions", "q", "noul"], "missing_question"),
    (
        noul(criteria={"maybe": "x"}),
        ["body", "questions", "q", "noul", "criteria", "maybe"],
        "extra_forbidden",
    ),
    (
        {"state": "a", "questions": {"q": {"type": "choice", "criteria": {}}}},
        ["body", "questions", "q", "choice", "criteria"],
        "too_short",
    ),
    (
        {"state": "a", "questions": {"q": {"type": "choice", "criteria": {"a": 1}}}},
        ["body", "questions", "q", "choice", "criteria", "a"],
        "content_type",
    ),
    (
        {"state": "a", "questions": {"q": {"type": "score"}}},
        ["body", "questions", "q", "score", "criteria"],
        "missing",
    ),
]


@pytest.mark.parametrize(("given", "place", "kind"), WRONG_STATES)
def test_wrong_bodies_of_system_one(
    given: Any, place: list[Any], kind: str, byte_checkpoint: Path
) -> None:
    async def main() -> None:
        async with deciding(byte_checkpoint) as server:
            answer = await server.post(SYSTEM_ONE, given)
            assert answer.status == 422, answer
            (told,) = answer.json()["detail"]
            assert (told["loc"], told["type"]) == (place, kind)
            assert told["msg"] and set(told) <= {"loc", "msg", "type", "ctx"}
            assert answer.headers["x-typesafe-request-id"] == answer.headers["x-request-id"]

    run(main())


def test_a_body_with_many_errors_is_told_of_a_few(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with deciding(byte_checkpoint) as server:
            asked = {str(i): {"type": "x" * 5000} for i in range(400)}
            answer = await server.post(SYSTEM_ONE, {"state": "a", "questions": asked})
            assert answer.status == 422 and 0 < len(answer.json()["detail"]) <= 20
            assert len(answer.body) < 30_000

    run(main())


def test_system_one_reads_what_its_sdk_takes(byte_checkpoint: Path) -> None:
    levels: list[Any] = ["low", {"at": 5}, ["very", "high"]]
    asked = {
        "one": {"type": "choice", "criteria": {"only": None}},
        "told": {"type": "choice", "instructions": ["a", 1], "criteria": {"a": {"b": 1}, "c": "d"}},
        "level": {"type": "score", "criteria": levels, "instructions": {"how": "much"}},
        "single": {"type": "score", "criteria": ["x"]},
        "yes": {
            "type": "noul",
            "instructions": None,
            "criteria": {"true": "it does", "false": None},
        },
    }

    async def main() -> None:
        async with deciding(byte_checkpoint) as server:
            body = {"state": [{"a": "ä"}, 5], "questions": asked, "model": None, "assets": None}
            answer = await server.post(SYSTEM_ONE, body)
            assert answer.status == 200, answer
            found = answer.json()["answers"]
            check_system_one(found)
            assert list(found) == list(asked)
            assert found["one"] == {
                "type": "choice",
                "choice": "only",
                "confidence": 1.0,
                "probabilities": {"only": 1.0},
            }
            assert list(found["level"]["legend"].values()) == levels
            assert found["single"]["score"] == 0 and found["single"]["confidence"] == 1
            tokenizer = server.service.llm.tokenizer
            assert tokenizer is not None
            text = tokenizer.decode(server.engine.calls[0].submit.prompt_ids)
            assert 'Text:\n[{"a": "ä"}, 5]\n' in text
            assert 'A: a - {"b": 1}\nB: c - d' in text
            assert '0: low\n1: {"at": 5}\n2: ["very", "high"]' in text
            assert "A: yes - it does\nB: no" in text

    run(main())


def test_refusals_have_the_shape_of_their_clients(byte_checkpoint: Path) -> None:
    ann = secret("ann")
    state = json.dumps(STATE).encode()
    cases: list[tuple[int, str, str, Any, dict[str, str]]] = [
        (401, "POST", "missing_api_key", STATE, {}),
        (404, "POST", "model_not_found", {**STATE, "model": "nope"}, ann),
        (400, "POST", "invalid_json", b"{", ann),
        (400, "POST", "unsupported_assets", {**STATE, "assets": {"a": {}}}, ann),
        (413, "POST", "body_too_large", b'"%b"' % (b"x" * 9000), ann),
        (415, "POST", "unsupported_media_type", state, {**ann, "content-encoding": "br"}),
        (
            415,
            "POST",
            "unsupported_media_type",
            state,
            {**ann, "content-type": "multipart/form-data; boundary=a"},
        ),
        (405, "GET", "method_not_allowed", None, ann),
    ]

    async def main() -> None:
        async with deciding(byte_checkpoint, keys=KEYS, max_body_bytes=8192) as server:
            for status, method, kind, body, headers in cases:
                answer = await server.ask(method, SYSTEM_ONE, body, **headers)
                assert answer.status == status, (kind, answer)
                told = answer.json()
                assert list(told) == ["detail"] and list(told["detail"]) == [
                    "error_type",
                    "message",
                ]
                assert told["detail"]["error_type"] == kind
                assert answer.headers["x-typesafe-request-id"]
            answer = await server.post(DECISIONS, ASK)
            assert answer.status == 401 and answer.error["code"] == "missing_api_key"
            models = await server.get("/v1/models", **ann)
            assert models.headers["x-typesafe-request-id"] == models.headers["x-request-id"]
            assert "x-typesafe-request-id" not in (await server.get("/health")).headers

    run(main())


def test_limits_hold_for_decisions_too(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with deciding(byte_checkpoint, max_requests=2) as server:
            server.engine.hold = True
            first = server.begin("POST", DECISIONS, {**ASK, "orders": 2})
            await until(lambda: len(server.engine.open_calls) == 2)
            for path, body in ((DECISIONS, ASK), (SYSTEM_ONE, STATE)):
                full = await server.post(path, body)
                assert full.status == 503 and full.headers["retry-after"]
                told = full.json()
                kind = told["error"]["code"] if path == DECISIONS else told["detail"]["error_type"]
                assert kind == "overloaded"
            for call in server.engine.open_calls:
                server.engine.play(call)
            assert (await first.reply()).status == 200
            await until(server.idle)
            # more canvases at once than could ever be taken
            server.engine.hold = False
            answer = await server.post(DECISIONS, {**ASK, "orders": 3})
            assert (answer.status, answer.error["code"]) == (400, "capacity_exceeded")

    run(main())


def test_rate_limits_count_canvases(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with deciding(byte_checkpoint, requests_per_minute=6) as server:
            assert (await server.post(DECISIONS, {**ASK, "orders": 4})).status == 200
            assert (await server.post(DECISIONS, ASK)).status == 200
            refused = await server.post(DECISIONS, {**ASK, "orders": 4})
            assert refused.status == 429 and refused.error["code"] == "rate_limit_exceeded"

    run(main())


def test_time_is_bounded_and_clients_may_leave(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with deciding(byte_checkpoint) as server:
            server.engine.hold = True
            late = await server.post(DECISIONS, {**ASK, "timeout": 0.05})
            assert (late.status, late.error["code"]) == (504, "deadline_exceeded")
            late = await server.post(SYSTEM_ONE, {**STATE, "timeout": 0.05})
            assert late.json()["detail"]["error_type"] == "deadline_exceeded"
            gone = server.begin("POST", DECISIONS, ASK)
            await until(lambda: len(server.engine.open_calls) == 1)
            gone.leave()
            await until(server.idle)
            assert len(server.engine.aborted) == 3

    run(main())


CODED = ["gzip", pytest.param("zstd", marks=pytest.mark.skipif(zstd is None, reason="no zstd"))]


@pytest.mark.parametrize("coding", CODED)
def test_compressed_bodies(coding: str, byte_checkpoint: Path) -> None:
    state = {"text": "Take an umbrella. " * 200}
    body = json.dumps({**STATE, "state": state}).encode()
    packed = gzip.compress(body) if coding == "gzip" else bytes(zstd.compress(body))

    async def main() -> None:
        async with deciding(byte_checkpoint, max_body_bytes=len(body)) as server:
            header = {"content-encoding": coding}
            answer = await server.post(SYSTEM_ONE, packed, **header)
            assert answer.status == 200, answer
            assert answer.json() == (await server.post(SYSTEM_ONE, body)).json()
        async with deciding(byte_checkpoint, max_body_bytes=len(body) - 1) as server:
            answer = await server.post(SYSTEM_ONE, packed, **header)
            assert answer.status == 413
            assert answer.json()["detail"]["error_type"] == "body_too_large"

    run(main())


def test_what_the_log_says(byte_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with deciding(byte_checkpoint, log_prompts=True) as server:
            await server.post(DECISIONS, {**ASK, "questions": [RAIN] * 3, "orders": 2})

    with caplog.at_level("INFO", "dllmserve.access"):
        run(main())
    (line,) = [r for r in caplog.records if getattr(r, "route", "") == DECISIONS]
    assert (line.questions, line.completion_tokens) == (3, 6)  # type: ignore[attr-defined]
    assert line.prompt_tokens > 200 and "umbrella" in line.prompts  # type: ignore[attr-defined]
