"""From a JSON schema to the texts of the values that are valid by it.

What is written is a subset of what is valid: properties come in the order of the schema, none that
it does not name, and spaces stand in one way. What cannot be kept exactly is refused by name.
"""

from __future__ import annotations

import functools
from typing import Any

from dllmserve.constraints import json_text, nodes
from dllmserve.constraints.json_formats import FORMATS
from dllmserve.constraints.json_numbers import decimals, integers
from dllmserve.constraints.nodes import (
    EMPTY,
    NOTHING,
    Embedded,
    Members,
    Node,
    Repeat,
    concat,
    either,
    text,
)
from dllmserve.constraints.schema_flat import read_schema
from dllmserve.constraints.schema_merge import Flat, SchemaError, refused, same
from dllmserve.constraints.schema_values import Values
from dllmserve.errors import InvalidParameterError

#: how deep objects and arrays may be nested where a schema allows any JSON object
FREE_DEPTH = 4
#: most values that an array without repeats may choose from
_MAX_UNIQUE = 8

#: types that keywords speak of, for schemas that name none
_SPEAKS_OF = {
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_Refs = frozenset[str]


def schema_node(schema: str) -> Node:
    """The texts of the values that a schema describes, as JSON.

    ``{"type": "object"}`` alone is any JSON object, nested up to :data:`FREE_DEPTH` deep.

    Raises:
        InvalidParameterError: the schema is wrong, or holds what is not supported.
    """
    try:
        root = read_schema(schema)
        reader = _Reader(root)
        flat = reader.flat(root, "", frozenset())
        if [_plain(one) for one in flat] == [{"type": ("object",)}]:
            return free_object(FREE_DEPTH)
        return reader.alternatives(flat, "")
    except SchemaError as error:
        raise InvalidParameterError(str(error)) from error  # other processes know that one
    except RecursionError as error:
        raise InvalidParameterError("json_schema is nested too deeply") from error


def _plain(flat: Flat) -> Flat:
    found = {key: value for key, value in flat.items() if key != "$refs"}
    if found.get("additionalProperties") is True:
        del found["additionalProperties"]
    return found


def free_object(depth: int) -> Node:
    """Any JSON object, with objects and arrays in it up to a depth. Keys may come twice."""
    key = concat(json_text.string(0, None), json_text.COLON)
    return _braces(concat(key, _free_value(depth - 1)))


def _free_value(depth: int) -> Node:
    scalar = [json_text.string(0, None), json_text.NUMBER, *map(text, ("true", "false", "null"))]
    if not depth:
        return either(scalar)
    members = Repeat(_free_value(depth - 1), 0, None, json_text.COMMA)
    return either([*scalar, concat(text("["), members, text("]")), free_object(depth)])


def _braces(member: Node) -> Node:
    return concat(text("{"), Repeat(member, 0, None, json_text.COMMA), text("}"))


class _Reader(Values):
    """One schema, from its parts to their texts."""

    def node(self, schema: Any, where: str, refs: _Refs) -> Node:
        """Texts of a part of the schema."""
        return self.alternatives(self.flat(schema, where, refs), where)

    def alternatives(self, flat: list[Flat], where: str) -> Node:
        """Texts of values that are valid under any of some schemas."""
        return either(self._texts(one, where) for one in flat)

    def _texts(self, flat: Flat, where: str) -> Node:
        if "enum" in flat:
            values = [v for v in flat["enum"] if self.valid(v, flat, where)]
            return either(self._constant(value, where) for value in values)
        types = self._types(flat, where)
        if "number" in types:
            types = tuple(t for t in types if t != "integer")
        makers = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._integer,
            "number": self._number,
        }
        parts = []
        for kind in types:
            if kind in ("boolean", "null"):
                values = [None] if kind == "null" else [True, False]
                parts += [json_text.constant(v) for v in values if self.valid(v, flat, where)]
            elif kind in ("string", "integer") or not self.forbidden(flat, kind, where):
                parts.append(makers[kind](flat, where))
            else:
                raise refused(
                    where,
                    f"the keyword 'not' is not supported here: it forbids values of type {kind}",
                )
        return either(parts)

    def _constant(self, value: Any, where: str) -> Node:
        written = json_text.value_text(value)
        try:
            written.encode()
        except UnicodeEncodeError as error:
            raise refused(where, "a constant holds a lone surrogate") from error
        return text(written)

    def _types(self, flat: Flat, where: str) -> tuple[str, ...]:
        if "type" in flat:
            return tuple(flat["type"])
        found = tuple(kind for kind, keys in _SPEAKS_OF.items() if any(k in flat for k in keys))
        if not found:
            raise refused(
                where,
                "it allows any JSON value, which no regular language is: give a type (json_schema="
                '{"type": "object"} alone is any object, of a bounded depth)',
            )
        return found

    # strings

    def _string(self, flat: Flat, where: str) -> Node:
        low, high = flat.get("minLength", 0), flat.get("maxLength")
        if high is not None and low > high:
            return NOTHING
        self.check_formats(flat, where)
        free = "pattern" not in flat and not any(name in FORMATS for name in flat.get("format", ()))
        if free and not self.forbidden(flat, "string", where):
            return json_text.string(low, high)
        return json_text.quoted(self.strings(flat, where))

    # numbers

    def _integer(self, flat: Flat, where: str) -> Node:
        if "multipleOf" in flat or self.forbidden(flat, "integer", where):
            return Embedded(self.integers(flat, where))
        return integers(self.bounds(flat, where))

    def _number(self, flat: Flat, where: str) -> Node:
        if "multipleOf" in flat:
            return Embedded(self.integers(flat, where))
        return decimals(self.bounds(flat, where))

    # arrays

    def _array(self, flat: Flat, where: str) -> Node:
        low, high = flat.get("minItems", 0), flat.get("maxItems")
        prefix, refs = flat.get("prefixItems", []), flat["$refs"]
        if high is not None and low > high:
            return NOTHING
        if "items" not in flat and prefix:
            # what may stand behind the named items is not asked for
            high = len(prefix) if high is None else min(high, len(prefix))
            if low > high:
                raise refused(where, f"minItems is {low}, but items behind prefixItems may be any")
        rest = flat.get("items", True)
        if high is not None and high <= len(prefix):
            rest = False
        if flat.get("uniqueItems") and (high is None or high > 1):
            return self._unique(flat, where, low, high)
        named = [self.node(p, f"{where}/prefixItems/{i}", refs) for i, p in enumerate(prefix)]
        more: Node = NOTHING
        if rest is not False:
            more = self.node(rest, f"{where}/items", refs)
        return concat(text("["), _items(named, more, low, high), text("]"))

    def _unique(self, flat: Flat, where: str, low: int, high: int | None) -> Node:
        """Arrays without repeats, of few values that are named."""
        schema, refs = flat.get("items", True), flat["$refs"]
        parts = self.flat(schema, f"{where}/items", refs)
        listed = all("enum" in part or part.get("type") == ("boolean",) for part in parts)
        if flat.get("prefixItems") or not listed:
            raise refused(
                where, "uniqueItems is supported with items that are an enum or booleans only"
            )
        values: list[Any] = []
        for part in parts:
            found = part.get("enum", [False, True])
            for value in found:
                if self.valid(value, part, where) and not any(same(value, v) for v in values):
                    values.append(value)
        if len(values) > _MAX_UNIQUE:
            raise refused(
                where,
                f"uniqueItems with {len(values)} values; at most {_MAX_UNIQUE} are possible",
            )
        texts = [self._constant(value, where) for value in values]
        most = len(values) if high is None else min(high, len(values))

        @functools.cache
        def behind(used: frozenset[int]) -> Node:
            parts = [EMPTY] if len(used) >= low else []
            if len(used) < most:
                comma = json_text.COMMA if used else EMPTY
                free = [i for i in range(len(values)) if i not in used]
                parts += [concat(comma, texts[i], behind(used | {i})) for i in free]
            return either(parts)

        return concat(text("["), behind(frozenset()), text("]"))

    # objects

    def _object(self, flat: Flat, where: str) -> Node:
        properties = dict(flat.get("properties", {}))
        required, refs = flat.get("required", []), flat["$refs"]
        others = flat.get("additionalProperties", True)
        self._check_keys(flat, where)
        for name in required:
            properties.setdefault(name, others)
        members: list[tuple[Node, bool]] = []
        for name, schema in properties.items():
            place = f"{where}/properties/{name.replace('~', '~0').replace('/', '~1')}"
            parts = self.flat(schema, place, refs)
            if parts:
                key = concat(self._constant(name, where), json_text.COLON)
                members.append((concat(key, self.alternatives(parts, place)), name in required))
            elif name in required:
                return NOTHING
        low, high = flat.get("minProperties", 0), flat.get("maxProperties")
        return concat(text("{"), Members(tuple(members), low, high, json_text.COMMA), text("}"))

    def _check_keys(self, flat: Flat, where: str) -> None:
        """Refuse objects whose keys are free: an automaton cannot see that a key comes twice."""
        named = len(flat.get("properties", {}))
        if "additionalProperties" in flat and flat["additionalProperties"] is False:
            return
        few = flat.get("minProperties", 0) > len(
            {*flat.get("properties", {}), *flat.get("required", [])}
        )
        if few or ("properties" not in flat and flat.get("maxProperties") != 0):
            raise refused(
                where,
                f"the object's keys are free ({named} are named): a key could come twice, which no "
                "regular language excludes; name the keys in properties",
            )


def _items(named: list[Node], more: Node, low: int, high: int | None) -> Node:
    """Items with commas in between: the named ones first, then others."""
    count = len(named) if high is None else min(high, len(named))
    most = None if high is None else high - count
    rest: Node = NOTHING
    if more is not NOTHING and most != 0:
        rest = Repeat(more, max(low - count, 1), most, json_text.COMMA)
    # from the last named item to the first
    found = EMPTY
    if rest is not NOTHING:
        behind = concat(json_text.COMMA, rest) if count else rest
        found = behind if low > count else nodes.optional(behind)
    elif low > count:
        return NOTHING
    for i in range(count - 1, -1, -1):
        one = concat(json_text.COMMA if i else EMPTY, named[i], found)
        found = one if low > i else nodes.optional(one)
    return found
