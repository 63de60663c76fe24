"""Structured output: what ``response_format`` and its like ask for, as fields of SamplingParams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import Field

from dllmserve._values import MAX_CHOICES
from dllmserve.errors import InvalidRequestError
from dllmserve.server.failures import ApiError
from dllmserve.server.fields import Body, Choice, Entries, Listed, Text

#: any JSON object
ANY_OBJECT = {"type": "object"}
_Schema = Text | bool | Entries[Any]
_Choices = Annotated[Listed[Choice], Field(min_length=1, max_length=MAX_CHOICES)]


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Body):
    """Any JSON object, or one that is valid by a schema (llama.cpp's form)."""

    type: Literal["json_object"]
    schema_: Entries[Any] | None = Field(default=None, alias="schema")


class NamedSchema(Body):
    """A JSON schema. The answer is always valid by it, with ``strict`` or without."""

    name: Text | None = Field(default=None, description="Not read.")
    description: Text | None = Field(default=None, description="Not read.")
    schema_: bool | Entries[Any] | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="Not read: every schema is kept to.")


class SchemaFormat(Body):
    """JSON that is valid by a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """vLLM's form of the same."""

    json_: _Schema | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: _Choices | None = None
    json_object: bool | None = None


class StructuredFields(Body):
    """Names under which clients say what an answer has to match."""

    response_format: Format | None = Field(default=None, description="text, or JSON.")
    structured_outputs: StructuredOutputs | None = Field(default=None, description="vLLM's.")
    guided_json: _Schema | None = Field(default=None, description="As json_schema.")
    guided_regex: Text | None = Field(default=None, description="As regex.")
    guided_choice: _Choices | None = Field(default=None, description="As choice.")

    def constraint(self) -> dict[str, Any]:
        """The field of SamplingParams that is asked for; empty if any text will do.

        Raises:
            ApiError: two fields ask for something.
        """
        asked = self._asked()
        if len(asked) > 1:
            first, second = asked[0][0], asked[1][0]
            raise ApiError(
                400,
                f"{first} and {second} both say what the answer has to match: give one of them",
                code="invalid_parameter",
                param=second.partition(".")[0],
            )
        return {field: value for _, field, value in asked}

    @contextmanager
    def own_names(self, tools: str | None = None) -> Iterator[None]:
        """Errors inside of it name the field that was given, not the one that it stands for.

        Args:
            tools: the field that has tools, if there are any.
        """
        try:
            yield
        except InvalidRequestError as error:
            asked = [(tools, "json_schema")] if tools else [found[:2] for found in self._asked()]
            for name, field in asked:
                if name != field and str(error).startswith(field):
                    text, param = str(error).removeprefix(field), name.partition(".")[0]
                    raise ApiError(400, name + text, code=error.code, param=param) from error
            raise

    def _asked(self) -> list[tuple[str, str, Any]]:
        """Name, field of SamplingParams and value of all that is asked for."""
        own = ((name, name, getattr(self, name)) for name in ("json_schema", "regex", "choice"))
        return [found for found in (*own, *self._aliases()) if found[2] is not None]

    def _aliases(self) -> list[tuple[str, str, Any]]:
        """Name, field and value of each alias."""
        found = [
            ("response_format", "json_schema", _schema(self.response_format)),
            ("guided_json", "json_schema", self.guided_json),
            ("guided_regex", "regex", self.guided_regex),
            ("guided_choice", "choice", self.guided_choice),
        ]
        if (more := self.structured_outputs) is not None:
            name = "structured_outputs"
            found += [
                (f"{name}.json", "json_schema", more.json_),
                (f"{name}.regex", "regex", more.regex),
                (f"{name}.choice", "choice", more.choice),
                (f"{name}.json_object", "json_schema", ANY_OBJECT if more.json_object else None),
            ]
        return found


def _schema(asked: TextFormat | ObjectFormat | SchemaFormat | None) -> Any:
    """The schema that a response format stands for; None for any text."""
    if isinstance(asked, ObjectFormat):
        return ANY_OBJECT if asked.schema_ is None else asked.schema_
    if isinstance(asked, SchemaFormat):
        schema = asked.json_schema.schema_
        return ANY_OBJECT if schema is None else schema
    return None
