"""No body makes more work than its bytes: every field of every route, with many wrong elements.

The fields are those of /openapi.json, so a new one is tried by itself.
"""

import asyncio
import gc
import json
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dllmserve.server import failures
from dllmserve.server.fields import Body, Entries, Listed
from dllmserve.server.openai_messages import UserMessage
from tests.server.stand_in import Server, make_server, run, serving, until

Place = tuple[str, Callable[[Any], Any]]

#: errors of the validator for one body; each costs some thousand times what a byte does
MOST_ERRORS = 40
MANY = 300
ELEMENTS: list[Any] = [-1, 300, 1.5, None, True, "a", "ab", [], {}, [[]], {"a": 1}, "\ud800"]


def bombs() -> Iterator[Any]:
    """Many wrong elements of every kind, as lists and as members."""
    for element in ELEMENTS:
        yield [element] * MANY
    for element in (1, "a", None, [], "\ud800"):
        yield {f"k{place}": element for place in range(MANY)}
    yield {f"\ud800{place}": "a" for place in range(MANY)}
    yield {str(place): 1 for place in range(2000)}
    yield [{f"k{place}": 1 for place in range(MANY)}] * 3
    yield [[-1] * MANY] * 3


class Walk:
    """The places of a body, and what is right elsewhere.

    Args:
        described: the API.
    """

    def __init__(self, described: Mapping[str, Any]) -> None:
        self._named = described["components"]["schemas"]

    def _read(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        name = schema.get("$ref", "").rpartition("/")[2]
        return self._named[name] if name else schema

    def right(self, schema: Mapping[str, Any]) -> Any:
        """A small value that the schema takes."""
        schema = self._read(schema)
        options = schema.get("anyOf") or schema.get("oneOf")
        if options:
            return self.right(options[0])
        for values in ([schema["const"]] if "const" in schema else [], schema.get("enum", [])):
            if values:
                return values[0]
        kind = schema.get("type")
        if kind == "object":
            fields = schema.get("properties", {})
            return {name: self.right(fields[name]) for name in schema.get("required", ())}
        if kind == "array":
            return [self.right(schema["items"])] if schema.get("minItems") else []
        simple = {"integer": schema.get("minimum", 1), "number": 0.5, "boolean": True}
        return simple.get(str(kind), "a")

    def places(self, schema: Mapping[str, Any], name: str = "", depth: int = 0) -> Iterator[Place]:
        """Every place of a value: its name, and the whole value with something else there."""
        schema = self._read(schema)
        yield name, lambda given: given
        if depth == 8:
            return
        for option in schema.get("anyOf") or schema.get("oneOf") or ():
            # the place itself was there
            yield from list(self.places(option, name, depth))[1:]
        fields = schema.get("properties")
        if fields is not None:
            frame = self.right(schema)
            for key, inside in {**fields, "unknown": {}}.items():
                for path, put in self.places(inside, f"{name}.{key}", depth + 1):
                    yield path, lambda given, key=key, put=put: {**frame, key: put(given)}
        elif isinstance(schema.get("additionalProperties"), dict):
            values = schema["additionalProperties"]
            for path, put in self.places(values, f"{name}.*", depth + 1):
                yield path, lambda given, put=put: {"a": put(given)}
        if schema.get("type") == "array":
            for path, put in self.places(schema["items"], f"{name}.0", depth + 1):
                yield path, lambda given, put=put: [put(given)]


def bodies(described: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every path that takes a body, with its schema."""
    for path, methods in described["paths"].items():
        for operation in methods.values():
            if "requestBody" in operation:
                yield path, operation["requestBody"]["content"]["application/json"]["schema"]


def test_the_walk_finds_what_is_known(byte_checkpoint: Path) -> None:
    app, _ = make_server(byte_checkpoint)
    described = app.openapi()
    found = {
        f"{path}{place}"
        for path, schema in bodies(described)
        for place, _ in Walk(described).places(schema)
    }
    for known in (
        "/v1/chat/completions.messages.0.tool_calls.0.function.arguments",
        "/v1/chat/completions.messages.0.content.0.text",
        "/v1/chat/completions.tools.0",
        "/v1/chat/completions.stream_options.include_usage",
        "/v1/completions.prompt.0.0",
        "/v1/completions.logit_bias",
        "/v1/completions.metadata.*",
        "/v1/generate.sparse.score",
        "/v1/generate_batch.prompts.0.0",
        "/v1/generate/stream.unknown",
        "/v1/infill.template.0.choice.0",
        "/infill.input_extra.0.text",
        "/v1/decisions.questions.0",
        "/v1/systemone.questions.*.criteria.*",
    ):
        assert known in found
    assert len(found) > 300


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many errors each refused body had."""
    counts: list[int] = []

    def counting(told: Callable[..., Any]) -> Callable[..., Any]:
        def tell(details: Any, *more: Any) -> Any:
            counts.append(len(details))
            return told(details, *more)

        return tell

    with monkeypatch.context() as patch:
        for name in ("explain", "_listed"):  # in words, and as a list
            patch.setattr(failures, name, counting(getattr(failures, name)))
        yield counts


def test_every_field_of_every_route(byte_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = [json.dumps(bomb).encode() for bomb in bombs()]

    async def main() -> None:
        sent, seen = 0, set()
        async with serving(byte_checkpoint) as server:
            described = (await server.get("/openapi.json")).json()
            for path, schema in bodies(described):
                for name, put in Walk(described).places(schema):
                    frame = json.dumps(put("@")).encode()
                    if (frame, str(schema)) in seen:
                        continue  # another route, or another message, of the same body
                    seen.add((frame, str(schema)))
                    before, _, after = frame.partition(b'"@"')
                    # each field gets one bomb in two, and the next field the others
                    for bomb in raw[sent % 2 :: 2]:
                        del counts[:]
                        answer = await server.post(path, before + bomb + after)
                        what = (path, name, bomb[:40], answer)
                        assert answer.status in (200, 400, 404, 422), what
                        assert sum(counts) <= MOST_ERRORS, what
                        sent += 1
        assert sent > 1500

    with counted(monkeypatch) as counts:
        run(main())


def test_what_the_types_are_for() -> None:
    """A field that is made of plain lists or dicts would be found by the test above."""

    class Plain(Body):
        numbers: list[int] | None = None
        names: dict[str, int] | None = None

    class Bounded(Body):
        numbers: Listed[int] | None = None
        names: Entries[int] | None = None

    for wrong in ({"numbers": ["a"] * MANY}, {"names": {f"k{i}": "a" for i in range(MANY)}}):
        with pytest.raises(ValidationError) as caught:
            Plain.model_validate(wrong)
        assert caught.value.error_count() == MANY > MOST_ERRORS
        with pytest.raises(ValidationError) as caught:
            Bounded.model_validate(wrong)
        assert caught.value.error_count() < 10


def test_dicts_are_validated_to_their_end() -> None:
    class Bounded(Body):
        names: Entries[int]

    right = {f"k{place}": place for place in range(MANY)}
    made = Bounded.model_validate({"names": right}).names
    assert list(made.items()) == list(right.items())
    for place in (0, 7, 8, MANY - 1):
        with pytest.raises(ValidationError) as caught:
            Bounded.model_validate({"names": {**right, f"k{place}": "a"}})
        assert [error["loc"][-1] for error in caught.value.errors()] == [f"k{place}"]


def test_an_unknown_field_is_found_behind_many() -> None:
    """Members that say nothing are let through; they hide none that says something."""
    said = {"role": "user", "content": "Hi"}
    nothing: dict[str, Any] = {f"k{place}": [None, "", {}][place % 3] for place in range(MANY)}
    assert UserMessage.model_validate({**nothing, **said}).content == "Hi"
    for last in ({**said, **nothing, "x": 1}, {"x": 1, **nothing, **said}):
        with pytest.raises(ValidationError) as caught:
            UserMessage.model_validate(last)
        assert [error["loc"] for error in caught.value.errors()] == [("x",)]
    # known fields are read, however many unknown ones are before them
    with pytest.raises(ValidationError) as caught:
        UserMessage.model_validate({**{f"k{i}": 1 for i in range(MANY)}, **said, "content": 5})
    kinds = {error["type"] for error in caught.value.errors()}
    assert "extra_forbidden" in kinds and len(kinds) > 1


def test_every_route_with_a_body_reads_it_strictly(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            described = (await server.get("/openapi.json")).json()
            paths = [path for path, _ in bodies(described)]
            assert len(paths) >= 5
            for path in paths:
                answer = await server.post(path, b'{"model": "a", "model": "a"}')
                assert answer.status == 400, path
                if path == "/v1/systemone":
                    assert answer.json()["detail"]["error_type"] == "invalid_json"
                    continue
                assert (answer.error["code"], answer.error["param"]) == ("invalid_json", "model")

    run(main())


#: bytes of large bodies
LARGE_SIZE = 1 << 19
#: for many small values, up to the limit of their number
SLACK = 2 << 20
LARGE: dict[str, Any] = {
    **{f"many {json.dumps(e)}": [e] * ((LARGE_SIZE) // (len(json.dumps(e)) + 1)) for e in ELEMENTS},
    "members": {f"{place:x}": 1 for place in range(16_000)},
    "long": "a" * (LARGE_SIZE),
    "long key": {"k" * (LARGE_SIZE): 1},
}


def test_memory_is_bounded_and_given_back(byte_checkpoint: Path) -> None:
    """Without the collector's help: a circle of an error and its frames would keep the body."""

    async def main() -> None:
        # so many prompts, that numbers are refused for what they are and not for how many
        async with serving(byte_checkpoint, max_prompts=1024) as server:
            gc.collect()
            gc.disable()
            tracemalloc.start()  # here, because making a server takes long under it
            for kind, value in LARGE.items():
                large = json.dumps(value, separators=(",", ":")).encode()
                for path in ("/v1/completions", "/v1/generate"):
                    for field in ("prompt", "stop", "logit_bias", "metadata", "unknown"):
                        await bounded(server, path, field, large, kind)

    try:
        run(main())
    finally:
        tracemalloc.stop()
        gc.enable()


async def bounded(server: Server, path: str, field: str, large: bytes, kind: str) -> None:
    """Memory while one body is refused, and afterwards."""
    body = json.dumps({"prompt": "a", field: "@"}).encode().replace(b'"@"', large)
    await refused(server, path, b"[1,2,3,4,5,6]")  # for what is made once
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    await refused(server, path, body)
    now, peak = tracemalloc.get_traced_memory()
    assert peak - before < 10 * len(body) + SLACK, (kind, path, field)
    assert now - before < len(body) // 2, (kind, path, field)


async def refused(server: Server, path: str, body: bytes) -> None:
    answer = await server.post(path, body)
    assert answer.status == 400, answer
    await asyncio.sleep(0)


UNREAD = {
    "/v1/completions": {"prompt": "a", "user": "@", "metadata": {"a": "@"}},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "a"}],
        "verbosity": "@",
        "tools": [{"type": "function", "function": {"name": "f", "description": "@"}}],
        "tool_choice": "none",
    },
}


@pytest.mark.parametrize("path", UNREAD)
def test_a_request_that_runs_keeps_nothing_of_what_is_not_read(
    path: str, byte_checkpoint: Path
) -> None:
    large = "x" * LARGE_SIZE
    body = json.dumps(UNREAD[path]).replace("@", large).encode()

    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            assert (await server.post(path, body)).status == 200  # for what is made once
            server.engine.hold = True
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            asked = server.begin("POST", path, bytes(body[:1]) + body[1:])
            await until(lambda: bool(server.service.runs))
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] - before < LARGE_SIZE // 2
            asked.leave()
            await until(server.idle)

    tracemalloc.start()
    try:
        run(main())
    finally:
        tracemalloc.stop()
