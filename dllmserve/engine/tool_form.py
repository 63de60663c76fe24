"""How a checkpoint is told of tools, and how it calls them.

A chat template that writes tools, calls and their answers itself is asked for its form: it is given
a chat with two calls, and what it writes around their names and arguments is the form. Any other
checkpoint gets the form of :data:`OWN`, which many templates have: JSON objects with a name and
arguments, between ``<tool_call>`` and ``</tool_call>``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from dllmserve.errors import TokenizerError

Message = Mapping[str, Any]
#: renders messages and tools; ``add_generation_prompt`` is False
Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str]

_INTRODUCTION = (
    "You can call functions. Each line between <tools> and </tools> is a JSON object that "
    "describes one of them:\n<tools>\n{tools}\n</tools>\n"
    "To call a function, write its name and its arguments as a JSON object, like this:\n{call}"
)
#: of the chats that show a template's form
_NAMES, _KEYS, _RESULTS = ("first_tool", "other_tool"), ("first", "other"), ("sunny", "windy")
_WORD = "\u2603fortytwo"


@dataclass(frozen=True)
class ToolForm:
    r"""The texts around the name and the arguments of a call.

    Attributes:
        before, between, after: a call is before, the name as a JSON text, between, the arguments
            as a JSON object, after.
        separator: between two calls.
        native: the chat template writes tools, calls and answers itself.
        system: the chat template takes a system's message.

    Example:
        >>> OWN.call("add", '{"a": 1}')
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    """

    before: str = '<tool_call>\n{"name": '
    between: str = ', "arguments": '
    after: str = "}\n</tool_call>"
    separator: str = "\n"
    native: bool = False
    system: bool = True

    def head(self, name: str) -> str:
        """What stands before the arguments of a call."""
        return f"{self.before}{json.dumps(name, ensure_ascii=False)}{self.between}"

    def call(self, name: str, arguments: str) -> str:
        """A call."""
        return f"{self.head(name)}{arguments}{self.after}"

    def written(self, messages: Sequence[Message], tools: Sequence[Message] | None) -> list[Any]:
        """Messages in which tools, calls and answers are texts, for templates that know none.

        The tools become a part of the system's message, calls a part of the assistant's, and
        answers of tools the user's.

        Args:
            messages: as :func:`dllmserve.messages.template_messages` gives them.
            tools: in OpenAI's form.
        """
        made: list[dict[str, Any]] = []
        for message in messages:
            if message["role"] == "tool":
                text = f"<tool_response>\n{message['content']}\n</tool_response>"
                if made and made[-1].get("role") == "tool":
                    made[-1]["content"] += f"\n{text}"
                else:
                    made.append({"role": "tool", "content": text})
            elif calls := message.get("tool_calls"):
                said = [message["content"]] if message["content"] else []
                written = (self._written(call["function"]) for call in calls)
                content = "\n".join([*said, self.separator.join(written)])
                left = {k: v for k, v in message.items() if k != "tool_calls"}
                made.append({**left, "content": content})
            else:
                made.append({**message})
        for message in made:
            message["role"] = "user" if message["role"] == "tool" else message["role"]
        return self._introduced(made, tools) if tools else made

    def _written(self, function: Message) -> str:
        given = function.get("arguments") or {}
        text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        return self.call(function["name"], text)

    def _introduced(self, messages: list[Any], tools: Sequence[Message]) -> list[Any]:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = _INTRODUCTION.format(tools=lines, call=self.call("NAME", "ARGUMENTS"))
        text = text.replace('"NAME"', "NAME")
        first, role = messages[0], "system" if self.system else "user"
        if first["role"] != role:
            return [{"role": role, "content": text}, *messages]
        texts = (first["content"], text) if self.system else (text, first["content"])
        return [{**first, "content": "\n\n".join(texts)}, *messages[1:]]


#: of checkpoints whose template knows no tools
OWN = ToolForm()


def has_tools(messages: Sequence[Message]) -> bool:
    """Whether a conversation has calls of tools, or their answers."""
    return any(m.get("role") == "tool" or m.get("tool_calls") for m in messages)


def form_of(render: Render, kept: Callable[[str], str]) -> ToolForm:
    """The form of a checkpoint.

    Args:
        render: its chat template.
        kept: what is left of a text once it was tokens; an answer cannot hold what is lost.
    """
    found: ToolForm | None = None
    with suppress(TokenizerError):
        found = _native(render)
    if found is not None:
        text = found.call("name", "{}") + found.separator
        # where a call begins has to be clear as soon as its first character is there
        if found.before.count(found.before[0]) == 1 and kept(text) == text:
            return found
    return replace(OWN, system=_takes_system(render))


def _takes_system(render: Render) -> bool:
    told = [{"role": "system", "content": _WORD}, {"role": "user", "content": "Hello"}]
    try:
        return _WORD in render(told, None)
    except TokenizerError:
        return False


def _native(render: Render) -> ToolForm | None:
    """What a template writes around calls; None if it does not show all of a chat with tools."""
    tools = [_tool(name) for name in _NAMES]
    asked = [{"role": "user", "content": "Hello"}]
    calls = [_call(name, key) for name, key in zip(_NAMES, _KEYS, strict=True)]
    calling = {"role": "assistant", "content": "", "tool_calls": calls}
    saying = {"role": "assistant", "content": _WORD}
    answers = [
        {"role": "tool", "content": result, "tool_call_id": call["id"], "name": name}
        for result, call, name in zip(_RESULTS, calls, _NAMES, strict=True)
    ]
    whole = render([*asked, calling, *answers], tools)
    introduced = render(asked, tools)
    if not all(r in whole for r in _RESULTS) or not all(n in introduced for n in _NAMES):
        return None
    called, said = render([*asked, calling], tools), render([*asked, saying], tools)
    start = next(i for i, pair in enumerate(zip(called, said, strict=False)) if len({*pair}) > 1)
    _, _, ended = said.partition(_WORD)
    text = called[start:].removesuffix(ended)
    name, arguments = re.escape(json.dumps(_NAMES[0])), _arguments(_KEYS[0])
    other, others = re.escape(json.dumps(_NAMES[1])), _arguments(_KEYS[1])
    shape = rf"\s*(.+?){name}(.+?){arguments}(.+){other}(.+?){others}(.*)"
    found = re.fullmatch(shape, text, re.DOTALL)
    if found is None:
        return None
    before, between, middle, again, after = found.groups()
    separator = middle.removeprefix(after).removesuffix(before)
    made = ToolForm(before, between, after, separator, native=True)
    return made if (between, middle) == (again, after + separator + before) else None


def _tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"first": {"type": "integer"}}}
    function = {"name": name, "description": "A tool.", "parameters": parameters}
    return {"type": "function", "function": function}


def _call(name: str, key: str) -> dict[str, Any]:
    # some templates take ids of nine letters and digits only
    return {
        "id": f"call{key}",
        "type": "function",
        "function": {"name": name, "arguments": {key: 1}},
    }


def _arguments(key: str) -> str:
    return rf'\{{\s*"{key}"\s*:\s*1\s*\}}'
