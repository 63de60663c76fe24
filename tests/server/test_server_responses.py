"""/v1/responses: what a request becomes, what is answered, and what is kept."""

import asyncio
import json
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from openai import AsyncOpenAI, NotFoundError
from openai.types.responses import Response as Told
from openai.types.responses import ResponseStreamEvent

from dllmserve.engine.tokenizer import Tokenizer
from dllmserve.errors import EngineError
from tests.server.stand_in import KEYS, Server, run, secret, serving, until

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": True}
SCHEMA = {"type": "object", "properties": {}}
FORMAT = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}
#: the official client's classes of events, by their type
EVENTS: dict[str, Any] = {
    get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in get_args(get_args(ResponseStreamEvent)[0])
}


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


CALL = {"type": "function_call", "call_id": "c", "name": "add", "arguments": '{"a": 1}'}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "2"}
CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    ],
}
HI = {"role": "user", "content": "Hi"}
#: inputs, and the messages that they are
INPUTS: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({"input": "Hi"}, [HI]),
    ({"input": "Hi", "instructions": "Be kind."}, [{"role": "system", "content": "Be kind."}, HI]),
    ({"input": [HI]}, [HI]),
    ({"input": [{**HI, "type": "message", "status": "completed", "id": "in_1"}]}, [HI]),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": t} for t in "Hi"]}]},
        [HI],
    ),
    (
        {"input": [{"role": "developer", "content": "x"}, HI]},
        [{"role": "system", "content": "x"}, HI],
    ),
    (
        {
            "input": [
                HI,
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "phase": "final_answer",
                    "content": [
                        {"type": "output_text", "text": "a", "annotations": [], "logprobs": [{}]},
                        {"type": "refusal", "refusal": "b"},
                    ],
                },
                HI,
            ]
        },
        [HI, {"role": "assistant", "content": "ab"}, HI],
    ),
    (
        {"input": [HI, {**CALL, "id": "fc_1", "status": "completed"}, OUTPUT]},
        [HI, CALLED, {"role": "tool", "tool_call_id": "c", "content": "2"}],
    ),
    (
        {
            "input": [
                HI,
                {"role": "assistant", "content": "Well."},
                {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
                CALL,
                {**CALL, "call_id": "d"},
                {**OUTPUT, "output": [{"type": "input_text", "text": "2"}]},
            ]
        },
        [
            HI,
            {
                **CALLED,
                "content": "Well.",
                "tool_calls": [CALLED["tool_calls"][0], {**CALLED["tool_calls"][0], "id": "d"}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "2"},
        ],
    ),
]


def test_inputs(byte_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []

    def encode(self: Tokenizer, messages: Any, **_: Any) -> list[int]:
        read.append([*messages])
        return [1]

    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            monkeypatch.setattr(Tokenizer, "chat_ids", encode)
            for given, messages in INPUTS:
                answer = await server.post(PATH, {"max_output_tokens": 1, **given})
                assert answer.status == 200, (given, answer.body)
                assert read.pop() == messages, given

    run(main())


def test_what_becomes_of_parameters(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, max_len=4096) as server:
            body = {"input": "Hi", "max_output_tokens": 7, "temperature": 0.5, "top_p": 0.9}
            body |= {"seed": 3, "steps": 5, "user": "a", "reasoning": {"effort": "low"}}
            await server.post(PATH, body)
            params = server.engine.calls[-1].submit.params
            found = (params.gen_length, params.temperature, params.top_p, params.seed, params.steps)
            assert found == (7, 0.5, 0.9, 3, 5)
            await server.post(PATH, {"input": "Hi", "text": FORMAT})
            assert json.loads(str(server.engine.calls[-1].submit.params.json_schema)) == SCHEMA
            some = {"type": "allowed_tools", "mode": "required"}
            some["tools"] = [{"type": "function", "name": "add"}]  # type: ignore[assignment]
            for choice in ("auto", "required", {"type": "function", "name": "add"}, some):
                body = {"input": "Hi", "tools": [TOOL], "tool_choice": choice}
                assert (await server.post(PATH, body)).status == 200
                constraint = server.engine.calls[-1].submit.params.json_schema
                assert constraint is not None and "add" in constraint
            more = {"async": False, "defer_loading": False, "allowed_callers": None}
            more |= {"output_schema": {"type": "integer"}}
            told = (await server.post(PATH, {**body, "tools": [{**TOOL, **more}]})).json()
            assert told["tools"] == [{**TOOL, "description": None}]
            body["tool_choice"] = "none"
            await server.post(PATH, body)
            assert server.engine.calls[-1].submit.params.json_schema is None

    run(main())


async def events_of(server: Server, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = await server.post(PATH, {**body, "stream": True})
    assert answer.status == 200, answer.body
    found = []
    for number, (name, data) in enumerate(answer.events()):
        assert (name, number) == (data["type"], data["sequence_number"])
        EVENTS[data["type"]].model_validate(data)
        found.append(data)
    return found


def plain(response: dict[str, Any]) -> dict[str, Any]:
    """Without what is drawn or measured."""
    text = json.dumps({**response, "created_at": 0})
    for item in response["output"]:
        for key in ("id", "call_id"):
            text = text.replace(str(item.get(key)), key)
    return dict(json.loads(text.replace(response["id"], "id")))


ANSWERS: list[tuple[str, list[tuple[str, ...]]]] = [
    ("Hello.", [("message", "Hello.")]),
    ("", [("message", "")]),
    (call("add", '{"a": 1}'), [("function_call", "add", '{"a": 1}')]),
    (
        "Well.\n" + call("add", "{}") + "\n" + call("add", '{"a": [1, 2]}'),
        [
            ("message", "Well.\n"),
            ("function_call", "add", "{}"),
            ("function_call", "add", '{"a": [1, 2]}'),
        ],
    ),
]


def test_answers(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, max_len=4096) as server:
            for text, items in ANSWERS:
                server.engine.answer = iter([text] * 2)
                body = {"input": "Hi", "tools": [TOOL], "metadata": {"a": "b"}}
                answer = (await server.post(PATH, body)).json()
                assert Told.model_validate(answer).output_text == "".join(
                    item[1] for item in items if item[0] == "message"
                )
                found = []
                for item in answer["output"]:
                    assert item["status"] == "completed"
                    if item["type"] == "message":
                        (part,) = item["content"]
                        assert part["annotations"] == [] and part["logprobs"] == []
                        found.append(("message", part["text"]))
                    else:
                        found.append((item["type"], item["name"], item["arguments"]))
                assert found == items
                assert answer["metadata"] == {"a": "b"} and answer["tools"][0]["name"] == "add"
                assert answer["usage"]["output_tokens"] == len(text)
                events = await events_of(server, body)
                last = events[-1]["response"]
                assert plain(last) == plain(answer)
                check_events(events, last)

    run(main())


def check_events(events: list[dict[str, Any]], response: dict[str, Any]) -> None:
    """Every item begins, grows and ends, in the order of the output."""
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:2] == ["created", "in_progress"]
    assert kinds[-1] == ("incomplete" if response["status"] == "incomplete" else "completed")
    for index, item in enumerate(response["output"]):
        own = [e for e in events if e.get("output_index") == index]
        names = [event["type"].removeprefix("response.") for event in own]
        assert names[0] == "output_item.added" and names[-1] == "output_item.done"
        assert own[-1]["item"] == item
        assert all(e["item_id"] == item["id"] for e in own if "item_id" in e)
        deltas = "".join(e["delta"] for e in own if "delta" in e)
        if item["type"] == "message":
            assert names[1] == "content_part.added"
            assert names[-3:-1] == ["output_text.done", "content_part.done"]
            assert deltas == own[-3]["text"] == item["content"][0]["text"]
        else:
            assert names[-2] == "function_call_arguments.done"
            assert deltas == own[-2]["arguments"] == item["arguments"]


def test_an_answer_that_is_cut(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            body = {"input": "Hi", "max_output_tokens": 3}
            answer = (await server.post(PATH, body)).json()
            assert answer["status"] == "incomplete"
            assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
            events = await events_of(server, body)
            check_events(events, events[-1]["response"])
            # JSON under a schema is never cut
            answer = (await server.post(PATH, {**body, "text": FORMAT})).json()
            assert answer["status"] == "completed" and answer["text"] == FORMAT | {
                "format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}
            }

    run(main())


def test_log_probabilities(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            body = {"input": "Hi", "top_logprobs": 2, "include": ["message.output_text.logprobs"]}
            server.engine.answer = iter(["abc"] * 2)
            answer = (await server.post(PATH, body)).json()
            logprobs = answer["output"][0]["content"][0]["logprobs"]
            assert [token["token"] for token in logprobs] == ["a", "b", "c"]
            assert all(len(token["top_logprobs"]) == 2 for token in logprobs)
            events = await events_of(server, body)
            assert plain(events[-1]["response"]) == plain(answer)
            deltas = [e["logprobs"] for e in events if e["type"] == "response.output_text.delta"]
            assert [token for delta in deltas for token in delta] == logprobs

    run(main())


def test_going_on_from_a_response(byte_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []

    def encode(self: Tokenizer, messages: Any, **_: Any) -> list[int]:
        read.append([(m["role"], m["content"]) for m in messages])
        return [1]

    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            monkeypatch.setattr(Tokenizer, "chat_ids", encode)
            server.engine.answer = iter(["one", "two", "three"])
            first = (await server.post(PATH, {"input": "a", "instructions": "x"})).json()
            second = (await events_of(server, {"input": "b", "previous_response_id": first["id"]}))[
                -1
            ]["response"]
            again = {"input": [{"role": "user", "content": "c"}]}
            third = {**again, "previous_response_id": second["id"], "instructions": "y"}
            assert (await server.post(PATH, third)).status == 200
            # instructions are of one response alone
            one = [("user", "a"), ("assistant", "one"), ("user", "b")]
            assert read[1] == one
            assert read[2] == [("system", "y"), *one, ("assistant", "two"), ("user", "c")]
            server.engine.answer = iter(["four"])
            reference = {"type": "item_reference", "id": first["output"][0]["id"]}
            told = [{"role": "user", "content": "a"}, reference, {"role": "user", "content": "b"}]
            assert (await server.post(PATH, {"input": told})).status == 200
            assert read[3] == one
            told[1] = {"type": "item_reference", "id": "msg_0123"}
            answer = await server.post(PATH, {"input": told})
            assert (answer.status, answer.error["param"]) == (400, "input")

    run(main())


def test_what_is_kept(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, keys=KEYS) as server:
            ann, bob = secret("ann"), secret("bob")
            body = {"input": [{"role": "user", "content": c} for c in "abc"]}
            answer = (await server.post(PATH, body, **ann)).json()
            where = f"{PATH}/{answer['id']}"
            assert (await server.get(where, **ann)).json() == answer
            # neither others' responses nor jobs of that number
            number = int(answer["id"].removeprefix("resp_"), 16)
            for target, who in ((where, bob), (f"/v1/result/{number}", ann)):
                assert (await server.get(target, **who)).status == 404
                assert (await server.ask("DELETE", target, **who)).status == 404
            page = (await server.get(f"{where}/input_items?limit=2", **ann)).json()
            assert page["has_more"] and [i["content"] for i in page["data"]] == ["c", "b"]
            last = page["last_id"]
            page = (await server.get(f"{where}/input_items?after={last}", **ann)).json()
            assert not page["has_more"] and [i["content"] for i in page["data"]] == ["a"]
            page = (await server.get(f"{where}/input_items?order=asc", **ann)).json()
            assert [i["content"] for i in page["data"]] == ["a", "b", "c"]
            dropped = await server.ask("DELETE", where, **ann)
            assert dropped.json() == {"id": answer["id"], "object": "response", "deleted": True}
            assert (await server.get(where, **ann)).status == 404
            assert (await server.ask("DELETE", where, **ann)).status == 404
            unkept = (await server.post(PATH, {**body, "store": False}, **ann)).json()
            assert unkept["store"] is False
            assert (await server.get(f"{PATH}/{unkept['id']}", **ann)).status == 404
            answer = await server.post(
                PATH, {"input": "a", "previous_response_id": unkept["id"]}, **ann
            )
            assert (answer.status, answer.error["code"]) == (400, "previous_response_not_found")
            assert answer.error["param"] == "previous_response_id"

    run(main())


def test_responses_outlive_the_server(byte_checkpoint: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store" / "jobs.sqlite3")

    async def main() -> None:
        async with serving(byte_checkpoint, store=store) as server:
            answer = (await server.post(PATH, {"input": "Hi"})).json()
        async with serving(byte_checkpoint, store=store) as server:
            assert (await server.get(f"{PATH}/{answer['id']}")).json() == answer

    (tmp_path / "store").mkdir(mode=0o700)
    run(main())


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "input", "input is missing"),
    ({"input": []}, "input", "input"),
    ({"input": [{"type": "reasoning"}]}, "input", "input makes 0 messages"),
    ({"input": [{"type": "audio"}]}, "input", "input.0.type must be one of"),
    ({"input": [{"role": "critic", "content": "x"}]}, "input", "input.0.role"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input",
        "has type 'input_image'",
    ),
    ({"input": "x" * 9999}, "input", "input has"),
    ({"input": "a", "messages": []}, "messages", "messages is not a parameter"),
    ({"input": "a", "tools": [{"type": "web_search"}]}, "tools", "has type 'web_search'"),
    ({"input": "a", "tools": [{**TOOL, "defer_loading": True}]}, "tools", "defer_loading"),
    ({"input": "a", "tools": [{**TOOL, "async": True}]}, "tools", "tools.0.async"),
    ({"input": "a", "tool_choice": "required"}, "tool_choice", "there are no tools"),
    ({"input": "a", "background": True}, "background", "is not supported"),
    ({"input": "a", "truncation": "auto"}, "truncation", "'disabled'"),
    ({"input": "a", "max_output_tokens": 0}, "max_output_tokens", "max_output_tokens"),
    ({"input": "a", "text": {"format": {"type": "x"}}}, "text", "text.format.type must be one of"),
    ({"input": "a", "text": FORMAT, "regex": "a"}, "text", "both say"),
    ({"input": "a", "stream_options": {"include_usage": True}}, "stream_options", "include_usage"),
]


def test_what_is_refused(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for given, param, text in REFUSED:
                answer = await server.post(PATH, given)
                assert answer.status == 400, (given, answer.body)
                assert text in answer.error["message"], (given, answer.error)
                assert answer.error["param"] == param, (given, answer.error)
            answer = await server.post(PATH, {"input": "a", "model": "gpt-4o"})
            assert (answer.status, answer.error["code"]) == (404, "model_not_found")
            assert server.engine.calls == []

    run(main())


def test_failures(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            server.engine.hold = True
            for stream in (False, True):
                before = len(server.engine.calls)
                asked = server.begin("POST", PATH, {"input": "a", "stream": stream})
                await until(lambda n=before: len(server.engine.calls) > n)  # type: ignore[misc]
                server.engine.calls[-1].end(EngineError("it broke"))
                answer = await asked.reply()
                if stream:
                    name, data = answer.events()[-1]
                    assert name == "response.failed"
                    assert data["response"]["error"]["message"] == "it broke"
                    EVENTS[data["type"]].model_validate(data)
                else:
                    assert answer.status == 500
            for stream in (False, True):
                before = len(server.engine.calls)
                asked = server.begin("POST", PATH, {"input": "a", "stream": stream})
                await until(lambda n=before: len(server.engine.calls) > n)  # type: ignore[misc]
                await asyncio.sleep(0.01)
                await asked.left()
                assert server.idle() and not server.engine.open_calls

    run(main())


def test_the_official_client(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, max_len=4096) as server:
            transport = httpx.ASGITransport(server.app)
            http = httpx.AsyncClient(transport=transport)
            async with AsyncOpenAI(
                api_key="none", base_url="http://127.0.0.1/v1", http_client=http, max_retries=0
            ) as client:
                tools: Any = [TOOL]
                server.engine.answer = iter([call("add", '{"a": 1}'), "2", "three"])
                first = await client.responses.create(model="byte-llada", input="Hi", tools=tools)
                (item,) = first.output
                assert item.type == "function_call" and item.name == "add"
                told: Any = [{**OUTPUT, "call_id": item.call_id}]
                second = await client.responses.create(
                    model="byte-llada", input=told, previous_response_id=first.id, tools=tools
                )
                assert second.output_text == "2" and second.usage
                assert second.usage.output_tokens == 1
                async with client.responses.stream(model="byte-llada", input="Hi") as stream:
                    kinds = [event.type async for event in stream]
                    last = await stream.get_final_response()
                assert kinds[-1] == "response.completed" and last.output_text == "three"
                assert (await client.responses.retrieve(first.id)).output == first.output
                items = [i async for i in client.responses.input_items.list(first.id)]
                assert len(items) == 1
                await client.responses.delete(first.id)
                with pytest.raises(NotFoundError):
                    await client.responses.retrieve(first.id)

    run(main())
