"""Bodies of /v1/responses, and the chats that they stand for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dllmserve._values import MAX_GEN_LENGTH, MAX_LOGPROBS
from dllmserve.server.failures import ApiError
from dllmserve.server.fields import (
    MAX_SEED,
    Body,
    DecodingFields,
    Entries,
    Listed,
    Text,
    example,
    neutral,
)
from dllmserve.server.openai_bodies import ChatRequest, Unread
from dllmserve.server.openai_messages import MAX_MESSAGES, Marker, Said
from dllmserve.server.structured import ObjectFormat, TextFormat
from dllmserve.server.tools import MAX_TOOLS, FunctionDefinition, ToolName

#: in ``include``: log-probabilities of the answer's text
LOGPROBS = "message.output_text.logprobs"


class ContentPart(Said):
    """A part of a message, of a question or of an earlier answer."""

    other_type = "models here read text only, so each part must have type 'input_text'"
    types = ("input_text", "output_text", "text", "refusal")

    type: Literal["input_text", "output_text", "text", "refusal"]
    text: Text | None = None
    refusal: Text | None = None
    annotations: list[Any] | None = Field(default=None, exclude=True, description="Not read.")
    logprobs: list[Any] | None = Field(default=None, exclude=True, description="Not read.")
    prompt_cache_breakpoint: Marker = None


Content = Text | Annotated[Listed[ContentPart], Field(max_length=MAX_MESSAGES)]


class _Item(Said):
    id: Text | None = Field(default=None, exclude=True, description="Not read.")
    status: Text | None = Field(default=None, exclude=True, description="Not read.")


class MessageItem(_Item):
    """A message."""

    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    phase: Text | None = Field(default=None, exclude=True, description="Not read.")


class CallItem(_Item):
    """A call of a tool in an earlier answer."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text
    async_: neutral(False) = Field(default=None, alias="async", exclude=True)  # type: ignore[valid-type]
    caller: Marker = None


