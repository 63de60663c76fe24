"""Reads a JSON schema: references, combinators and keywords, down to flat alternatives."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from dllmserve.constraints import limits
from dllmserve.constraints.schema_merge import TYPES, Flat, merged, refused

#: keywords that say nothing about what is valid
_ANNOTATIONS = frozenset(
    "title description default examples example deprecated readOnly writeOnly discriminator "
    "contentEncoding contentMediaType contentSchema $schema $id $comment $anchor $vocabulary "
    "$defs definitions id".split()
)
_COMBINATORS = frozenset(("$ref", "allOf", "anyOf", "oneOf"))
_COUNTS = frozenset("minLength maxLength minItems maxItems minProperties maxProperties".split())
_NUMBERS = frozenset("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split())
_OTHERS = frozenset(
    "type enum const properties required additionalProperties pattern format items prefixItems "
    "additionalItems uniqueItems not".split()
)
KEYWORDS = _COUNTS | _NUMBERS | _OTHERS
#: most alternatives that anyOf, oneOf and allOf together may make of one schema
_MAX_ALTERNATIVES = 1024
_MAX_PARTS = 20_000
#: most pairs of alternatives of oneOf that are told apart
_MAX_PAIRS = 5_000


def read_schema(text: str) -> Any:
    """A schema's JSON, with numbers that are no integers as Decimal.

    Raises:
        SchemaError: it is no JSON.
    """
    if len(text) > limits.MAX_TEXT:
        raise refused("", f"its text has {len(text):,} characters, at most {limits.MAX_TEXT:,}")
    try:
        return json.loads(text, parse_float=_number, parse_constant=_number)
    except (ValueError, RecursionError) as error:
        raise refused("", f"it is no JSON: {error}") from error


def _number(text: str) -> Decimal:
    """As a float is written, so that it is what a validator compares with."""
    value = float(text)
    if value - value != 0:
        raise ValueError(f"{text} is no number of JSON that can be used")
    return Decimal(repr(value))


class Flattener:
    """Schemas as alternatives without combinators.

    Args:
        root: the whole schema, to which references point.
        apart: says whether no value is valid under both of two flat schemas.
    """

    def __init__(self, root: Any, apart: Callable[[Flat, Flat], bool]) -> None:
        self._root = root
        self._apart = apart
        self._parts = self._pairs = 0

    def flat(self, schema: Any, where: str, refs: frozenset[str]) -> list[Flat]:
        """Alternatives: a value is valid if it is valid under any of them.

        Args:
            schema: a part of the schema.
            where: its JSON pointer, for errors.
            refs: references that lead to it, which must not come again.

        Raises:
            SchemaError: it is wrong, recursive, or not supported.
        """
        self._parts += 1
        limits.check(self._parts, _MAX_PARTS, "the number of its parts, references written out,")
        if isinstance(schema, bool):
            return [{"$refs": refs}] if schema else []
        if not isinstance(schema, dict):
            raise refused(where, f"a schema must be an object or a boolean, got {schema!r}")
        found: list[Flat] = [{"$refs": refs, **self._own(schema, where)}]
        if "$ref" in schema:
            found = self._product(found, self._referred(schema["$ref"], where, refs), where)
        for i, part in enumerate(_list(schema, "allOf", where)):
            found = self._product(found, self.flat(part, f"{where}/allOf/{i}", refs), where)
        for name in ("anyOf", "oneOf"):
            if name in schema:
                branches = [
                    self._product(found, self.flat(part, f"{where}/{name}/{i}", refs), where)
                    for i, part in enumerate(_list(schema, name, where))
                ]
                if name == "oneOf":
                    self._check_apart(branches, where)
                found = [flat for branch in branches for flat in branch]
        return found

    def _product(self, a: list[Flat], b: list[Flat], where: str) -> list[Flat]:
        if len(a) * len(b) > _MAX_ALTERNATIVES:
            raise refused(where, f"its alternatives are more than {_MAX_ALTERNATIVES:,}")
        pairs = [merged(x, y) for x in a for y in b]
        return [flat for flat in pairs if flat is not None]

    def _check_apart(self, branches: list[list[Flat]], where: str) -> None:
        for j, later in enumerate(branches):
            for i, earlier in enumerate(branches[:j]):
                self._pairs += len(earlier) * len(later)
                limits.check(self._pairs, _MAX_PAIRS, "the number of pairs in oneOf")
                if not all(self._apart(a, b) for a in earlier for b in later):
                    raise refused(
                        where,
                        f"oneOf/{i} and oneOf/{j} may both be valid, or that they are not cannot "
                        "be shown; use anyOf, or give both a required property with different "
                        "constants",
                    )

    def _referred(self, ref: Any, where: str, refs: frozenset[str]) -> list[Flat]:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise refused(
                where, f"$ref {ref!r} is not supported: only pointers into the schema, '#/...'"
            )
        if ref in refs:
            raise refused(
                where, f"$ref {ref!r} is recursive, which no regular language is: write it out"
            )
        target = self._root
        for step in ref[2:].split("/") if len(ref) > 1 else []:
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and name in target:
                target = target[name]
            elif isinstance(target, list) and name.isdigit() and int(name) < len(target):
                target = target[int(name)]
            else:
                raise refused(where, f"$ref {ref!r} leads nowhere")
        return self.flat(target, ref[1:], refs | {ref})

    def _own(self, schema: dict[str, Any], where: str) -> Flat:
        """The schema's own keywords, checked."""
        found: Flat = {}
        for key, value in schema.items():
            if key in KEYWORDS:
                found[key] = _checked(key, value, where)
            elif key not in _ANNOTATIONS and key not in _COMBINATORS and not key.startswith("x-"):
                raise refused(where, f"the keyword {key!r} is not supported")
        if "const" in found:
            constant = [found.pop("const")]
            both = merged({"enum": constant}, {"enum": found.get("enum", constant)})
            found["enum"] = [] if both is None else both["enum"]
        _old_tuples(found, where)
        return found


