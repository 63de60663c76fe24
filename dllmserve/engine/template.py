"""Chat templates, rendered as transformers renders them.

The sandbox, the filters and the variables are transformers'; its module is not used because
importing it takes far longer than loading a tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Environment, Template, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dllmserve.errors import PromptError, TokenizerError

#: names under which clients send what a model thought; templates read the first
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the template.
        variables: of the checkpoint, such as ``bos_token``.

    Raises:
        TokenizerError: the template has errors.
    """

    sandbox: type[Environment] = ImmutableSandboxedEnvironment

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self._variables = dict(variables)
        environment = self.environment()
        try:
            self._template = self.compiled(environment, source)
        except Exception as error:  # a template is foreign code
            raise TokenizerError(f"the chat template failed: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text.

        Args:
            messages, tools: what the template is given, as plain data. ``documents`` is None.
            add_generation_prompt: end where the assistant speaks.
            continue_final_message: end where the text of the last message does.
            variables: more that the template may read, such as ``enable_thinking``.

        Raises:
            TokenizerError: the template refuses the messages, or fails, or does not show the text
                that is to be continued.
        """
        if continue_final_message:
            marked, mark = _with_mark(messages)
            text = self.render(
                marked, tools=tools, add_generation_prompt=False, variables=variables
            )
            return self._up_to(mark, text, str(messages[-1].get("content")))
        more = {name: self._data(value) for name, value in (variables or {}).items()}
        given = {**self._variables, **more, "documents": None}
        try:
            return str.__str__(
                self._template.render(
                    messages=[self._message(message) for message in messages],
                    add_generation_prompt=add_generation_prompt,
                    tools=self._data(tools),
                    **given,
                )
            )
        except (PromptError, TokenizerError):
            raise
        except Exception as error:  # a template is foreign code
            raise TokenizerError(f"the chat template failed: {self.plain(str(error))}") from error

    def _up_to(self, mark: str, text: str, content: str) -> str:
        """A rendered text up to the mark behind the last message's content."""
        place = text.rfind(mark)
        if place < 0 or content.strip() not in self.plain(text):
            raise TokenizerError(
                "the chat template does not show the text of the last message as it is, so "
                "continue_final_message cannot be used"
            )
        if text[place + 1 : place + 2] == " ":
            return text[:place]
        # the template strips texts, so what stands before the mark is to be without blanks, too
        blanks = len(content) - len(content.rstrip())
        ends = blanks and self.plain(text[:place]).endswith(content[-blanks:])
        return text[: place - blanks] if ends else text[:place]

    def environment(self) -> Environment:
        """What the template may use."""
        made = self.sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )

        def raise_exception(message: Any) -> None:
            text = self.plain(str(message))
            raise TokenizerError(f"the chat template refused the messages: {text}")

        made.filters["tojson"] = self.json
        made.globals["raise_exception"] = raise_exception
        made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return made

    def compiled(self, environment: Environment, source: str) -> Template:
        """The template, from its source."""
        return environment.from_string(source)

    def json(self, value: Any, **options: Any) -> str:
        """The filter "tojson"."""
        return json.dumps(value, **{"ensure_ascii": False, **options})

    def text(self, text: str) -> str:
        """A text of a user, as the template gets it."""
        return text

    def role(self, role: str) -> str:
        """A message's role, as the template gets it."""
        return role

    def plain(self, text: str) -> str:
        """What a template says of its failure, for people."""
        return text

    def _message(self, given: Mapping[str, Any]) -> dict[Any, Any]:
        """A message as templates get it: without empty keys, thoughts under the usual names."""
        message: dict[Any, Any] = {k: v for k, v in self._data(given).items() if v is not None}
        if isinstance(role := given.get("role"), str):
            message["role"] = self.role(str.__str__(role))
        thought = next((message[key] for key in _REASONING if key in message), None)
        if thought is None:
            return message
        return {"thinking": thought, **message, "reasoning_content": thought}

    def _data(self, value: Any) -> Any:
        """Plain data for a template, which must not reach objects of the program."""
        if isinstance(value, str):
            return self.text(str.__str__(value))
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, Mapping):
            keys = (self.text(key) if isinstance(key, str) else key for key in value)
            return dict(zip(keys, map(self._data, value.values()), strict=True))
        if isinstance(value, (list, tuple)):
            return [self._data(item) for item in value]
        return f"<{type(value).__name__}>"


def _with_mark(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """Messages whose last one ends with a character that stands nowhere else, and a blank."""
    said = json.dumps(messages, ensure_ascii=False, default=str)
    mark = next(c for c in map(chr, range(0xF8FF, 0xE000, -1)) if c not in said)
    last = messages[-1]
    return [*messages[:-1], {**last, "content": f"{last.get('content') or ''}{mark} "}], mark


class _Generation(Extension):
    """``{% generation %}`` tells trainers what the assistant said; here it is a scope."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 has it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)
