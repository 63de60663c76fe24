"""Texts that are put together of parts: fixed texts, expressions, schemas, and what repeats.

The server says so what calls of tools are. Such a text stands where a JSON schema does, as
``{"x-dllmserve-sequence": [part, ...]}``; a part is

- a text, which stands there as it is;
- ``{"regex": expression}``;
- ``{"schema": JSON schema}``, a document of its own: its ``#`` is itself;
- ``{"anyOf": [[part, ...], ...]}``, one of several;
- ``{"repeat": [part, ...], "between": text}``, once or more often.
"""

from __future__ import annotations

import json
from typing import Any

from dllmserve.constraints.nodes import Concat, Node, Repeat, either, text
from dllmserve.constraints.regex import parse
from dllmserve.constraints.schema import schema_node
from dllmserve.errors import InvalidParameterError

SEQUENCE = "x-dllmserve-sequence"


def sequence_of(json_schema: str) -> list[Any] | None:
    """The parts that stand in place of a schema; None for a schema.

    Example:
        >>> sequence_of('{"x-dllmserve-sequence": ["a"]}'), sequence_of('{"type": "null"}')
        (['a'], None)
    """
    if SEQUENCE not in json_schema:
        return None
    read = json.loads(json_schema)
    return _list(read[SEQUENCE]) if isinstance(read, dict) and list(read) == [SEQUENCE] else None


def sequence(parts: list[Any]) -> Node:
    """The language of parts that follow each other.

    Raises:
        InvalidParameterError: a part is none, or what it holds is not supported.
    """
    return Concat(tuple(_part(part) for part in parts))


def _part(part: Any) -> Node:
    match part:
        case str():
            return text(part)
        case {"regex": str(expression), **rest} if not rest:
            return parse(expression, "regex")
        case {"schema": document, **rest} if not rest:
            return schema_node(json.dumps(document))
        case {"anyOf": [*options], **rest} if not rest and options:
            return either(sequence(_list(option)) for option in options)
        case {"repeat": [*repeated], "between": str(between), **rest} if not rest:
            return Repeat(sequence(repeated), 1, None, text(between))
    raise InvalidParameterError(f"json_schema has a part that {SEQUENCE} does not know: {part!r}")


def _list(parts: Any) -> list[Any]:
    if isinstance(parts, list):
        return parts
    raise InvalidParameterError(f"json_schema: {SEQUENCE} takes lists of parts, got {parts!r}")
