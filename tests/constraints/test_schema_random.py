"""Random JSON schemas: what is written is valid, and what is valid can be written."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from dllmserve.constraints.compile import language
from dllmserve.errors import InvalidParameterError
from tests.constraints.checks import random_text, validator
from tests.oracles.grammar import both_spacings, read_json

NUMBERS = [0, 1, -1, 5, 9, 10, 99, 100, -7, -100, 0.5, -0.25, 3.75, 150, 1000, 12.125, 1e-3, 250]
PATTERNS = [
    *("^[a-z]{2,4}$", "a", "^x", "y$", "[^a]", "^.+$", '"', "\\\\", "^(ab|c)+$", "\\n"),
    *("^\\w*$", "^a|b$", "\\d{2}", "/"),
]
FORMATS = ["date", "time", "date-time", "uuid", "email", "ipv4", "ipv6", "hostname", "password"]
NAMES = ["a", "b", 'c"', "dé", "e e"]
CONSTANTS: list[Any] = [1, True, 'a"b', None, [1, {"x": 2}], {"k": "é\n"}, 1.5]
FIXED: list[Any] = [
    {"enum": ["a", "b", 1, None, True]},
    {"enum": [1, 2, 3], "minimum": 2},
    {"type": "string", "enum": ["x", "yy", 3]},
    {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True, "maxItems": 2},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": False},
]
VALUES: list[Any] = [
    *("", "a", "ab", "x", "xy", "abc", '"', "\\", "\n", "\u0001", "é", "12", "red", "b", "yy"),
    *("2024-02-29", "2023-02-29", "1900-02-29", "10.0.0.1", "10.0.0.256", "a@b.co", "::1", "1::"),
    *("12:30:00Z", "2024-02-29T12:30:00.5+01:00", "00000000-0000-0000-0000-00000000000A"),
    *(0, 1, -1, 2, 3, 5, 7, 9, 10, 14, 99, 100, 150, -100, 0.5, -0.25, 0.001, 1.5, 12.125),
    *(1e-7, 2.5e-5, 123456.789, 1.5e300, -1e-9, 1e16, True, False, None),
]


class Schemas:
    """Makes random schemas, in which nothing is left open that would not be written."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def make(self, depth: int) -> Any:
        makers = [self._string, self._number, self._fixed]
        if depth:
            makers += [self._object, self._object, self._array, self._any_of]
        return self._rng.choice(makers)(depth)

    def _sometimes(self, schema: dict[str, Any], key: str, chance: float, values: Any) -> None:
        if self._rng.random() < chance:
            schema[key] = self._rng.choice(list(values))

    def _string(self, depth: int) -> Any:
        schema: dict[str, Any] = {"type": self._rng.choice(["string", ["string", "null"]])}
        self._sometimes(schema, "minLength", 0.4, range(4))
        self._sometimes(schema, "maxLength", 0.4, range(2, 7))
        self._sometimes(schema, "pattern", 0.3, PATTERNS)
        self._sometimes(schema, "format", 0.2, FORMATS)
        return schema

    def _number(self, depth: int) -> Any:
        kind = self._rng.choice(["integer", "number", ["integer", "null"]])
        schema: dict[str, Any] = {"type": kind}
        for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            self._sometimes(schema, name, 0.3, NUMBERS)
        if kind == "integer":
            self._sometimes(schema, "multipleOf", 0.2, [2, 3, 7, 10])
        return schema

    def _fixed(self, depth: int) -> Any:
        if self._rng.random() < 0.4:
            return {"type": self._rng.choice(["boolean", "null"])}
        return self._rng.choice([*FIXED, {"const": self._rng.choice(CONSTANTS)}])

    def _object(self, depth: int) -> Any:
        names = self._rng.sample(NAMES, self._rng.randint(0, 4))
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self.make(depth - 1) for name in names},
            "required": [name for name in names if self._rng.random() < 0.5],
            "additionalProperties": False,
        }
        self._sometimes(schema, "minProperties", 0.1, range(3))
        self._sometimes(schema, "maxProperties", 0.1, range(4))
        return schema

    def _array(self, depth: int) -> Any:
        schema: dict[str, Any] = {"type": "array", "items": self.make(depth - 1)}
        self._sometimes(schema, "minItems", 0.5, range(3))
        self._sometimes(schema, "maxItems", 0.7, range(4))
        if self._rng.random() < 0.2:
            schema["prefixItems"] = [self.make(depth - 1)]
        return schema

    def _any_of(self, depth: int) -> Any:
        kind = self._rng.choice(["anyOf", "oneOf", "allOf"])
        return {kind: [self.make(depth - 1) for _ in range(self._rng.randint(1, 3))]}

    def value(self, depth: int) -> Any:
        kind = self._rng.random()
        if kind < 0.7 or not depth:
            return self._rng.choice(VALUES)
        if kind < 0.85:
            return [self.value(depth - 1) for _ in range(self._rng.randint(0, 3))]
        return {name: self.value(depth - 1) for name in NAMES if self._rng.random() < 0.5}


def anchored(schema: Any) -> Any:
    """With patterns that end where the text does: Python's ``$`` takes a newline behind it."""
    if isinstance(schema, list):
        return [anchored(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: anchored(part) for key, part in schema.items()}
    if isinstance(found.get("pattern"), str):
        found["pattern"] = found["pattern"].replace("$", r"\Z")
    return found


def loosened(schema: Any) -> Any:
    """Objects of the schema with other keys, which are valid, but not written."""
    if isinstance(schema, list):
        return [loosened(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: loosened(part) for key, part in schema.items()}
    if found.get("additionalProperties") is False and found.get("properties"):
        del found["additionalProperties"]
    return found


@pytest.mark.parametrize("seed", range(4))
def test_random_schemas(seed: int) -> None:
    rng = random.Random(seed)
    schemas = Schemas(rng)
    written = accepted = refused = 0
    for _ in range(150):
        schema = schemas.make(2)
        valid = validator(anchored(schema))
        try:
            texts = language(json_schema=json.dumps(schema))
        except InvalidParameterError as error:
            assert "oneOf/" in str(error), error
            refused += 1
            continue
        for length in () if texts.empty else (0, 5, 20, 60):
            text = random_text(texts, rng, length)
            assert valid(read_json(text)), (schema, text)
            written += 1
        for value in (schemas.value(2) for _ in range(40)):
            found = any(map(texts.accepts, both_spacings(value)))
            if found != valid(value):
                # what type "integer" takes is written in digits alone
                assert not found and "e+" in json.dumps(value), (schema, value)
            accepted += found
    assert written > 300 and accepted > 200 and refused < 30


@pytest.mark.parametrize("seed", range(2))
def test_what_is_left_open_is_not_written_or_valid(seed: int) -> None:
    rng = random.Random(1000 + seed)
    schemas = Schemas(rng)
    for _ in range(100):
        schema = loosened(schemas.make(2))
        valid = validator(schema)
        try:
            texts = language(json_schema=json.dumps(schema))
        except InvalidParameterError as error:
            assert "oneOf/" in str(error) or "free" in str(error), error
            continue
        for length in () if texts.empty else (0, 5, 20, 60):
            text = random_text(texts, rng, length)
            assert valid(read_json(text)), (schema, text)
