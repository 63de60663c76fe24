"""Tools: what the model is told, what its answer has to match, and how calls are told."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from dllmserve.engine.tokenizer import Tokenizer
from dllmserve.engine.tool_form import OWN, ToolForm
from dllmserve.server.tool_calls import CallReader
from dllmserve.server.tools import without
from tests.server.stand_in import Server, run, serving

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


ADD, NOW = tool("add", parameters=PARAMETERS, description="Adds."), tool("now")
BOTH = [ADD, NOW]
ONLY_ADD = {"type": "function", "function": {"name": "add"}}


def some(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def parts(name: str, schema: dict[str, Any]) -> list[Any]:
    head, tail = f'<tool_call>\n{{"name": "{name}", "arguments": ', "}\n</tool_call>"
    return [head, {"schema": schema}, tail]


P_ADD, P_NOW = parts("add", PARAMETERS), parts("now", NOTHING)
TEXT = {"regex": without(OWN.before)}
ONE = {"anyOf": [P_ADD, P_NOW]}
MANY = {"repeat": [ONE], "between": "\n"}
SCHEMA = {"type": "object"}
JSON = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}

CONSTRAINTS: list[tuple[dict[str, Any], list[Any] | None]] = [
    ({}, [{"anyOf": [[TEXT], [TEXT, MANY]]}]),
    ({"tool_choice": "auto"}, [{"anyOf": [[TEXT], [TEXT, MANY]]}]),
    ({"parallel_tool_calls": False}, [{"anyOf": [[TEXT], [TEXT, ONE]]}]),
    ({"tool_choice": "required"}, [MANY]),
    ({"tool_choice": "required", "parallel_tool_calls": False}, [ONE]),
    ({"tool_choice": ONLY_ADD}, [{"anyOf": [P_ADD]}]),
    (
        {"tool_choice": some("auto", "now")},
        [{"anyOf": [[TEXT], [TEXT, {"repeat": [{"anyOf": [P_NOW]}], "between": "\n"}]]}],
    ),
    ({"tool_choice": some("required", "now", "add")}, [MANY]),
    ({"response_format": JSON}, [{"anyOf": [[{"schema": SCHEMA}], [MANY]]}]),
    ({"regex": "a+"}, [{"anyOf": [[{"regex": "a+"}], [MANY]]}]),
    ({"choice": ["x", "y"]}, [{"anyOf": [[{"anyOf": [["x"], ["y"]]}], [MANY]]}]),
    ({"response_format": JSON, "tool_choice": "required"}, [MANY]),
    ({"tool_choice": "none"}, None),
]


def tools_server(byte_checkpoint: Path, **options: Any) -> Any:
    return serving(byte_checkpoint, max_len=8192, **options)


def test_what_an_answer_has_to_match(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with tools_server(byte_checkpoint) as server:
            for given, wanted in CONSTRAINTS:
                body = {"messages": HI, "tools": BOTH, "max_tokens": 99, **given}
                answer = await server.post(CHAT, body)
                assert answer.status == 200, (given, answer.body)
                schema = server.engine.calls[-1].submit.params.json_schema
                found = None if schema is None else json.loads(schema)["x-dllmserve-sequence"]
                assert found == wanted, given
            older = {"functions": [t["function"] for t in BOTH], "messages": HI, "max_tokens": 99}
            for given, wanted in (
                ({}, [{"anyOf": [[TEXT], [TEXT, ONE]]}]),
                ({"function_call": {"name": "add"}}, [{"anyOf": [P_ADD]}]),
                ({"function_call": "none"}, None),
            ):
                answer = await server.post(CHAT, {**older, **given})
                assert answer.status == 200, (given, answer.body)
                schema = server.engine.calls[-1].submit.params.json_schema
                found = None if schema is None else json.loads(schema)["x-dllmserve-sequence"]
                assert found == wanted, given

    run(main())


def test_what_the_model_is_told(byte_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []

    def encode(self: Tokenizer, messages: Any, *, tools: Any = None, **_: Any) -> list[int]:
        read.append(tools)
        return [1]

    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            monkeypatch.setattr(Tokenizer, "chat_ids", encode)
            told = [ADD, tool("now", parameters=NOTHING)]
            marked = [{**ADD, "cache_control": {"type": "ephemeral"}}, NOW]
            strict = [tool(**ADD["function"], strict=True), NOW]
            for given, wanted in (
                ({"tools": BOTH}, told),
                ({"tools": marked}, told),
                ({"tools": strict}, told),
                # all of them are shown, as those of earlier turns are
                ({"tools": BOTH, "tool_choice": some("auto", "now")}, told),
                ({"functions": [t["function"] for t in BOTH]}, told),
                ({"tools": BOTH, "tool_choice": "none"}, None),
                ({}, None),
            ):
                await server.post(CHAT, {"messages": HI, "max_tokens": 1, **given})
                assert read.pop() == wanted, given

    run(main())


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools", "has type 'custom'"),
    ({"tools": [tool("a b")]}, "tools", "tools.0.function.name must be a name of 1 to 128"),
    ({"tools": [tool("")]}, "tools", "tools.0.function.name must be a name of 1 to 128"),
    ({"tools": [ADD, ADD]}, "tools", "two entries of one name"),
    ({"tools": [{"type": "function"}]}, "tools", "tools.0.function is missing"),
    (
        {"tools": [tool("f", parameters={"type": "string"})]},
        "tools",
        "must be a schema of an object",
    ),
    ({"tools": [tool("f", parameters={"$ref": "#"})]}, "tools", "tools"),
    ({"tools": BOTH, "tool_choice": "any"}, "tool_choice", "tool_choice must be"),
    ({"tools": BOTH, "tool_choice": {"type": "function"}}, "tool_choice", "tool_choice"),
    ({"tools": BOTH, "tool_choice": some("auto", "sub")}, "tool_choice", "'sub'"),
    (
        {"tools": BOTH, "tool_choice": {"type": "function", "function": {"name": "sub"}}},
        "tool_choice",
        "tool_choice names 'sub', which is not in tools",
    ),
    ({"tool_choice": "required"}, "tool_choice", "asks for a call, but there are no tools"),
    ({"tools": [], "tool_choice": ONLY_ADD}, "tool_choice", "there are no tools"),
    ({"tools": BOTH, "functions": []}, "functions", "older name"),
    ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call", "'g'"),
    ({"functions": [ADD]}, "functions", "functions.0"),
    ({"tools": BOTH, "stop": "x"}, "stop", "stop may cut a call of one of the tools"),
    ({"tools": [tool("x" * 70, description="y" * 140_000)]}, "tools", "tools has 14"),
]


def test_what_is_refused(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with tools_server(byte_checkpoint) as server:
            for given, param, text in REFUSED:
                answer = await server.post(CHAT, {"messages": HI, **given})
                assert answer.status == 400, (given, answer.body)
                assert text in answer.error["message"], (given, answer.error)
                assert answer.error["param"] == param, (given, answer.error)
            assert server.engine.calls == []

    run(main())


#: texts of a model, and the message that they are
ANSWERS: list[tuple[str, str | None, list[tuple[str, str]]]] = [
    ("Hello.", "Hello.", []),
    ("", "", []),
    ("a < b <tool_call> is a mark", "a < b <tool_call> is a mark", []),
    (call("add", '{"a": 5}'), None, [("add", '{"a": 5}')]),
    (call("now", "{}"), None, [("now", "{}")]),
    (
        call("add", '{"a": "}\\"{"}') + "\n" + call("now", "{}"),
        None,
        [("add", '{"a": "}\\"{"}'), ("now", "{}")],
    ),
    ("Hm.\n" + call("add", '{"a": {"b": [1, {}]}}'), "Hm.\n", [("add", '{"a": {"b": [1, {}]}}')]),
    # no tool that is there
    (call("sub", "{}"), call("sub", "{}"), []),
    # of an engine that was cut off
    ('<tool_call>\n{"name": "add", "arguments": {"a"', None, [("add", '{"a"')]),
    ('<tool_call>\n{"name": "ad', '<tool_call>\n{"name": "ad', []),
    (call("add", "{}") + "\nand so on", "\nand so on", [("add", "{}")]),
]


async def whole(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    answer = await server.post(CHAT, body)
    assert answer.status == 200, answer.body
    (choice,) = answer.json()["choices"]
    return dict(choice)


async def streamed(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    """The choice that the pieces of a stream make."""
    events = (await server.post(CHAT, {**body, "stream": True})).events()
    assert events.pop() == ("", "[DONE]")
    choice: dict[str, Any] = {"message": {"role": None, "content": None, "tool_calls": []}}
    message = choice["message"]
    for _, data in events:
        (piece,) = data["choices"]
        choice["finish_reason"] = piece["finish_reason"]
        delta = piece["delta"]
        message["role"] = delta.get("role", message["role"])
        if delta.get("content") is not None:
            message["content"] = (message["content"] or "") + delta["content"]
        for part in delta.get("tool_calls", ()):
            if part["index"] == len(message["tool_calls"]):
                assert set(part) == {"index", "id", "type", "function"}
                assert part["function"]["arguments"] == ""
                message["tool_calls"].append({**part, "function": {**part["function"]}})
            else:
                assert set(part) == {"index", "function"} and set(part["function"]) == {"arguments"}
                known = message["tool_calls"][part["index"]]["function"]
                known["arguments"] += part["function"]["arguments"]
    assert choice["finish_reason"] is not None
    return choice


def test_answers(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with tools_server(byte_checkpoint) as server:
            body = {"messages": HI, "tools": BOTH, "max_tokens": 999}
            for text, content, calls in ANSWERS:
                server.engine.answer = iter([text, text])
                for choice in (await whole(server, body), await streamed(server, body)):
                    message = choice["message"]
                    said = message["content"] or (None if calls else "")
                    assert said == content, (text, message)
                    found = message.get("tool_calls") or []
                    made = [(c["function"]["name"], c["function"]["arguments"]) for c in found]
                    assert made == calls, text
                    assert all(re.fullmatch("call_[0-9a-f]{24}", c["id"]) for c in found)
                    assert len({c["id"] for c in found}) == len(found)
                    reason = "tool_calls" if calls else "stop"
                    assert choice["finish_reason"] == reason
                    if not calls:
                        assert not found

    run(main())


def test_the_shape_of_an_answer(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with tools_server(byte_checkpoint) as server:
            server.engine.answer = iter([call("add", '{"a": 1}')] * 2)
            body = {"messages": HI, "tools": BOTH, "tool_choice": "required"}
            answer = (await server.post(CHAT, body)).json()
            ChatCompletion.model_validate(answer, strict=True)
            message = answer["choices"][0]["message"]
            (made,) = message.pop("tool_calls")
            assert message == {"role": "assistant", "content": None, "refusal": None}
            assert made["type"] == "function"
            assert made["function"] == {"name": "add", "arguments": '{"a": 1}'}
            # the answer is taken back as it was given
            turns = [*HI, answer["choices"][0]["message"] | {"tool_calls": [made]}]
            turns.append({"role": "tool", "tool_call_id": made["id"], "content": "2"})
            assert (await server.post(CHAT, {**body, "messages": turns})).status == 200

    run(main())


def test_the_older_form(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with tools_server(byte_checkpoint) as server:
            server.engine.answer = iter([call("add", '{"a": 1}')] * 2)
            body: dict[str, Any] = {"messages": HI, "functions": [t["function"] for t in BOTH]}
            choice = await whole(server, body)
            assert choice["finish_reason"] == "function_call"
            assert choice["message"]["function_call"] == {"name": "add", "arguments": '{"a": 1}'}
            assert "tool_calls" not in choice["message"]
            events = (await server.post(CHAT, {**body, "stream": True})).events()
            deltas = [data["choices"][0]["delta"] for _, data in events[:-1]]
            found = [d["function_call"] for d in deltas if "function_call" in d]
            assert found[0] == {"name": "add", "arguments": ""}
            assert "".join(f["arguments"] for f in found) == '{"a": 1}'

    run(main())


@pytest.mark.parametrize("form", [OWN, ToolForm('[CALL] {"f": ', ', "x": ', "}", ", ")])
def test_pieces_do_not_depend_on_where_the_text_is_cut(form: ToolForm) -> None:
    draw = random.Random(3)
    calls = [form.call("add", '{"a": "}\\\\"}'), form.call("addition", "{}")]
    marks = [form.before, form.head("add"), form.after, "<", "[", "{", "\n", "x"]

    def read(texts: Sequence[str]) -> list[tuple[str, str, int]]:
        reader, joined = CallReader(form, {"add", "addition"}), list[Any]()
        pieces = [piece for text in texts for piece in reader.add(text)] + reader.finish()
        for piece in pieces:
            assert piece.text
            if joined and piece.kind != "call" and joined[-1][::2] == (piece.kind, piece.call):
                joined[-1] = (piece.kind, joined[-1][1] + piece.text, piece.call)
            else:
                joined.append((piece.kind, piece.text, piece.call))
        return joined

    for _ in range(400):
        kept = [draw.choice([*calls, *(m[: draw.randint(1, len(m))] for m in marks)])]
        kept += draw.choices([*calls, *calls, *marks, form.separator], k=draw.randrange(4))
        text = "".join(kept)
        cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randrange(8)))
        ends = zip([0, *cuts], [*cuts, len(text)], strict=True)
        assert read([text[a:b] for a, b in ends]) == read([text]) == read(list(text)), text


def test_texts_without_a_mark() -> None:
    draw = random.Random(5)
    for mark in ("<a", "<ab>", OWN.before, '{"name": ', "[C] ", "^x-y", "]\\"):
        matched = re.compile(without(mark))
        pieces = [mark, mark[0], *(mark[:n] for n in range(1, len(mark))), "x", mark[-1]]
        for _ in range(500):
            text = "".join(draw.choices(pieces, k=draw.randrange(7)))
            assert bool(matched.fullmatch(text)) == (mark not in text), (mark, text)
