"""Messages of /v1/chat/completions: conversations that any server may have taken part in.

Clients send answers back as they got them, with keys of the server that gave them. An unknown key
is allowed if its value is empty: null, "", [] or {}, or lists and objects of these.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from dllmserve.server.fields import Body, Entries, Listed, Text, neutral
from dllmserve.server.http.escape import shown

#: most messages of a conversation, parts of a message, and calls in a message
MAX_MESSAGES = 1024
#: marks for caches of prompts; this server has no such cache, so they are not read
Marker = Annotated[Entries[Any] | None, Field(description="Not read.", exclude=True)]


def says_nothing(value: Any) -> bool:
    """Whether a value is null or empty, or holds such values only.

    Example:
        >>> says_nothing({"refusal": None, "parts": [""]}), says_nothing(0)
        (True, False)
    """
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)
        elif item is not None and item != "":
            return False
    return True


class Said(Body):
    """A message, or a piece of one."""

    model_config = ConfigDict(
        json_schema_extra={"additionalProperties": {"enum": [None, "", [], {}]}}
    )
    #: the error for parts of another type; None if there are no types
    other_type: ClassVar[str | None] = None
    #: the types that are known
    types: ClassVar[tuple[str, ...]] = ("text", "function")

    cache_control: Marker = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_said(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kind, known = value.get("type"), cls.model_fields
        if cls.other_type and isinstance(kind, str) and kind not in cls.types:
            raise ValueError(f"has type '{shown(kind, 40)}': {cls.other_type}")
        return {k: v for k, v in value.items() if k in known or not says_nothing(v)}


class TextPart(Said):
    """A part of a message."""

    other_type = "models here read text only, so each part must have type 'text'"

    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: Marker = None


class CalledFunction(Said):
    """What a tool call asked for."""

    name: Text
    arguments: Text | Entries[Any] | None = Field(
        default=None, description="JSON, as a text or as an object."
    )


class ToolCall(Said):
    """A tool call of an earlier answer."""

    other_type = "only calls of type 'function' are known here"

    id: Text | None = None
    type: Literal["function"] | None = None
    function: CalledFunction
    index: int | None = Field(default=None, exclude=True, description="Not read.")


Parts = Annotated[Listed[TextPart], Field(max_length=MAX_MESSAGES)]
Content = Text | Annotated[Listed[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)]


class _Message(Said):
    # some clients mark whole messages as they mark parts
    type: neutral("text") = Field(default=None, exclude=True)  # type: ignore[valid-type]
    name: Text | None = Field(default=None, description="For the chat template.")


class SystemMessage(_Message):
    """What the assistant is told; templates know role developer as system."""

    role: Literal["system", "developer"]
    content: Content


class UserMessage(_Message):
    """What a user says."""

    role: Literal["user"]
    content: Content


class AssistantMessage(_Message):
    """An earlier answer, of this server or of another one."""

    role: Literal["assistant"]
    content: Text | Parts | None = None
    reasoning_content: Text | None = Field(default=None, description="For the chat template.")
    reasoning: Text | None = Field(default=None, description="For the chat template.")
    tool_calls: Annotated[Listed[ToolCall], Field(max_length=MAX_MESSAGES)] | None = None
    function_call: CalledFunction | None = None
    refusal: Text | None = Field(default=None, exclude=True, description="Not read.")

    def arguments(self) -> list[str]:
        """The arguments of its calls that are texts, which are parsed for the chat template."""
        called = [call.function for call in self.tool_calls or ()]
        called += [self.function_call] if self.function_call is not None else []
        return [c.arguments for c in called if isinstance(c.arguments, str)]


class ToolMessage(_Message):
    """What a tool answered."""

    role: Literal["tool"]
    content: Text | Parts
    tool_call_id: Text


class FunctionMessage(_Message):
    """What a function answered: OpenAI's older form of a tool message."""

    role: Literal["function"]
    content: Text | Parts
    name: Text


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage,
    Field(discriminator="role"),
]
Messages = Annotated[Listed[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
