"""Chat templates, rendered as transformers renders them.

The sandbox, the filters and the variables are transformers'; its module is not used because
importing it takes far longer than loading a tokenizer.json.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Environment, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from dllmserve.engine.codec import valid_text
from dllmserve.engine.marked import MarkedText, Marks, unmarked
from dllmserve.errors import PromptError, TokenizerError

#: names under which clients send what a model thought; templates read the first
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the template.
        variables: of the checkpoint, such as ``bos_token``.
        marks: for texts of users that are marked, see :mod:`dllmserve.engine.marked`.

    Raises:
        TokenizerError: the template has errors.
    """

    def __init__(self, source: str, variables: Mapping[str, str], marks: Marks) -> None:
        self._variables, self._marks = dict(variables), marks
        environment = _environment(marks)
        try:
            tree = _Joins().visit(environment.parse(source))
            self._template = environment.from_string(tree)
        except Exception as error:  # a template is foreign code
            raise TokenizerError(f"the chat template failed: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        marked: bool = False,
    ) -> str:
        """The prompt's text.

        Args:
            messages, tools: what the template is given, as plain data. ``documents`` is None.
            add_generation_prompt: end where the assistant speaks.
            marked: mark every text in them; the result then holds marks.

        Raises:
            TokenizerError: the template refuses the messages, or fails.
            PromptError: a text that is to be marked is no valid Unicode.
        """
        marks = self._marks if marked else None
        given = {"tools": tools, "documents": None}
        try:
            return str.__str__(
                self._template.render(
                    messages=[_message(message, marks) for message in messages],
                    add_generation_prompt=add_generation_prompt,
                    **{name: _data(value, marks) for name, value in given.items()},
                    **self._variables,
                )
            )
        except (PromptError, TokenizerError):
            raise
        except Exception as error:  # a template is foreign code
            reason = self._marks.plain(str(error))
            raise TokenizerError(f"the chat template failed: {reason}") from error


def _message(given: Mapping[str, Any], marks: Marks | None) -> dict[Any, Any]:
    """A message as templates get it: without empty keys, thoughts under the usual names."""
    message: dict[Any, Any] = {k: v for k, v in _data(given, marks).items() if v is not None}
    role = given.get("role")
    if marks is not None and isinstance(role, str):
        message["role"] = marks.mark_name(role)
    thought = next((message[key] for key in _REASONING if key in message), None)
    if thought is None:
        return message
    return {"thinking": thought, **message, "reasoning_content": thought}


def _data(value: Any, marks: Marks | None) -> Any:
    """Plain data for a template, which must not reach objects of the program; marked if asked."""
    if isinstance(value, str):
        text = str.__str__(value)
        return text if marks is None else marks.mark(valid_text(text))
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {_key(key, marks): _data(item, marks) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_data(item, marks) for item in value]
    return f"<{type(value).__name__}>"


def _key(key: Any, marks: Marks | None) -> Any:
    return marks.mark(valid_text(key)) if marks and isinstance(key, str) else key


class _Generation(Extension):
    """``{% generation %}`` tells trainers what the assistant said; here it is a scope."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 has it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Joins(NodeTransformer):
    """``a ~ b`` becomes ``[a, b] | join``, which is the same, and a filter."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        items = nodes.List(node.nodes).set_lineno(node.lineno)
        joined = nodes.Filter(items, "join", [], [], None, None)
        joined.set_lineno(node.lineno)
        return joined


class _Sandbox(ImmutableSandboxedEnvironment):
    """Whatever puts texts together gives a MarkedText if there are marks in the result."""

    wrap: Callable[[Any], Any]

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self.wrap(super().call(context, obj, *args, **kwargs))


def _environment(marks: Marks) -> Environment:
    def wrap(value: Any) -> Any:
        return marks.wrap(value) if type(value) is str else value

    def concat(parts: Iterable[str]) -> str:
        return marks.wrap("".join(parts))

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)  # keeps what jinja2 says of its arguments
        def result(*args: Any, **kwargs: Any) -> Any:
            return wrap(call(*args, **kwargs))

        return result

    def raise_exception(message: Any) -> None:
        text = marks.plain(str(message))
        raise TokenizerError(f"the chat template refused the messages: {text}")

    def tojson(value: Any, **options: Any) -> str:
        text = json.dumps(unmarked(value), **{"ensure_ascii": False, **options})
        return marks.mark(text) if _has_marks(value) else text

    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.wrap = wrap
    environment.concat = concat  # type: ignore[method-assign]
    environment.filters = {name: wrapped(call) for name, call in environment.filters.items()}
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _has_marks(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_marks(item) for pair in value.items() for item in pair)
    if isinstance(value, (list, tuple)):
        return any(map(_has_marks, value))
    return isinstance(value, MarkedText)
