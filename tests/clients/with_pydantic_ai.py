"""pydantic-ai: agents with typed answers and tools."""

from typing import Any

from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.scenarios import KEY, LONG, QUESTION, SHORT, Person, Scenario, Target


def _model(target: Target, kind: Any = OpenAIChatModel) -> Any:
    return kind(target.model, provider=OpenAIProvider(base_url=target.base_url, api_key=KEY))


def text(target: Target) -> None:
    agent = Agent(_model(target), model_settings={"max_tokens": SHORT, "temperature": 0})
    assert agent.run_sync(QUESTION).output


def typed_by_a_tool(target: Target) -> None:
    agent = Agent(
        _model(target), output_type=ToolOutput(Person), model_settings={"max_tokens": LONG}
    )
    assert isinstance(agent.run_sync(QUESTION).output, Person)


def typed_by_a_schema(target: Target) -> None:
    agent = Agent(
        _model(target), output_type=NativeOutput(Person), model_settings={"max_tokens": LONG}
    )
    assert isinstance(agent.run_sync(QUESTION).output, Person)


def responses(target: Target) -> None:
    agent = Agent(
        _model(target, OpenAIResponsesModel),
        output_type=ToolOutput(Person),
        model_settings={"max_tokens": LONG},
    )
    assert isinstance(agent.run_sync(QUESTION).output, Person)


PACKAGE = "pydantic-ai-slim"
SCENARIOS: list[Scenario] = [text, typed_by_a_tool, typed_by_a_schema, responses]
