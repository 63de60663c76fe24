"""Errors of requests are in our words: the place, what it takes, what was given."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from dllmserve.server.infill import InfillRequest
from dllmserve.server.llama_cpp import LlamaInfillRequest
from dllmserve.server.native import BatchRequest, GenerateRequest
from dllmserve.server.openai_bodies import ChatRequest, CompletionRequest
from tests.server.stand_in import run, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ONE, SEVERAL, WATCH = "/v1/generate", "/v1/generate_batch", "/v1/generate/stream"
HI = {"role": "user", "content": "Hi"}
FRAMES: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    CHAT: (ChatRequest, {"messages": [HI]}),
    TEXT: (CompletionRequest, {"prompt": "a"}),
    ONE: (GenerateRequest, {"prompt": "a"}),
    SEVERAL: (BatchRequest, {"prompts": ["a"]}),
    "/v1/infill": (InfillRequest, {"template": ["a", {"hole": 2}]}),
    "/infill": (LlamaInfillRequest, {"input_prefix": "a", "input_suffix": "b", "n_predict": 2}),
}
#: of every type, and at the edges of it; null is "not given"
VALUES: list[Any] = [
    *(True, 0, -1, 1.5, 1e300, 10**30, "x", "", "\ud800", "x" * 5000),
    *([], [None], [[]], [{}], ["x", 1], [1.5], ["x"] * 2000, {}, {"a": {}}, {"1": 10**6}),
]
#: what pydantic would say
PYDANTIC = re.compile(
    r"Input should|Input is|[Ff]ield required|valid (string|integer|number|list|dictionary|boolean)"
    r"|after validation|Extra inputs|Value error|pydantic|\bDict|\bstr\b|\bint\b|\bNone\b|tag\b"
    r"|List should|String should|unable to parse|union|x-t"
)


def judged(text: str, what: object) -> None:
    """One voice, and of bounded length."""
    assert not PYDANTIC.search(text), (what, text)
    assert 10 < len(text) < 1200, (what, text)
    assert "something else" not in text, (what, text)


@pytest.mark.parametrize("path", FRAMES)
def test_every_field_with_every_kind_of_value(path: str, byte_checkpoint: Path) -> None:
    kind, frame = FRAMES[path]

    async def main() -> None:
        refused = 0
        async with serving(byte_checkpoint) as server:
            for name in kind.model_fields:
                for value in VALUES:
                    given = {**frame, name: value}
                    answer = await server.post(path, given)
                    if answer.status == 200:
                        continue
                    what = (name, repr(value)[:60])
                    assert answer.status in (400, 404), (what, answer)
                    judged(answer.error["message"], what)
                    refused += 1
                    if answer.error["code"] == "invalid_parameter" and "_" not in name:
                        assert answer.error["message"].startswith(name), what
                        assert answer.error["param"] == name, what
        assert refused > 5 * len(kind.model_fields)

    run(main())


def nested() -> Iterator[dict[str, Any]]:
    """Messages, parts and calls with one wrong place each."""
    said = {"role": "assistant", "content": "x"}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    keys = ("role", "content", "name", "type", "tool_calls", "function_call", "reasoning", "more")
    for value in VALUES:
        yield {"messages": [value]}
        for key in keys:
            yield {"messages": [{**HI, key: value}]}
            yield {"messages": [{**said, key: value}]}
        for key in ("content", "tool_call_id"):
            yield {"messages": [{"role": "tool", "tool_call_id": "c", "content": "x", key: value}]}
        for key in ("type", "text", "more"):
            part = {"type": "text", "text": "x", key: value}
            yield {"messages": [{"role": "user", "content": [part]}]}
        for key in ("id", "type", "function", "more"):
            yield {"messages": [{**said, "tool_calls": [{**call, key: value}]}]}
        for key in ("name", "arguments", "more"):
            wrong = {**call, "function": {"name": "f", key: value}}
            yield {"messages": [{**said, "tool_calls": [wrong]}]}
        for key in ("enabled", "retention_ratio", "score", "more"):
            yield {"messages": [HI], "sparse": {key: value}}
        yield {"messages": [HI], "stream": True, "stream_options": {"include_usage": value}}


def test_places_inside(byte_checkpoint: Path) -> None:
    async def main() -> None:
        refused = 0
        async with serving(byte_checkpoint) as server:
            for body in nested():
                answer = await server.post(CHAT, {**body, "max_tokens": 1})
                if answer.status != 200:
                    assert answer.status == 400, (body, answer)
                    judged(answer.error["message"], body)
                    assert answer.error["param"] in {**body, **body.get("sparse", {})}
                    refused += 1
        assert refused > 300

    run(main())


STOP = "a text of 1 to 256 characters"
STOPS = f"{STOP} or a list of at most 16 entries (each {STOP})"
#: path, body, the whole text
TEXTS: list[tuple[str, Any, str]] = [
    (CHAT, {}, "messages is missing: it must be a list of 1 to 1024 entries (each an object)"),
    (TEXT, {"prompt": "a", "max_tokens": 0}, "max_tokens must be an integer in [1, 8192], got 0"),
    (
        TEXT,
        {"prompt": "a", "max_tokens": "5"},
        "max_tokens must be an integer in [1, 8192], got '5'",
    ),
    (TEXT, {"prompt": "a", "top_p": 0}, "top_p must be a number in (0, 1], got 0"),
    (TEXT, {"prompt": "a", "temperature": True}, "temperature must be a number >= 0, got true"),
    (TEXT, {"prompt": "a", "echo": "yes"}, "echo must be true or false, got 'yes'"),
    # one sentence for what takes this or that
    (TEXT, {"prompt": "a", "stop": 5}, f"stop must be {STOPS}, got 5"),
    (TEXT, {"prompt": "a", "stop": ["a"] * 17}, f"stop must be {STOPS}, got a list of 17 entries"),
    (
        TEXT,
        {"prompt": "a", "stop": ["a", 5]},
        "stop.1 must be a text of 1 to 256 characters, got 5",
    ),
    (TEXT, {"prompt": "a", "stop": "\ud800"}, "stop holds a lone surrogate, which is no character"),
    (
        TEXT,
        {"prompt": 5},
        "prompt must be a text, token ids, or a list of texts or of token ids, and nothing empty, "
        "got 5",
    ),
    # the one that was meant is the one with less wrong
    (TEXT, {"prompt": [1, -2]}, "prompt.1 must be an integer in [0, 2147483647], got -2"),
    (
        TEXT,
        {"prompt": ["a", "b", 2.5]},
        "prompt.2 must be a text that is not empty or a list of token ids that is not empty, got "
        "2.5",
    ),
    (TEXT, {"prompt": ["a", "b", 2.5, None]}, "prompt.2 must be a text that is not empty or a "),
    (TEXT, {"prompt": [[1], [-2]]}, "prompt.1.0 must be an integer in [0, 2147483647], got -2"),
    (TEXT, {"prompt": "a", "xyzzy": 1}, "xyzzy is not a parameter of this endpoint"),
    (TEXT, {"prompt": "a", "unmask": 5}, "unmask must be one of "),
    (TEXT, {"prompt": "a", "unmask": "x"}, "unmask must be one of "),
    (
        TEXT,
        {"prompt": "a", "logit_bias": {"five": 1}},
        "logit_bias has the key 'five', and its keys must be token ids, as texts",
    ),
    (
        TEXT,
        {"prompt": "a", "logit_bias": {"5": 101}},
        "logit_bias.5 must be a number in [-100, 100], got 101",
    ),
    (
        TEXT,
        {"prompt": "a", "logit_bias": {str(token): 0 for token in range(1025)}},
        "logit_bias must be an object of at most 1024 entries, got an object",
    ),
    (
        TEXT,
        {"prompt": "a", "frequency_penalty": 1},
        "frequency_penalty is not supported by this server; leave it out, or give 0",
    ),
    (TEXT, {"prompt": "a", "sparse": 5}, "sparse must be true or false or an object, got 5"),
    (
        TEXT,
        {"prompt": "a", "sparse": {"score": 1, "pool_kernel": 0}},
        "sparse.pool_kernel must be an integer in [1, 1024], got 0; sparse.score must be one of ",
    ),
    (
        CHAT,
        {"messages": [{"role": "critic", "content": "x"}]},
        "messages.0.role must be one of 'developer', 'system', 'user', 'assistant', 'tool', "
        "'function', got 'critic'",
    ),
    (CHAT, {"messages": [{"content": "x"}]}, "messages.0.role is missing: it must be one of "),
    (
        CHAT,
        {"messages": [HI, {"role": "user", "content": None}]},
        "messages.1.content must be a text or a list of 1 to 1024 entries (each an object), got "
        "null",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.0 has type 'image_url': models here read text only, so each part "
        "must have type 'text'",
    ),
    (
        CHAT,
        {"messages": [{"role": "tool", "content": "x"}]},
        "messages.0.tool_call_id is missing: it must be a text",
    ),
    (CHAT, {"messages": [HI], "metadata": {"a": 1}}, "metadata.a must be a text, got 1"),
    (CHAT, {"messages": [HI], "a": 1, "b": 1}, "a is not a parameter of this endpoint; b is not "),
    (
        CHAT,
        {"messages": [HI], **{f"p{i}": 1 for i in range(9)}},
        "; ".join(f"p{i} is not a parameter of this endpoint" for i in range(5)) + "; and more",
    ),
    (
        ONE,
        {"prompt": "a", "prompts": ["a"]},
        "prompts is not a parameter of this endpoint, but of /v1/generate_batch",
    ),
    (
        WATCH,
        {"prompt": "a", "stream": True},
        "stream is not a parameter of this endpoint, but of /v1/completions, /v1/chat/completions, "
        "/v1/responses, /infill",
    ),
    (
        TEXT,
        {"prompt": "a", "max_completion_tokens": 4},
        "max_completion_tokens is not a parameter of this endpoint, but of /v1/chat/completions; "
        "did you mean gen_length?",
    ),
    # a field that takes nothing but what changes nothing is no way out
    (
        ONE,
        {"prompt": "a", "min_p": 0.1},
        "min_p is not a parameter of this endpoint; not offered, because top_p and top_k are ",
    ),
    (
        SEVERAL,
        {"prompts": ["a"] * 2000},
        "prompts must be a list of 1 to 128 entries (each a text that is not empty or a list of "
        "token ids that is not empty), got a list of 2000 entries",
    ),
    (SEVERAL, {"prompts": ["a"] * 129}, "prompts has 129 entries, over max_prompts=128: send "),
    (ONE, {"prompt": "a", "timeout": 0}, "timeout must be a number in (0, 86400], got 0"),
    (SEVERAL, {"prompts": ["a", 5]}, "prompts.1 must be a text that is not empty or a list of "),
    (CHAT, b"null", "The body must be a JSON object, got null"),
    (CHAT, b"[1]", "The body must be a JSON object, got a list of 1 entry"),
    (CHAT, b"", "The body is missing: it must be a JSON object"),
    (CHAT, b'{"a": }', "The body is not valid JSON, from character 7 on."),
    (
        CHAT,
        b"[" * 100_000,
        "The body is nested too deeply: lists and objects may be 100 deep.",
    ),
    (
        CHAT,
        {"messages": [HI], "metadata": {"a": [[]] * 40_000}},
        "The body holds 40012 texts, lists, objects and other values that are no whole numbers, "
        "over the limit of 32768: split the request into smaller ones.",
    ),
    (TEXT, b'{"prompt": "a", "prompt": "b"}', "The body has 'prompt' twice in one object: give "),
    (TEXT, b'{"prompt": NaN}', "The body is not valid JSON: it has NaN, which is no number there."),
    (CHAT, b'{"n": ' + b"1" * 5000 + b"}", "The body has a number of too many digits."),
]


@pytest.mark.parametrize(("path", "body", "text"), TEXTS)
def test_texts(path: str, body: Any, text: str, byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            answer = await server.post(path, body)
            assert answer.status == 400
            found = answer.error["message"]
            assert found.startswith(text) if text.endswith((" ", "not ")) else found == text

    run(main())


@pytest.mark.parametrize("path", [CHAT, TEXT, ONE, SEVERAL, WATCH])
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16-le", "gb18030", "utf-8"])
def test_bodies_in_other_encodings(path: str, encoding: str, byte_checkpoint: Path) -> None:
    """JSON is UTF-8; of what is none the first such byte is named."""
    frame = {CHAT: {"messages": [{**HI, "content": "café"}]}, SEVERAL: {"prompts": ["café"]}}
    text = json.dumps(frame.get(path, {"prompt": "café"}), ensure_ascii=False)
    body = text.encode(encoding)
    if encoding == "utf-8":
        body = body[: body.index("é".encode()) + 1] + b'"}'  # cut inside a character

    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            answer = await server.post(path, body)
            assert (answer.status, answer.error["code"]) == (400, "invalid_json"), answer
            place = len(text[: text.index("é")].encode(encoding))
            found = answer.error["message"]
            assert "UTF-8" in found and f"byte {place} (0x" in found, found

    run(main())


def test_parameters_of_a_query_and_a_path(byte_checkpoint: Path) -> None:
    cases = {
        "/v1/result/abc": "request_id must be an integer in [0, 9007199254740991], got 'abc'",
        "/v1/result/1?wait=99": "wait must be a number in [0, 60], got '99'",
        "/v1/result/1?details=x": "details must be one of 'true', 'false', got 'x'",
    }

    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for target, text in cases.items():
                answer = await server.get(target)
                assert (answer.status, answer.error["message"]) == (400, text)
                assert answer.error["param"] == text.split()[0]

    run(main())


def test_unknown_parameters_of_a_query(byte_checkpoint: Path) -> None:
    """They are refused, as unknown fields of a body are; a misspelt one would be lost."""
    several = "wait and details"

    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            await server.post(ONE, {"prompt": "a"})
            for query in ("foo=1", "wait=1&detail=true", "WAIT=1", "details=true&wait%20=1"):
                answer = await server.get(f"/v1/result/0?{query}")
                assert answer.status == 400, query
                assert answer.error["code"] == "invalid_parameter"
                text = f" is not a parameter of this endpoint's query; that takes {several}"
                assert answer.error["message"] == answer.error["param"] + text
            assert (await server.get("/v1/result/0?wait=1&details=true")).status == 200
            # what clients put into the queries of endpoints that have none
            answer = await server.post(f"{TEXT}?api-version=2026-01-01", {"prompt": "a"})
            assert answer.status == 200
            assert (await server.get("/v1/health?probe=1")).status == 200  # probes may add theirs

    run(main())


def test_the_name_of_a_model(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, served_model_name="it") as server:
            for name, part in (("", "model is empty"), ("a\nb", "there is no model 'a\\nb'")):
                answer = await server.post(TEXT, {"prompt": "a", "model": name})
                assert (answer.status, answer.error["param"]) == (404, "model")
                assert part in answer.error["message"] and "'it'" in answer.error["message"]

    run(main())
