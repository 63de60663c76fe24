"""Conversations: from the messages that people and clients write to those that templates read.

Python and HTTP take the same conversations, and give a chat template the same ones.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from dllmserve.errors import PromptError

#: OpenAI's newer names for roles, by the names that chat templates know
_ROLES = {"developer": "system", "function": "tool"}


def template_messages(messages: Any, name: str = "messages") -> list[dict[str, Any]]:
    """One conversation as chat templates read it.

    - ``content`` becomes a text: parts of type "text" are joined, and an assistant's message,
      which may have called a tool instead of saying something, has "" without one.
    - Role "developer" becomes "system". An assistant's older ``function_call`` becomes the only one
      of its ``tool_calls``, and role "function", which answers it, "tool".
    - ``arguments`` of tool calls become mappings where they are texts of JSON objects; any other
      text stays as it is, since models write what is no JSON, too.
    - Keys whose value is None are left out. All others are passed on.

    Args:
        messages: mappings with a "role", in OpenAI's form.
        name: what errors call them.

    Raises:
        PromptError: this is no conversation, or has parts that are no text.

    Example:
        >>> template_messages([{"role": "developer", "content": [{"type": "text", "text": "Hi"}]}])
        [{'role': 'system', 'content': 'Hi'}]
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise PromptError(
            f"{name} must be a non-empty list of messages, each with 'role' and 'content'"
        )
    return [_message(message, f"{name}[{place}]") for place, message in enumerate(messages)]


def check_open(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise PromptError unless the last message is one that can be gone on with."""
    last = messages[-1]
    if last.get("role") != "assistant":
        raise PromptError(
            "continue_final_message goes on with the assistant's last message, and the last one "
            f"here is of role {last.get('role')!r}: end with the beginning of the answer, or leave "
            "it out"
        )
    if last.get("tool_calls"):
        raise PromptError(
            "continue_final_message goes on with a text, and the last message calls tools: leave "
            "it out"
        )


def conversations(messages: Any) -> list[list[dict[str, Any]]]:
    """One conversation or a list of them, as chat templates read them.

    Raises:
        PromptError: one of them is none.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise PromptError(f"messages must be a list of messages, got {type(messages).__name__}")
    if not messages:
        return []
    if isinstance(messages[0], Mapping):
        return [template_messages(messages)]
    return [template_messages(m, f"conversation {place}") for place, m in enumerate(messages)]


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise PromptError(
            f"{name} needs 'role' and 'content', for example "
            f"{{'role': 'user', 'content': 'Hi'}}; got {reprlib.repr(message)}"
        )
    role = message["role"]
    content = _text(message.get("content"), f"{name}.content", optional=role == "assistant")
    made = {**message, "role": _ROLES.get(role, role), "content": content}
    calls = made.pop("tool_calls", None)
    call = made.pop("function_call", None)
    if calls is None and call is not None:
        calls = [{"type": "function", "function": call}]
    if calls:
        made["tool_calls"] = [
            _tool_call(item, f"{name}.tool_calls[{place}]")
            for place, item in enumerate(_list(calls, f"{name}.tool_calls"))
        ]
    return {key: value for key, value in made.items() if value is not None}


def _text(content: Any, name: str, *, optional: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and optional:
        return ""
    if isinstance(content, bytes) or not isinstance(content, Sequence):
        raise PromptError(
            f"{name} must be a text, or a list of {{'type': 'text', 'text': '...'}}; got "
            f"{reprlib.repr(content)}"
        )
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            other = kind not in (None, "text")
            what = f"has type {kind!r}" if other else f"is {reprlib.repr(part)}"
            raise PromptError(
                f"{name} must be a text, or a list of {{'type': 'text', 'text': '...'}}, as models "
                f"here read text only; part {place} {what}"
            )
        texts.append(text)
    return "".join(texts)


def _tool_call(call: Any, name: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(
            f"{name} needs a function with a name, for example {{'type': 'function', "
            f"'function': {{'name': 'add', 'arguments': '{{}}'}}}}; got {reprlib.repr(call)}"
        )
    read = {**function, "arguments": _arguments(function.get("arguments"))}
    return {**{k: v for k, v in call.items() if v is not None}, "function": read}


def _arguments(given: Any) -> Any:
    """Arguments of a tool call, which templates want as a mapping."""
    if given is None or given == "":
        return {}
    if not isinstance(given, str):
        return given
    try:
        read = json.loads(given)
    except (ValueError, RecursionError):
        return given
    return read if isinstance(read, dict) else given


def _list(value: Any, name: str) -> Sequence[Any]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise PromptError(f"{name} must be a list, got {reprlib.repr(value)}")
    return value
