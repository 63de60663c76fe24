"""langchain-openai: structured output by each of its methods, tools, responses."""

from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from tests.clients.scenarios import KEY, LONG, QUESTION, SHORT, Person, Scenario, Sum, Target


@tool(args_schema=Sum)
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def _model(target: Target, **more: Any) -> Any:
    told: dict[str, Any] = {"max_tokens": LONG, "temperature": 0, "max_retries": 0, **more}
    return ChatOpenAI(model=target.model, base_url=target.base_url, api_key=KEY, **told)  # type: ignore[arg-type]


def chat(target: Target) -> None:
    assert _model(target, max_tokens=SHORT).invoke(QUESTION).content


def stream(target: Target) -> None:
    pieces = [piece.content for piece in _model(target, max_tokens=SHORT).stream(QUESTION)]
    assert "".join(pieces)


def structured(target: Target) -> None:
    assert isinstance(_model(target).with_structured_output(Person).invoke(QUESTION), Person)


def structured_by_a_tool(target: Target) -> None:
    typed = _model(target).with_structured_output(Person, method="function_calling")
    assert isinstance(typed.invoke(QUESTION), Person)


def json_mode(target: Target) -> None:
    typed = _model(target).with_structured_output(None, method="json_mode")
    assert isinstance(typed.invoke(f"{QUESTION}, as JSON"), dict)


def tools(target: Target) -> None:
    bound = _model(target).bind_tools([add], tool_choice="any")
    question = HumanMessage(QUESTION)
    message = bound.invoke([question])
    assert message.tool_calls and not message.invalid_tool_calls
    answers = [
        ToolMessage(str(add.invoke(c["args"])), tool_call_id=c["id"]) for c in message.tool_calls
    ]
    assert _model(target).bind_tools([add]).invoke([question, message, *answers])


def tools_stream(target: Target) -> None:
    pieces = iter(_model(target).bind_tools([add], tool_choice="add").stream(QUESTION))
    whole = next(pieces)
    for piece in pieces:
        whole += piece
    (call,) = whole.tool_calls
    assert Sum.model_validate(call["args"])


def responses(target: Target) -> None:
    model = _model(target, use_responses_api=True)
    assert model.invoke(QUESTION).text
    bound = model.bind_tools([add], tool_choice="any").invoke(QUESTION)
    assert bound.tool_calls


PACKAGE = "langchain-openai"
SCENARIOS: list[Scenario] = [
    chat,
    stream,
    structured,
    structured_by_a_tool,
    json_mode,
    tools,
    tools_stream,
    responses,
]
