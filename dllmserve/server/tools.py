"""Tools of a request: what they are, which of them may be called, and what an answer may be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from dllmserve.engine.tool_form import ToolForm
from dllmserve.server.failures import ApiError
from dllmserve.server.fields import Body, Entries, Listed, Text
from dllmserve.server.openai_messages import Said

#: definitions of tools
MAX_TOOLS = 1024
#: parameters of a tool that says nothing of them
_NONE: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

ToolName = Annotated[
    str,
    Field(
        pattern=r"^[a-zA-Z0-9_.:-]{1,128}$",
        json_schema_extra={"x-takes": "a name of 1 to 128 letters, digits, '_', '-', '.' and ':'"},
    ),
]


class FunctionDefinition(Said):
    """A function that the model may call. Its arguments are always valid by its parameters."""

    name: ToolName
    description: Text | None = Field(default=None, description="For the model.")
    parameters: Entries[Any] | None = Field(
        default=None, description="JSON schema of an object; none: no arguments."
    )
    strict: bool | None = Field(default=None, exclude=True, description="Not read: always kept to.")


class Tool(Said):
    """A tool."""

    other_type = "only tools of type 'function' are known here"

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Body):
    """A function by its name."""

    name: ToolName


class NamedTool(Body):
    """This tool is called."""

    type: Literal["function"]
    function: NamedFunction


class SomeTools(Body):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[Listed[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Body):
    """Only some of the tools may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: SomeTools


Tools = Annotated[Listed[Tool], Field(max_length=MAX_TOOLS)]
Functions = Annotated[Listed[FunctionDefinition], Field(max_length=MAX_TOOLS)]
ToolChoice = (
    Literal["none", "auto", "required"]
    | Annotated[NamedTool | AllowedTools, Field(discriminator="type")]
)
FunctionChoice = Literal["none", "auto"] | NamedFunction


class ToolFields(Body):
    """Tools, under both of OpenAI's names."""

    tools: Tools | None = Field(default=None, description="What the model may call.")
    tool_choice: ToolChoice | None = Field(
        default=None, description="auto: text or calls. none: tools are not shown to the model."
    )
    parallel_tool_calls: bool | None = Field(default=None, description="false: one call at most.")
    functions: Functions | None = Field(default=None, description="As tools, by an older name.")
    function_call: FunctionChoice | None = Field(default=None, description="As tool_choice.")

    def tool_use(self) -> ToolUse | None:
        """The tools that may be called; None without any. They are taken out of the body.

        Raises:
            ApiError: a choice of what is not there, or two tools of one name.
        """
        older = self.functions is not None or self.function_call is not None
        newer = self.tools is not None or self.tool_choice is not None
        names = ("functions", "function_call") if older else ("tools", "tool_choice")
        if older and newer:
            raise _wrong(f"{names[0]} is the older name of tools: give one of them", names[0])
        functions = self.functions if older else [t.function for t in self.tools or ()]
        choice = self.function_call if older else self.tool_choice
        given = {function.name: function for function in functions or ()}
        if len(given) < len(functions or ()):
            raise _wrong(f"{names[0]} has two entries of one name", names[0])
        for name, function in given.items():
            kind = (function.parameters or {}).get("type", "object")
            if kind != "object" and not (isinstance(kind, list) and "object" in kind):
                text = f"the parameters of '{name}' in {names[0]} must be a schema of an object"
                raise _wrong(text, names[0])
        self.tools = self.functions = None  # the request keeps them no longer than it needs them
        if choice == "none" or (not given and choice in (None, "auto")):
            return None
        mode, allowed = _chosen(choice)
        if not given:
            raise _wrong(f"{names[1]} asks for a call, but there are no {names[0]}", names[1])
        if getattr(self, "stop", None):
            raise _wrong(
                f"stop may cut a call of one of the {names[0]} in two: leave it out", "stop"
            )
        for name in allowed or ():
            if name not in given:
                raise _wrong(f"{names[1]} names '{name}', which is not in {names[0]}", names[1])
        return ToolUse(
            [given[name] for name in given],
            frozenset(given if allowed is None else allowed),
            mode,
            parallel=self.parallel_tool_calls is not False and not older and mode != "named",
            older=older,
        )


