"""What an answer has to match, under each of its names, becomes a field of SamplingParams."""

import json
from pathlib import Path
from typing import Any

from tests.server.stand_in import run, serving

COMPLETE = "/v1/completions"
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
FRAMES: dict[str, dict[str, Any]] = {COMPLETE: {"prompt": "a"}, CHAT: {"messages": HI}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ANY = {"type": "object"}


def named(**more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", **more}}


ASKED: list[tuple[dict[str, Any], str | None, Any]] = [
    ({"response_format": {"type": "text"}}, None, None),
    ({"response_format": None}, None, None),
    ({"response_format": {"type": "json_object"}}, "json_schema", ANY),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "json_schema", SCHEMA),
    ({"response_format": named(schema=SCHEMA, strict=True)}, "json_schema", SCHEMA),
    ({"response_format": named(schema=SCHEMA, strict=False)}, "json_schema", SCHEMA),
    ({"response_format": named(description="of people")}, "json_schema", ANY),
    ({"json_schema": SCHEMA}, "json_schema", SCHEMA),
    ({"guided_json": SCHEMA}, "json_schema", SCHEMA),
    ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA),
    ({"guided_regex": "a+"}, "regex", "a+"),
    ({"guided_choice": ["yes", "no"]}, "choice", ("yes", "no")),
    ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
    ({"structured_outputs": {"json_object": True}}, "json_schema", ANY),
    ({"structured_outputs": {"json_object": False}}, None, None),
    ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
    ({"structured_outputs": {"choice": ["yes"]}}, "choice", ("yes",)),
    ({"response_format": {"type": "text"}, "regex": "a+"}, "regex", "a+"),
]
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {}}, "response_format", "response_format.type is missing"),
    ({"response_format": "text"}, "response_format", "must be an object, got 'text'"),
    (
        {"response_format": {"type": "xml"}},
        "response_format",
        "response_format.type must be one of 'text', 'json_object', 'json_schema', got 'xml'",
    ),
    (
        {"response_format": {"type": "json_schema", "schema": SCHEMA}},
        "response_format",
        "response_format.json_schema is missing",
    ),
    (
        {"response_format": named(schema="{}")},
        "response_format",
        "response_format.json_schema.schema must be true or false or an object",
    ),
    ({"response_format": named(schema=True)}, "response_format", "response_format"),
    ({"response_format": named(schema={"$ref": "#"})}, "response_format", "response_format"),
    ({"guided_regex": "(?=a)"}, "guided_regex", "guided_regex"),
    ({"guided_json": "{"}, "guided_json", "guided_json is no JSON"),
    ({"guided_json": SCHEMA, "regex": "a"}, "guided_json", "regex and guided_json both say"),
    (
        {"structured_outputs": {"json": SCHEMA, "choice": ["a"]}},
        "structured_outputs",
        "structured_outputs.json and structured_outputs.choice both say",
    ),
    ({"structured_outputs": {"grammar": "x"}}, "structured_outputs", "structured_outputs.grammar"),
    ({"guided_choice": []}, "guided_choice", "must be a list"),
    ({"guided_choice": [""]}, "guided_choice", "guided_choice.0 must be a text"),
]


def test_every_name_for_it(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for path, frame in FRAMES.items():
                await server.post(path, {**frame, "max_tokens": 40})
                plain = server.engine.calls[-1].submit.params
                for given, field, value in ASKED:
                    answer = await server.post(path, {**frame, "max_tokens": 40, **given})
                    assert answer.status == 200, (given, answer.body)
                    params = server.engine.calls[-1].submit.params
                    found = {n: getattr(params, n) for n in ("regex", "json_schema", "choice")}
                    if found["json_schema"] is not None:
                        found["json_schema"] = json.loads(found["json_schema"])
                    wanted = dict.fromkeys(found) | ({} if field is None else {field: value})
                    assert found == wanted, given
                    # the default quality is for requests that say nothing of how they are decoded
                    assert (params.quality, params.unmask) == (plain.quality, plain.unmask)

    run(main())


def test_what_is_refused(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for path, frame in FRAMES.items():
                for given, param, text in REFUSED:
                    answer = await server.post(path, {**frame, **given})
                    assert answer.status == 400, (given, answer.body)
                    assert text in answer.error["message"], (given, answer.error)
                    assert answer.error["param"] == param, (given, answer.error)
            assert server.engine.calls == []

    run(main())


def test_an_answer_that_fills_its_length_is_whole(byte_checkpoint: Path) -> None:
    """JSON under a schema ends by itself, so a client need not fear that it was cut."""

    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for given, reason in (
                ({"response_format": {"type": "json_object"}}, "stop"),
                ({"choice": ["yes"]}, "stop"),
                ({"regex": "a+"}, "length"),
                ({}, "length"),
            ):
                for path, frame in FRAMES.items():
                    body = {**frame, "max_tokens": 4, **given}
                    answer = await server.post(path, body)
                    assert answer.json()["choices"][0]["finish_reason"] == reason
                    events = (await server.post(path, {**body, "stream": True})).events()
                    reasons = [data["choices"][0]["finish_reason"] for _, data in events[:-1]]
                    assert [r for r in reasons if r] == [reason]

    run(main())