def _old_tuples(found: Flat, where: str) -> None:
    """Drafts before 2020-12 have a list in ``items``, and ``additionalItems``."""
    rest = found.pop("additionalItems", None)
    if isinstance(found.get("items"), list):
        if "prefixItems" in found:
            raise refused(where, "a list in items and prefixItems at once are not supported")
        found["prefixItems"] = found.pop("items")
        if rest is not None:
            found["items"] = rest


def _list(schema: dict[str, Any], key: str, where: str) -> list[Any]:
    found = schema.get(key, [])
    if not isinstance(found, list) or (key in schema and not found):
        raise refused(where, f"{key} must be a list that is not empty, got {found!r}")
    return found


def _checked(key: str, value: Any, where: str) -> Any:
    """A keyword's value in the form that flat schemas have."""
    wrong = refused(where, f"{key} cannot be {value!r}")
    number = isinstance(value, (int, Decimal)) and not isinstance(value, bool)
    if key in _COUNTS:
        if not number or value < 0 or value != int(value):
            raise wrong
        return int(value)
    if key in _NUMBERS:
        if not number or (key == "multipleOf" and value <= 0):
            raise wrong
        return Decimal(value)
    if key == "type":
        types = (value,) if isinstance(value, str) else value
        if not isinstance(types, (list, tuple)) or not types or any(t not in TYPES for t in types):
            raise wrong
        return tuple(dict.fromkeys(types))
    kinds: dict[str, Any] = {
        "enum": list,
        "required": list,
        "prefixItems": list,
        "properties": dict,
        "pattern": str,
        "format": str,
        "uniqueItems": bool,
        "items": (dict, bool, list),
        "additionalItems": (dict, bool),
        "additionalProperties": (dict, bool),
        "not": (dict, bool),
    }
    if key in kinds and not isinstance(value, kinds[key]):
        raise wrong
    if key == "required" and not all(isinstance(name, str) for name in value):
        raise wrong
    return [value] if key in ("pattern", "format", "not") else value
