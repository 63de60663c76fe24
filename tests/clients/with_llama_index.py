"""llama-index: typed answers and tools of its openai-like model."""

from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from tests.clients.scenarios import KEY, LONG, QUESTION, SHORT, Person, Scenario, Sum, Target


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def _model(target: Target, **more: Any) -> Any:
    told: dict[str, Any] = {"max_tokens": LONG, "max_retries": 0, "context_window": 2048, **more}
    told |= {"is_chat_model": True, "is_function_calling_model": True}
    return OpenAILike(model=target.model, api_base=target.base_url, api_key=KEY, **told)


def chat(target: Target) -> None:
    assert _model(target, max_tokens=SHORT).chat([ChatMessage(QUESTION)]).message.content


def structured(target: Target) -> None:
    answer = _model(target).as_structured_llm(Person).chat([ChatMessage(QUESTION)])
    assert isinstance(answer.raw, Person)


def tools(target: Target) -> None:
    tool = FunctionTool.from_defaults(add, fn_schema=Sum)
    model = _model(target)
    answer = model.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
    calls = model.get_tool_calls_from_response(answer)
    assert calls and all(Sum.model_validate(call.tool_kwargs) for call in calls)


PACKAGE = "llama-index-llms-openai-like"
SCENARIOS: list[Scenario] = [chat, structured, tools]
