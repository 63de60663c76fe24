"""JSON schemas without combinators: what several that hold at once amount to."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from dllmserve.errors import InvalidParameterError

#: a schema without $ref, allOf, anyOf, oneOf, const and annotations; see :func:`merged`
Flat = dict[str, Any]

TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")


class SchemaError(InvalidParameterError):
    """A schema that is wrong or not supported."""


def refused(where: str, why: str) -> SchemaError:
    """The error for a part of the schema.

    Args:
        where: its JSON pointer; empty for the whole.
        why: what is wrong with it.
    """
    return SchemaError(f"json_schema{f' at {where}' if where else ''}: {why}")


def same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal; 1 and true are not, 1 and 1.0 are."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def type_of(value: Any) -> str:
    """JSON Schema's name of a value's type; "integer" for 1.0, too."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, Decimal)):
        return "integer" if value == int(value) else "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def both_types(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    """Types that are in both; every integer is a number."""
    found = [t for t in a if t in b or (t == "integer" and "number" in b)]
    found += [t for t in b if t == "integer" and "number" in a and t not in found]
    return tuple(found)


def _common(a: list[Any], b: list[Any]) -> list[Any]:
    return [value for value in a if any(same(value, other) for other in b)]


def _joined(a: list[Any], b: list[Any]) -> list[Any]:
    return [*a, *(value for value in b if value not in a)]


def _multiple(a: Any, b: Any) -> Any:
    if a == int(a) and b == int(b):
        return math.lcm(int(a), int(b))
    raise refused("", f"multipleOf {a} and multipleOf {b} at once are not supported")


_RULES: dict[str, Callable[[Any, Any], Any]] = {
    "type": both_types,
    "enum": _common,
    "required": _joined,
    "pattern": _joined,
    "format": _joined,
    "minimum": max,
    "exclusiveMinimum": max,
    "maximum": min,
    "exclusiveMaximum": min,
    "multipleOf": _multiple,
    "minLength": max,
    "maxLength": min,
    "minItems": max,
    "maxItems": min,
    "minProperties": max,
    "maxProperties": min,
    "uniqueItems": lambda a, b: a or b,
    "not": lambda a, b: [*a, *b],
    "$refs": lambda a, b: a | b,
}
_OBJECT = ("properties", "additionalProperties")
_ARRAY = ("prefixItems", "items")


def merged(a: Flat, b: Flat) -> Flat | None:
    """One schema for what two demand at once; None if their types or constants exclude each other.

    In a flat schema ``type`` is a tuple, ``pattern``, ``format`` and ``not`` are lists, ``enum``
    holds what ``const`` said, too, and ``$refs`` names the references that led to it.

    Raises:
        SchemaError: they cannot be merged.
    """
    found = dict(a)
    for key, value in b.items():
        if key in _OBJECT or key in _ARRAY:
            continue
        found[key] = _RULES[key](found[key], value) if key in found else value
    if found.get("type") == () or found.get("enum") == []:
        return None
    _merge_objects(a, b, found)
    _merge_arrays(a, b, found)
    return found


def _both(a: Any, b: Any) -> Any:
    """A schema for two."""
    if a is True or b is True:
        return b if a is True else a
    return False if a is False or b is False else {"allOf": [a, b]}


def _merge_objects(a: Flat, b: Flat, found: Flat) -> None:
    if not any(key in b for key in _OBJECT):
        return
    others = a.get("additionalProperties", True), b.get("additionalProperties", True)
    own, theirs = a.get("properties", {}), b.get("properties", {})
    found["properties"] = {
        name: _both(own.get(name, others[0]), theirs.get(name, others[1]))
        for name in {**own, **theirs}
    }
    if "properties" not in a and "properties" not in b:
        del found["properties"]
    found["additionalProperties"] = _both(*others)


def _merge_arrays(a: Flat, b: Flat, found: Flat) -> None:
    if not any(key in b for key in _ARRAY):
        return
    others = a.get("items", True), b.get("items", True)
    own, theirs = a.get("prefixItems", []), b.get("prefixItems", [])
    count = max(len(own), len(theirs))
    own = own + [others[0]] * (count - len(own))
    theirs = theirs + [others[1]] * (count - len(theirs))
    found["prefixItems"] = [_both(x, y) for x, y in zip(own, theirs, strict=True)]
    if "items" in a or "items" in b:
        found["items"] = _both(*others)