class OutputItem(_Item):
    """What a tool answered."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Content
    name: Text | None = Field(default=None, exclude=True, description="Not read.")
    caller: Marker = None


class ReasoningItem(_Item):
    """What a model of another server thought; not read."""

    type: Literal["reasoning"]
    summary: list[Any] | None = Field(default=None, exclude=True)
    content: list[Any] | None = Field(default=None, exclude=True)
    encrypted_content: Text | None = Field(default=None, exclude=True)


class ReferenceItem(Said):
    """An item of a stored response, by its id."""

    type: Literal["item_reference"]
    id: Text


def _typed(item: Any) -> Any:
    """Messages need no type."""
    return {"type": "message", **item} if isinstance(item, dict) and "role" in item else item


Item = Annotated[
    MessageItem | CallItem | OutputItem | ReasoningItem | ReferenceItem,
    Field(discriminator="type"),
    BeforeValidator(_typed),
]


class FunctionTool(FunctionDefinition):
    """A function that the model may call."""

    other_type = "only tools of type 'function' are known here"
    types = ("function",)

    type: Literal["function"] = Field(exclude=True)
    async_: neutral(False) = Field(default=None, alias="async", exclude=True)  # type: ignore[valid-type]
    defer_loading: neutral(False) = Field(default=None, exclude=True)  # type: ignore[valid-type]
    allowed_callers: neutral(["direct"]) = Field(default=None, exclude=True)  # type: ignore[valid-type]
    output_schema: Marker = None


class NamedTool(Body):
    """This tool is called."""

    type: Literal["function"]
    name: ToolName


class AllowedTools(Body):
    """Only some of the tools may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[Listed[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class SchemaFormat(Body):
    """JSON that is valid by a schema."""

    type: Literal["json_schema"]
    name: Text | None = None
    description: Text | None = None
    schema_: Entries[Any] | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="Not read: every schema is kept to.")


class TextOptions(Body):
    """How the answer's text is."""

    format: (
        Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None
    ) = None
    verbosity: Unread[Text] = None


class StreamOptions(Body):
    """What a stream also tells."""

    include_obfuscation: neutral(False) = None  # type: ignore[valid-type]


class ResponsesRequest(DecodingFields):
    """Body of /v1/responses."""

    model_config = example(input="Sort the numbers: 9 41 7", max_output_tokens=32, temperature=0)

    input: Text | Annotated[Listed[Item], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="A text, or messages, calls of tools and their answers.",
        json_schema_extra={"x-takes": "a text, or a list of items that is not empty"},
    )
    model: Text | None = Field(default=None, description="Name of the model, or nothing.")
    instructions: Text | None = Field(default=None, description="A system's message before all.")
    previous_response_id: Text | None = Field(
        default=None, description="Go on from a stored response."
    )
    store: bool | None = Field(default=None, description="false: the response is not kept.")
    max_output_tokens: int | None = Field(default=None, ge=1, le=MAX_GEN_LENGTH)
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-MAX_SEED, le=MAX_SEED)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: TextOptions | None = None
    tools: Annotated[Listed[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[NamedTool | AllowedTools, Field(discriminator="type")]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    include: Annotated[Listed[Text], Field(max_length=64)] | None = Field(
        default=None, description=f"'{LOGPROBS}' is read; nothing else is there to include."
    )
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    metadata: Annotated[Entries[Text], Field(max_length=64)] | None = Field(
        default=None, description="Given back with the response."
    )
    truncation: neutral("disabled") = None  # type: ignore[valid-type]
    background: neutral(False) = None  # type: ignore[valid-type]
    conversation: neutral() = None  # type: ignore[valid-type]
    prompt: neutral() = None  # type: ignore[valid-type]
    moderation: neutral() = None  # type: ignore[valid-type]
    context_management: neutral() = None  # type: ignore[valid-type]
    background_options: neutral() = None  # type: ignore[valid-type]
    access_programs: neutral() = None  # type: ignore[valid-type]
    image: neutral() = None  # type: ignore[valid-type]
    prompt_cache_options: neutral() = None  # type: ignore[valid-type]
    # of no meaning here, whatever their value
    user: Unread[Text] = None
    reasoning: Unread[Entries[Any]] = None
    max_tool_calls: Unread[int] = None
    service_tier: Unread[Text] = None
    safety_identifier: Unread[Text] = None
    prompt_cache_key: Unread[Text] = None
    prompt_cache_retention: Unread[Text] = None

    def items(self) -> list[dict[str, Any]]:
        """The input as items; nothing of it that is not read."""
        if isinstance(self.input, str):
            content = [{"type": "input_text", "text": self.input}]
            return [{"type": "message", "role": "user", "content": content}]
        kept = (item for item in self.input if not isinstance(item, ReasoningItem))
        return [item.model_dump(exclude_none=True) for item in kept]

    def chat(self, items: list[dict[str, Any]]) -> ChatRequest:
        """The chat that the request stands for.

        Args:
            items: all of them, with those of earlier responses and without references.

        Raises:
            ApiError: there are too many of them, or none.
        """
        told = [{"role": "system", "content": self.instructions}] if self.instructions else []
        shared = {*DecodingFields.model_fields, "temperature", "top_p", "seed", "model"}
        shared |= {"parallel_tool_calls", "stream"}
        values = {n: getattr(self, n) for n in shared if getattr(self, n) is not None}
        values["messages"] = [*told, *messages_of(items)]
        if not 1 <= len(values["messages"]) <= MAX_MESSAGES:
            count = len(values["messages"])
            raise ApiError(
                400,
                f"input makes {count} messages with those that it goes on from: 1 to "
                f"{MAX_MESSAGES} can be answered",
                code="invalid_parameter",
                param="input",
            )
        values["max_completion_tokens"] = self.max_output_tokens
        if LOGPROBS in (self.include or ()) or self.top_logprobs:
            values |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.text is not None and self.text.format is not None:
            values["response_format"] = _format(self.text.format)
        if self.tools is not None:
            read = ("name", "description", "parameters")
            functions = [
                {key: found for key in read if (found := getattr(tool, key)) is not None}
                for tool in self.tools
            ]
            values["tools"] = [{"type": "function", "function": f} for f in functions]
        if self.tool_choice is not None:
            values["tool_choice"] = _choice(self.tool_choice)
        return ChatRequest.model_validate(values)


def _format(asked: TextFormat | ObjectFormat | SchemaFormat) -> Any:
    if not isinstance(asked, SchemaFormat):
        return asked
    return {"type": "json_schema", "json_schema": {"name": asked.name, "schema": asked.schema_}}


def _choice(choice: Any) -> Any:
    def named(tool: NamedTool) -> dict[str, Any]:
        return {"type": "function", "function": {"name": tool.name}}

    if isinstance(choice, NamedTool):
        return named(choice)
    if isinstance(choice, AllowedTools):
        some = {"mode": choice.mode, "tools": [named(tool) for tool in choice.tools]}
        return {"type": "allowed_tools", "allowed_tools": some}
    return choice


def messages_of(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as messages of a chat: calls that follow each other, or words, are one message.

    Example:
        >>> call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
        >>> [len(message["tool_calls"]) for message in messages_of([call, call])]
        [2]
    """
    made: list[dict[str, Any]] = []
    for item in items:
        if item["type"] == "message":
            made.append({"role": item["role"], "content": _text(item["content"])})
        elif item["type"] == "function_call_output":
            answer = {"role": "tool", "tool_call_id": item["call_id"]}
            made.append({**answer, "content": _text(item["output"])})
        else:
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            if not made or made[-1]["role"] != "assistant":
                made.append({"role": "assistant", "content": None})
            made[-1].setdefault("tool_calls", []).append(call)
    return made


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or part.get("refusal") or "" for part in content)
