"""The official Python package."""

import asyncio
from typing import Any

from openai import AsyncOpenAI, OpenAI, pydantic_function_tool

from tests.clients.scenarios import (
    KEY,
    LONG,
    QUESTION,
    SHORT,
    TOOL,
    Person,
    Scenario,
    Sum,
    Target,
    added,
)


def _client(target: Target) -> OpenAI:
    return OpenAI(base_url=target.base_url, api_key=KEY, max_retries=0)


def _ask(target: Target, **more: Any) -> dict[str, Any]:
    asked = {"model": target.model, "messages": [{"role": "user", "content": QUESTION}]}
    return {**asked, "temperature": 0, "max_tokens": SHORT, **more}


def chat(target: Target) -> None:
    answer = _client(target).chat.completions.create(**_ask(target, store=True, user="me"))
    assert answer.choices[0].message.content and answer.usage


def chat_stream(target: Target) -> None:
    told = _ask(target, stream_options={"include_usage": True})
    with _client(target).chat.completions.stream(**told) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds and final.choices[0].message.content and final.usage


def several_at_once(target: Target) -> None:
    async def main() -> None:
        async with AsyncOpenAI(base_url=target.base_url, api_key=KEY, max_retries=0) as client:
            calls = (client.chat.completions.create(**_ask(target)) for _ in range(4))
            answers = await asyncio.gather(*calls)
        assert len({answer.choices[0].message.content for answer in answers}) == 1

    asyncio.run(main())


def logprobs(target: Target) -> None:
    told = _ask(target, logprobs=True, top_logprobs=3)
    choice = _client(target).chat.completions.create(**told).choices[0]
    assert choice.logprobs and choice.logprobs.content
    text = "".join(token.token for token in choice.logprobs.content)
    assert text == choice.message.content
    assert all(token.logprob <= 0 for token in choice.logprobs.content)
    assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)


def completion(target: Target) -> None:
    answer = _client(target).completions.create(
        model=target.model, prompt=["a", "b"], max_tokens=4, logprobs=2, n=2, seed=1
    )
    assert len(answer.choices) == 4
    found = answer.choices[0].logprobs
    assert found and found.tokens and "".join(found.tokens) == answer.choices[0].text


def parse(target: Target) -> None:
    told = _ask(target, response_format=Person, max_tokens=LONG)
    message = _client(target).chat.completions.parse(**told).choices[0].message
    assert isinstance(message.parsed, Person)


def parse_stream(target: Target) -> None:
    told = _ask(target, response_format=Person, max_tokens=LONG)
    with _client(target).chat.completions.stream(**told) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Person)


def json_object(target: Target) -> None:
    told = _ask(target, response_format={"type": "json_object"}, max_tokens=LONG)
    text = _client(target).chat.completions.create(**told).choices[0].message.content
    assert text and text.startswith("{") and text.endswith("}")


def tools(target: Target) -> None:
    """A call, its answer, and what the model says to that."""
    client = _client(target)
    told = _ask(target, tools=[TOOL], tool_choice="required", max_tokens=LONG)
    message = client.chat.completions.create(**told).choices[0].message
    assert message.tool_calls and message.content is None
    answers = [
        {"role": "tool", "tool_call_id": call.id, "content": added(call.function.arguments)}
        for call in message.tool_calls
        if call.type == "function"
    ]
    turns = [*told["messages"], message, *answers]
    told |= {"messages": turns, "tool_choice": "none", "max_tokens": SHORT}
    assert client.chat.completions.create(**told).choices[0].message.content is not None


def tools_auto(target: Target) -> None:
    told = _ask(target, tools=[TOOL], max_tokens=LONG)
    choice = _client(target).chat.completions.create(**told).choices[0]
    assert bool(choice.message.tool_calls) == (choice.finish_reason == "tool_calls")
    for call in choice.message.tool_calls or ():
        assert call.type == "function" and added(call.function.arguments)


def tools_parsed(target: Target) -> None:
    tool = pydantic_function_tool(Sum, name="add")
    named = {"type": "function", "function": {"name": "add"}}
    told = _ask(target, tools=[tool], tool_choice=named, max_tokens=LONG)
    message = _client(target).chat.completions.parse(**told).choices[0].message
    assert message.tool_calls
    (call,) = message.tool_calls
    assert isinstance(call.function.parsed_arguments, Sum)


def tools_stream(target: Target) -> None:
    told = _ask(target, tools=[TOOL], tool_choice="required", max_tokens=LONG)
    with _client(target).chat.completions.stream(**told) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds
    assert message.tool_calls and all(added(c.function.arguments) for c in message.tool_calls)


def responses(target: Target) -> None:
    client = _client(target)
    told: dict[str, Any] = {"model": target.model, "temperature": 0, "max_output_tokens": SHORT}
    first = client.responses.create(input=QUESTION, **told)
    assert first.output_text and first.usage
    second = client.responses.create(input="Again.", previous_response_id=first.id, **told)
    assert second.usage and second.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)


def responses_parse(target: Target) -> None:
    answer = _client(target).responses.parse(
        model=target.model, input=QUESTION, text_format=Person, max_output_tokens=LONG
    )
    assert isinstance(answer.output_parsed, Person)


def responses_stream(target: Target) -> None:
    with _client(target).responses.stream(
        model=target.model, input=QUESTION, text_format=Person, max_output_tokens=LONG
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert "response.output_text.delta" in kinds and isinstance(final.output_parsed, Person)


def responses_tools(target: Target) -> None:
    client = _client(target)
    tool: Any = {"type": "function", "strict": True, **TOOL["function"]}
    told: dict[str, Any] = {"model": target.model, "tools": [tool], "max_output_tokens": LONG}
    first = client.responses.create(input=QUESTION, tool_choice="required", **told)
    calls = [item for item in first.output if item.type == "function_call"]
    assert calls
    answers: Any = [
        {"type": "function_call_output", "call_id": c.call_id, "output": added(c.arguments)}
        for c in calls
    ]
    told |= {"previous_response_id": first.id, "tool_choice": "none"}
    assert client.responses.create(input=answers, **told).output_text is not None


def decisions(target: Target) -> None:
    asked: Any = [
        {"type": "predicate", "instructions": "There are three numbers."},
        {
            "type": "choice",
            "name": "least",
            "instructions": "Which is the least?",
            "choices": [{"value": number} for number in ("9", "41", "7")],
        },
        {"type": "score", "instructions": "How hard?", "levels": [{"label": "a"}, {"label": "b"}]},
    ]
    told: dict[str, Any] = {"model": target.model, "input": QUESTION, "questions": asked}
    first, least, hard = _client(target).decisions.create(**told).answers
    assert first.type == "predicate" and 0 <= first.probability <= 1
    assert least.type == "choice" and least.name == "least" and least.choice in ("9", "41", "7")
    assert hard.type == "score" and abs(sum(p.probability for p in hard.probabilities) - 1) < 1e-9


PACKAGE = "openai"
SCENARIOS: list[Scenario] = [
    chat,
    chat_stream,
    several_at_once,
    logprobs,
    completion,
    parse,
    parse_stream,
    json_object,
    tools,
    tools_auto,
    tools_parsed,
    tools_stream,
    responses,
    responses_parse,
    responses_stream,
    responses_tools,
    *([decisions] if hasattr(OpenAI, "decisions") else []),  # older versions know none
]
