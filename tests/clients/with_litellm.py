"""litellm: the same calls through its own client."""

from typing import Any

import litellm

from tests.clients.scenarios import (
    KEY,
    LONG,
    QUESTION,
    SHORT,
    TOOL,
    Person,
    Scenario,
    Target,
    added,
)


def _ask(target: Target, provider: str = "hosted_vllm", **more: Any) -> Any:
    return litellm.completion(
        model=f"{provider}/{target.model}",
        api_base=target.base_url,
        api_key=KEY,
        messages=[{"role": "user", "content": QUESTION}],
        **{"max_tokens": LONG, "num_retries": 0, **more},
    )


def chat(target: Target) -> None:
    for provider in ("openai", "hosted_vllm"):
        assert _ask(target, provider, max_tokens=SHORT).choices[0].message.content


def stream(target: Target) -> None:
    pieces = [p.choices[0].delta.content or "" for p in _ask(target, stream=True, max_tokens=SHORT)]
    assert "".join(pieces)


def structured(target: Target) -> None:
    answer = _ask(target, response_format=Person)
    Person.model_validate_json(answer.choices[0].message.content)


def tools(target: Target) -> None:
    answer = _ask(target, tools=[TOOL], tool_choice="required")
    calls = answer.choices[0].message.tool_calls
    assert calls and all(added(call.function.arguments) for call in calls)


def responses(target: Target) -> None:
    answer = litellm.responses(
        model=f"openai/{target.model}",
        input=QUESTION,
        max_output_tokens=SHORT,
        api_base=target.base_url,
        api_key=KEY,
    )
    assert answer.output


PACKAGE = "litellm"
SCENARIOS: list[Scenario] = [chat, stream, structured, tools, responses]