def told_tools(functions: Iterable[FunctionDefinition]) -> list[dict[str, Any]]:
    """Tools as chat templates read them."""
    return [
        {"type": "function", "function": {"parameters": _NONE, **f.model_dump(exclude_none=True)}}
        for f in functions
    ]


def _wrong(text: str, param: str) -> ApiError:
    return ApiError(400, text, code="invalid_parameter", param=param)


def _chosen(choice: Any) -> tuple[Literal["auto", "required", "named"], list[str] | None]:
    """What has to be done, and the tools that are allowed; None is all of them."""
    if isinstance(choice, NamedTool):
        return "named", [choice.function.name]
    if isinstance(choice, NamedFunction):
        return "named", [choice.name]
    if isinstance(choice, AllowedTools):
        some = choice.allowed_tools
        return some.mode, [tool.function.name for tool in some.tools]
    return "required" if choice == "required" else "auto", None


@dataclass(frozen=True)
class ToolUse:
    """Tools of a request.

    Attributes:
        functions: all of them, which the model is told of.
        allowed: names of those that may be called.
        mode: "auto" allows a text as well, "required" asks for calls, "named" for one.
        parallel: several calls are allowed.
        older: the answer has a function_call in place of tool_calls.
    """

    functions: Sequence[FunctionDefinition]
    allowed: frozenset[str]
    mode: Literal["auto", "required", "named"]
    parallel: bool
    older: bool = False

    def constraint(self, form: ToolForm, asked: dict[str, Any]) -> dict[str, Any]:
        """What the answer has to match, as fields of SamplingParams.

        Args:
            form: how calls are written.
            asked: what a text has to match, as fields of SamplingParams.
        """
        from dllmserve.constraints.sequence import SEQUENCE  # loads numpy

        one = {"anyOf": [self._call(form, f) for f in self.functions if f.name in self.allowed]}
        calls: Any = one
        if self.parallel:
            calls = {"repeat": [one], "between": form.separator}
        if self.mode != "auto":
            parts = [calls]
        elif asked:
            parts = [{"anyOf": [[_part(asked)], [calls]]}]
        else:
            # words before the calls are usual
            text = {"regex": without(form.before)}
            parts = [{"anyOf": [[text], [text, calls]]}]
        return {"json_schema": {SEQUENCE: parts}}

    @staticmethod
    def _call(form: ToolForm, function: FunctionDefinition) -> list[Any]:
        schema = _NONE if function.parameters is None else function.parameters
        return [form.head(function.name), {"schema": {**schema, "type": "object"}}, form.after]


def _part(asked: dict[str, Any]) -> dict[str, Any]:
    """Parts of a text for what it has to match."""
    if "choice" in asked:
        return {"anyOf": [[text] for text in asked["choice"]]}
    return {"regex": asked["regex"]} if "regex" in asked else {"schema": asked["json_schema"]}


#: blanks as regular expressions write them
_BLANKS = {" ": " ", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def without(mark: str) -> str:
    """A regular expression for all texts in which a mark is not found.

    Args:
        mark: of two characters at least, of which the first is not found again in it.

    Example:
        >>> [bool(re.fullmatch(without("<a>"), text)) for text in ("b <a <b> <", "b <a>")]
        [True, False]
    """
    first, *rest = (re.escape(c) if c.isprintable() and c != " " else _BLANKS[c] for c in mark)
    # started: the mark up to any of its characters but the last
    # broken: the same, and a character with which it is the mark no more
    started, broken = "", f"[^{rest[-1]}{first}]"
    for place in range(len(rest) - 2, -1, -1):
        started = f"(?:{rest[place]}{started})?"
        broken = f"(?:{rest[place]}{broken}|[^{rest[place]}{first}])"
    started = first + started
    return f"(?:[^{first}]|(?:{started})*{first}{broken})*(?:{started})*"
