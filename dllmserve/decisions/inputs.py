"""Inputs: from what is decided about, in OpenAI's shape, to one text.

A template gets one text, whatever the input was, so that a conversation which is judged cannot be
taken for the conversation with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllmserve.decisions.checks import fields, items, json_text, one_of, text, unexpected, wrong

#: what is read of a message's parts, by its role; None is a part that no text model can read
_SPOKEN = {"input_text": "text"}
_PARTS: Mapping[str, Mapping[str, str | None]] = {
    "user": {**_SPOKEN, "input_json": "data", "input_image": None},
    "developer": _SPOKEN,
    "system": _SPOKEN,
    "assistant": {"output_text": "text", "refusal": "refusal"},
    "": {**_SPOKEN, "input_image": None},
    "question": {**_SPOKEN, "input_json": "data", "input_image": None},
}
_CALLS = {"function_call": "arguments", "custom_tool_call": "input"}
_OUTPUTS = {"function_call_output": "function_call", "custom_tool_call_output": "custom_tool_call"}
#: members that say nothing about the content
_UNREAD = ("id", "namespace", "status")


def read_input(given: Any) -> str:
    """The text of an input: a text itself, or a list of messages, calls of tools and their outputs.

    One message of a user, alone, is its content. Otherwise each item is a heading and its content::

        [user]
        Is this order complete?

        [call c1 of stock]
        {"sku": "AB123"}

        [result of c1]
        {"left": 5}

    Raises:
        DecisionError: it is none, holds a picture, or an output comes before its call.
    """
    if isinstance(given, str):
        return text(given, "input")
    found, calls = [], dict[str, str]()
    for number, item in enumerate(items(given, "input", 1, None)):
        found.append(_item(item, f"input[{number}]", calls))
    if len(found) == 1 and found[0][0] == "user":
        return found[0][1]
    return "\n\n".join(f"[{head}]\n{content}" for head, content in found)


def instructions(given: Any, place: str) -> str:
    """The text of a question: a text, or parts. Raises DecisionError."""
    found = _content(given, place, "question")
    if not found.strip():
        raise wrong(place, "is empty")
    return found


def _item(item: Any, place: str, calls: dict[str, str]) -> tuple[str, str]:
    """Heading and content of an item; calls that are known, by their ids, grow."""
    if not isinstance(item, Mapping):
        raise wrong(place, "expected an object: a message, a call or its output")
    kind = item.get("type", "message")
    if kind == "message":
        return _message(item, place)
    if not isinstance(kind, str):
        raise unexpected(kind, f"{place}.type", ("message", *_CALLS, *_OUTPUTS))
    if kind in _CALLS:
        content = _CALLS[kind]
        known = ("type", "call_id", "name", content, *_UNREAD)
        fields(item, place, known, ("call_id", "name", content))
        call = text(item["call_id"], f"{place}.call_id", empty=False)
        name = text(item["name"], f"{place}.name", empty=False)
        calls[call] = kind
        return f"call {call} of {name}", text(item[content], f"{place}.{content}")
    if kind in _OUTPUTS:
        fields(item, place, ("type", "call_id", "output", *_UNREAD), ("call_id", "output"))
        call = text(item["call_id"], f"{place}.call_id", empty=False)
        if calls.get(call) != _OUTPUTS[kind]:
            raise wrong(f"{place}.call_id", f'no call "{call}" in the input')
        return f"result of {call}", _content(item["output"], f"{place}.output", "")
    raise unexpected(kind, f"{place}.type", ("message", *_CALLS, *_OUTPUTS))


def _message(item: Mapping[str, Any], place: str) -> tuple[str, str]:
    fields(item, place, ("type", "role", "content", "phase"), ("role", "content"))
    roles = [role for role in _PARTS if role not in ("", "question")]
    role = one_of(item["role"], f"{place}.role", roles)
    phase = item.get("phase")
    if phase is not None:
        one_of(phase, f"{place}.phase", ("commentary", "final_answer"))
    return role, _content(item["content"], f"{place}.content", role)


def _content(given: Any, place: str, role: str) -> str:
    """The text of a content; parts stand below each other."""
    if isinstance(given, str):
        return text(given, place)
    parts = [_part(part, f"{place}[{i}]", role) for i, part in enumerate(items(given, place))]
    return "\n".join(parts)


def _part(part: Any, place: str, role: str) -> str:
    if not isinstance(part, Mapping):
        raise wrong(place, "expected an object with a type")
    taken = _PARTS[role]
    kind = one_of(part.get("type"), f"{place}.type", taken)
    name = taken[kind]
    if name is None:
        raise wrong(place, "images are not supported by this model")
    fields(part, place, ("type", name, "prompt_cache_breakpoint"), (name,))
    if name != "data":
        return text(part[name], f"{place}.{name}")
    data = part["data"]
    rows = isinstance(data, (list, tuple)) and all(isinstance(row, Mapping) for row in data)
    if not (rows or isinstance(data, Mapping)):
        raise wrong(f"{place}.data", "expected an object or a list of objects")
    return json_text(data, f"{place}.data")
