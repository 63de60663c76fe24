"""instructor: typed answers by tools and by JSON."""

import instructor
from openai import OpenAI

from tests.clients.scenarios import KEY, LONG, QUESTION, Person, Scenario, Target


def _typed(target: Target, mode: instructor.Mode) -> None:
    plain = OpenAI(base_url=target.base_url, api_key=KEY, max_retries=0)
    client = instructor.from_openai(plain, mode=mode)
    answer = client.chat.completions.create(
        model=target.model,
        response_model=Person,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=LONG,
        max_retries=0,
    )
    assert isinstance(answer, Person)


def tools(target: Target) -> None:
    _typed(target, instructor.Mode.TOOLS)


def tools_strict(target: Target) -> None:
    _typed(target, instructor.Mode.TOOLS_STRICT)


def json_schema(target: Target) -> None:
    _typed(target, instructor.Mode.JSON_SCHEMA)


PACKAGE = "instructor"
SCENARIOS: list[Scenario] = [tools, tools_strict, json_schema]
