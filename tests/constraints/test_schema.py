"""JSON schemas by keyword: which texts are written, and what is refused."""

from __future__ import annotations

import json
import math
import random
from functools import cache
from typing import Any

import pytest

from dllmserve.constraints.compile import language
from dllmserve.constraints.dfa import Dfa
from dllmserve.constraints.json_formats import FORMATS, REFUSED, format_automaton
from dllmserve.errors import InvalidParameterError
from tests.constraints.checks import random_text
from tests.oracles.grammar import FORMAT_CHECKS, read_json


@cache
def _compiled(schema: str) -> Dfa:
    return language(json_schema=schema)


def takes(schema: Any, *texts: str) -> list[bool]:
    found = _compiled(json.dumps(schema))
    return [found.accepts(text) for text in texts]


def every(schema: Any, *texts: str) -> None:
    assert takes(schema, *texts) == [True] * len(texts), texts


def none(schema: Any, *texts: str) -> None:
    assert takes(schema, *texts) == [False] * len(texts), texts


def test_strings_and_escapes() -> None:
    every(
        {"type": "string"}, '""', '"a b"', '"é日😀"', r'"\"\\\/\b\f\n\r\t"', r'"\u00e9\uD7FF\ue000"'
    )
    none(
        {"type": "string"},
        '"',
        '"a',
        '"\n"',
        '"\x1f"',
        r'"\x"',
        r'"\u12"',
        r'"\ud800"',
        r'"\uDFff"',
    )
    every({"type": "string"}, '"\x7f"', r'"\u0000"')
    two = {"type": "string", "minLength": 2, "maxLength": 2}
    every(two, '"ab"', '"😀é"', r'"\n\u0041"', r'"\\\""')
    none(two, '"a"', '"abc"', r'"\n"', r'"\\"')


def test_patterns_are_of_the_string_not_of_its_text() -> None:
    quote = {"type": "string", "pattern": '^[^a]"$'}
    every(quote, r'"b\""', r'"\n\""', r'"\\\""', r'"\u0001\""', r'"\u001F\""')
    none(quote, r'"a\""', '"b""', r'"b\\"', r'"\u0061\""')
    every({"type": "string", "pattern": "b"}, '"b"', '"abc"', r'"\n\"b\\"')
    every({"type": "string", "pattern": "^.{2}$"}, '"é😀"', r'"\"\\"', r'"\t\u0000"')
    none({"type": "string", "pattern": "^.{2}$"}, r'"a\n"')
    both = {"type": "string", "pattern": "^a*$", "minLength": 2, "maxLength": 3}
    assert takes(both, *(json.dumps("a" * n) for n in range(5))) == [
        False,
        False,
        True,
        True,
        False,
    ]
    every({"type": "string", "pattern": "^/$"}, '"/"', r'"\/"')


@pytest.mark.parametrize("name", sorted(FORMATS & FORMAT_CHECKS.keys()))
def test_formats_write_nothing_that_is_invalid(name: str) -> None:
    rng, found = random.Random(0), format_automaton(name)
    for length in (0, 3, 12, 25, 40) * 60:
        text = random_text(found, rng, length)
        assert text.isascii() and FORMAT_CHECKS[name](text), text


FORMAT_TEXTS = {
    "date": (["2024-02-29", "2000-02-29", "0001-01-01", "9999-12-31", "0004-02-29"],
             ["2023-02-29", "1900-02-29", "0000-01-01", "0000-02-29", "2024-04-31", "2024-13-01"]),
    "time": (["00:00:00Z", "23:59:59.123456789-12:30"],
             ["24:00:00Z", "00:00:00", "00:60:00Z", "1:00:00Z"]),
    "date-time": (["2024-02-29T23:59:59+00:00"], ["2023-02-29T00:00:00Z", "2024-02-28 00:00:00Z"]),
    "duration": (["P1Y2M3DT4H5M6S", "P2W", "PT1M", "P1D", "P1M"],
                 ["P", "PT", "P1Y1D", "P1S", "P1W1D", "1D"]),
    "uuid": (["123e4567-E89B-12d3-a456-426614174000"], ["123e4567e89b12d3a456426614174000"]),
    "email": (["a.b+c@x-y.org", "a@b.co"],
              ["a@b", ".a@b.co", "a..b@c.co", "a b@c.co", "a@-b.co", "@b.co"]),
    "hostname": (["a", "a-b.c9", "x" * 63], ["-a", "a-", "a..b", "x" * 64, "a_b", ""]),
    "ipv4": (["0.0.0.0", "255.249.199.99"], ["256.0.0.1", "01.0.0.1", "1.2.3", "1.2.3.4.5"]),
    "ipv6": (["::", "::1", "1::", "1:2:3:4:5:6:7:8", "1::8", "a:B::c:d", "1:2:3:4:5:6:7::"],
             ["1", ":::", "1::2::3", "1:2:3:4:5:6:7:8:9", "12345::", "1:2:3:4:5:6:7"]),
    "uri": (["https://x.org/a%20b?q=1#f", "urn:a:b", "mailto:a@b.co"],
            ["x", "//x", "http://", "a b:c"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMAT_TEXTS)
def test_formats(name: str) -> None:
    good, bad = FORMAT_TEXTS[name]
    every({"type": "string", "format": name}, *map(json.dumps, good))
    none({"type": "string", "format": name}, *map(json.dumps, bad))


def test_formats_that_say_nothing_or_are_refused() -> None:
    every({"type": "string", "format": "password"}, '"anything"')
    every({"type": "integer", "format": "int32"}, "1")
    for name in REFUSED:
        with pytest.raises(InvalidParameterError, match=f"the format '{name}' is not supported"):
            language(json_schema=json.dumps({"type": "string", "format": name}))


def test_integers() -> None:
    every({"type": "integer"}, "0", "-1", "10", "123456789012345678901234567890")
    none({"type": "integer"}, "01", "-0", "+1", "1.0", "1e2", "", "-", ".5")
    for low, high in [(0, 150), (-5, 5), (-120, -7), (9, 10), (99, 1000), (0, 0), (-1, 0), (7, 7)]:
        schema = {"type": "integer", "minimum": low, "maximum": high}
        found = takes(schema, *map(str, range(-1100, 1100)))
        assert found == [low <= n <= high for n in range(-1100, 1100)]
        open_ = {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high}
        if low + 1 < high:
            found = takes(open_, *map(str, range(-1100, 1100)))
            assert found == [low < n < high for n in range(-1100, 1100)]
    every({"type": "integer", "minimum": -3}, "-3", "0", "999999")
    none({"type": "integer", "minimum": -3}, "-4", "-10")
    every({"type": "integer", "maximum": 10**30}, str(10**30), "-5")
    none({"type": "integer", "maximum": 10**30}, str(10**30 + 1))
    for divisor in (1, 2, 3, 7, 10, 64, 100):
        schema = {"type": "integer", "multipleOf": divisor, "minimum": -200}
        found = takes(schema, *map(str, range(-300, 300)))
        assert found == [n % divisor == 0 and n >= -200 for n in range(-300, 300)]


def test_numbers() -> None:
    number = {"type": "number"}
    every(number, "0", "-0.5", "1.25", "1e5", "1E-05", "2.5e+300", "12345.678", "100", "-0")
    none(number, "1.", ".5", "01", "1e", "1e999", "NaN", "Infinity", "+1", "0x1")
    rng = random.Random(0)
    values = [0, 1, -1, 0.5, 9.99, 10, -10.25, 99.5, 1e-3, 100, 0.001, 3.14159]
    for _ in range(200):
        low, high = sorted(rng.sample(values, 2))
        names = (
            rng.choice(["minimum", "exclusiveMinimum"]),
            rng.choice(["maximum", "exclusiveMaximum"]),
        )
        schema = {"type": "number", names[0]: low, names[1]: high}
        for _ in range(10):
            value = rng.choice(
                [*values, rng.uniform(-12, 12), rng.uniform(0, 1), rng.uniform(0, 1e-5)]
            )
            above = value > low if "ex" in names[0] else value >= low
            below = value < high if "ex" in names[1] else value <= high
            assert takes(schema, repr(value)) == [above and below] or value == 0, (schema, value)


def test_no_text_is_read_as_a_bound_that_is_excluded() -> None:
    """The nearest float of 0.99999999999999999999 is 1."""
    schema = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    rng, found = random.Random(0), _compiled(json.dumps(schema))
    none(schema, "0.99999999999999999999", "1", "1.0", "0", "0.0", "0e-5", "0." + "0" * 400 + "1")
    every(schema, "0.9999999999999999", "0.00001", "1e-300", repr(math.nextafter(1, 0)))
    for _ in range(500):
        assert 0 < float(random_text(found, rng, rng.randint(1, 40))) < 1


def test_constants() -> None:
    every(
        {"const": {"b": 1, "a": [True, None, 1.5, 'é"\n']}},
        r'{"b": 1, "a": [true, null, 1.5, "é\"\n"]}',
    )
    every({"enum": [1, True, "1", None]}, "1", "true", '"1"', "null")
    none({"enum": [1, "a"]}, "true", "a", "1.0")
    none({"const": 0, "enum": [False]}, "0", "false")
    some = {"type": "integer", "enum": [1, 1.5, "x", 20], "maximum": 10}
    assert takes(some, "1", "1.5", "20") == [True, False, False]
    some = {"enum": ["ab", "abc", "x"], "pattern": "^a", "maxLength": 2}
    assert takes(some, '"ab"', '"abc"', '"x"') == [True, False, False]


def test_objects() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"const": 1}, 'c"': {"type": "null"}},
        "required": ["b"],
    }
    every(
        schema,
        '{"b": 1}',
        '{"a": 5, "b": 1}',
        r'{"b": 1, "c\"": null}',
        r'{"a": 5, "b": 1, "c\"": null}',
    )
    none(
        schema,
        "{}",
        '{"a": 5}',
        '{"b": 1, "a": 5}',
        '{"b": 1, "b": 1}',
        '{"b": 1, "d": 1}',
        '{"b":1}',
    )
    free = {"type": "object", "properties": {n: {"const": 0} for n in "abc"}}
    texts = [
        "{" + ", ".join(f'"{n}": 0' for n in names) + "}" for names in ("", "a", "ac", "abc", "ca")
    ]
    assert takes(free, *texts) == [True, True, True, True, False]
    assert takes({**free, "minProperties": 1, "maxProperties": 2}, *texts) == [
        False, True, True, False, False,
    ]  # fmt: skip
    every({"type": "object", "additionalProperties": False}, "{}")
    every({"type": "object", "properties": {}}, "{}")
    others = {
        "type": "object",
        "required": ["x"],
        "additionalProperties": {"const": 1},
        "properties": {},
    }
    every(others, '{"x": 1}')
    never = {"type": "object", "properties": {"a": False, "b": {"const": 1}}}
    assert takes(never, "{}", '{"b": 1}', '{"a": 1}') == [True, True, False]


def test_many_properties() -> None:
    schema = {"type": "object", "properties": {f"f{i}": {"type": "boolean"} for i in range(400)}}
    every(schema, "{}", '{"f7": true, "f399": false}')


def test_arrays() -> None:
    ones: dict[str, Any] = {"type": "array", "items": {"const": 1}}
    texts = ["[" + ", ".join("1" * n) + "]" for n in range(6)]
    assert takes(ones, *texts) == [True] * 6
    for low in range(4):
        assert takes({**ones, "minItems": low}, *texts) == [n >= low for n in range(6)]
        for high in range(low, 5):
            schema = {**ones, "minItems": low, "maxItems": high}
            assert takes(schema, *texts) == [low <= n <= high for n in range(6)]
    pair = {"type": "array", "prefixItems": [{"const": 0}, {"const": True}], "items": {"const": 1}}
    every(pair, "[]", "[0]", "[0, true]", "[0, true, 1, 1]")
    none(pair, "[1]", "[0, 1]", "[0, true, 0]", "[0,true]")
    every({**pair, "minItems": 3}, "[0, true, 1]")
    none({**pair, "minItems": 3}, "[0, true]")
    every({"type": "array", "items": [{"const": 0}], "additionalItems": False}, "[]", "[0]")
    every({"type": "array", "prefixItems": [{"const": 0}]}, "[]", "[0]")
    unique = {
        "type": "array",
        "items": {"enum": ["a", "b", 1, 1.0]},
        "uniqueItems": True,
        "minItems": 2,
    }
    every(unique, '["a", "b"]', '["b", 1, "a"]')
    none(unique, '["a"]', '["a", "a"]', "[1, 1.0]", '["a", "b", "a"]')


def test_combinations() -> None:
    every({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "1", "null")
    every({"type": ["string", "null"], "maxLength": 1}, '"a"', "null")
    both = {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}], "minimum": 4}
    assert takes(both, "3", "4", "5", "6") == [False, True, True, False]
    merged = {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"a": {"minimum": 5}, "b": {"const": 1}}, "required": ["b"]},
        ]
    }
    every(merged, '{"a": 5, "b": 1}')
    none(merged, '{"a": 4, "b": 1}', '{"a": 5}')
    closed = {
        "allOf": [merged["allOf"][0], {"additionalProperties": False, "properties": {"b": True}}]
    }
    assert _compiled(json.dumps(closed)).empty
    typed = {"type": "object", "required": ["v"], "properties": {"v": {"type": "integer"}}}
    one = {
        "oneOf": [
            {
                **typed,
                "properties": {**typed["properties"], "k": {"const": k}},
                "required": ["k", "v"],
            }
            for k in ("x", "y")
        ]
    }
    every(one, '{"v": 1, "k": "x"}', '{"v": 1, "k": "y"}')
    every(
        {"oneOf": [{"type": "string", "pattern": "^a"}, {"type": "string", "pattern": "^b"}]}, '"a"'
    )
    every(
        {"oneOf": [{"type": "integer", "maximum": 3}, {"type": "number", "exclusiveMinimum": 3}]},
        "3",
        "4",
    )


def test_not() -> None:
    some = {"type": "string", "not": {"enum": ["a", 'b"', 3]}, "maxLength": 3}
    every(some, '""', '"b"', '"aa"')
    none(some, '"a"', r'"\u0061"', r'"b\""', '"aaaa"')
    some = {"type": "string", "allOf": [{"not": {"pattern": "x"}}, {"not": {"minLength": 3}}]}
    every(some, '"ab"', '""')
    none(some, '"ax"', '"abc"')
    # what others may call a match is not written either
    dates = {"type": "string", "not": {"anyOf": [{"format": "date"}, {"pattern": "^a$"}]}}
    none(dates, '"2024-02-29"', '"0000-02-31"', '"a"', r'"a\n"')
    every(dates, '"2024-02-2"', '"b"')
    twice = {"type": "string", "not": {"not": {"pattern": "^a"}}}
    assert takes(twice, '"ab"', '"ba"') == [True, False]
    some = {"type": ["integer", "boolean", "null"], "not": {"enum": [3, 5.0, True]}, "minimum": 0}
    assert takes(some, *map(str, range(-1, 8))) == [n in (0, 1, 2, 4, 6, 7) for n in range(-1, 8)]
    assert takes(some, "true", "false", "null") == [False, True, True]
    some = {"type": "integer", "not": {"minimum": 3, "maximum": 10, "multipleOf": 2}}
    assert takes(some, *map(str, range(20))) == [n not in (4, 6, 8, 10) for n in range(20)]
    some = {"type": "object", "properties": {"a": {"const": 1}}, "not": {"type": "string"}}
    every(some, "{}", '{"a": 1}')


def test_references() -> None:
    schema = {
        "$defs": {
            "n": {"type": "integer", "title": "N"},
            "a/b~": {"$ref": "#/$defs/n", "minimum": 3},
        },
        "definitions": {"old": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 1}},
        "type": "object",
        "properties": {
            "x": {"$ref": "#/$defs/a~1b~0", "maximum": 4},
            "y": {"$ref": "#/definitions/old"},
        },
        "required": ["x", "y"],
    }
    every(schema, '{"x": 3, "y": [-7]}', '{"x": 4, "y": []}')
    none(schema, '{"x": 2, "y": []}', '{"x": 5, "y": []}')
    every({"$ref": "#/$defs/n", "$defs": {"n": {"const": 1}}}, "1")


def test_annotations_say_nothing() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "x", "title": "t",
        "description": "d", "default": 1, "examples": [1], "$comment": "c", "deprecated": True,
        "readOnly": True, "writeOnly": False, "x-extra": {"a": 1}, "type": "integer",
    }  # fmt: skip
    every(schema, "1")


def test_any_object() -> None:
    for schema in (
        {"type": "object"},
        {"type": "object", "title": "x", "additionalProperties": True},
    ):
        every(schema, "{}", '{"a": 1, "b": [true, null, {"c": {"d": "x"}}]}', '{"a": -1.5e3}')
        none(schema, "[]", "1", '{"a":1}', '{"a": 1,}', '{"a": {"b": {"c": {"d": {}}}}}')


REFUSED_SCHEMAS: list[tuple[Any, str]] = [
    ({}, "it allows any JSON value"),
    (True, "it allows any JSON value"),
    ({"type": "array"}, "at /items: it allows any JSON value"),
    ({"type": "object", "properties": {"a": {}}}, "at /properties/a: it allows any JSON value"),
    ({"type": "object", "required": ["a"], "properties": {}}, "at /properties/a: it allows any"),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, "the object's keys are free"),
    ({"type": "object", "minProperties": 3, "properties": {"a": {"const": 1}}}, "keys are free"),
    ({"type": "array", "items": {"type": "object"}}, "at /items: the object's keys are free"),
    ({"not": {"type": "string"}}, "it allows any JSON value"),
    ({"type": "number", "not": {"const": 1}}, "'not' is not supported here: .* type number"),
    ({"type": "object", "properties": {}, "not": {"required": ["a"]}}, "'not' .* type object"),
    ({"type": "object", "patternProperties": {}}, "the keyword 'patternProperties'"),
    ({"type": "array", "contains": {}}, "the keyword 'contains'"),
    ({"type": "string", "nullable": True}, "the keyword 'nullable'"),
    ({"if": {}, "then": {}}, "the keyword 'if'"),
    ({"$dynamicRef": "#x"}, r"the keyword '\$dynamicRef'"),
    ({"$ref": "https://x.org/s.json"}, "only pointers into the schema"),
    ({"$ref": "#/$defs/missing"}, "leads nowhere"),
    ({"$ref": "#"}, r"\$ref '#' is recursive"),
    (
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        "recursive",
    ),
    ({"type": "number", "multipleOf": 0.1}, r"multipleOf 0\.1 is not supported"),
    (
        {"type": "integer", "multipleOf": 5000},
        "multipleOf 5000 is not supported: only integers from 1",
    ),
    ({"type": "integer", "multipleOf": 0}, "multipleOf cannot be 0"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf/0 and oneOf/1 may both be valid"),
    (
        {"oneOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {"const": 1}}}]},
        "oneOf/0 and",
    ),
    (
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
        "uniqueItems is supported with",
    ),
    (
        {"type": "array", "items": {"enum": list(range(9))}, "uniqueItems": True},
        "9 values; at most 8",
    ),
    (
        {"type": "array", "prefixItems": [{"const": 1}], "minItems": 2},
        "behind prefixItems may be any",
    ),
    ({"type": "strin"}, "type cannot be 'strin'"),
    ({"type": "string", "minLength": -1}, "minLength cannot be -1"),
    ({"type": "string", "maxLength": "3"}, "maxLength cannot be '3'"),
    ({"type": "string", "pattern": "("}, r"pattern '\(' is no regular expression"),
    ({"type": "string", "pattern": r"\bx"}, "word boundaries"),
    ({"anyOf": []}, "anyOf must be a list that is not empty"),
    ({"type": "object", "properties": {"a": 3}}, "at /properties/a: a schema must be an object"),
    ({"const": "\ud800"}, "a constant holds a lone surrogate"),
    ({"type": "integer", "maximum": 10**200}, "more than 100 digits"),
]


@pytest.mark.parametrize(("schema", "reason"), REFUSED_SCHEMAS, ids=lambda v: str(v)[:40])
def test_refused_by_name(schema: Any, reason: str) -> None:
    with pytest.raises(InvalidParameterError, match=reason) as caught:
        language(json_schema=json.dumps(schema))
    assert type(caught.value) is InvalidParameterError  # which other processes can name
    assert str(caught.value).startswith("json_schema")


def test_text_that_is_no_json() -> None:
    for text in ("{", "", "NaN", '{"minimum": 1e999}', "[" * 100_000):
        with pytest.raises(InvalidParameterError, match="json_schema"):
            language(json_schema=text)


def nested(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "maxItems": 1}
    return schema


def test_bounds() -> None:
    every(nested(20), "[" * 20 + "7" + "]" * 20)
    doubled: dict[str, Any] = {"d0": {"type": "integer"}}
    for i in range(1, 30):
        pair = [{"$ref": f"#/$defs/d{i - 1}"}] * 2
        doubled[f"d{i}"] = {"type": "array", "prefixItems": pair, "items": False, "minItems": 2}
    wide = {
        "allOf": [{"anyOf": [{"minimum": i}, {"maximum": i}]} for i in range(30)],
        "type": "integer",
    }
    for schema, reason in (
        ({"$defs": doubled, "$ref": "#/$defs/d29"}, "the number of its parts|positions"),
        (wide, "its alternatives are more than 1,024"),
        ({"type": "string", "maxLength": 100_000}, "the constraint is too large"),
        (
            {"type": "array", "items": {"type": "string", "maxLength": 500}, "maxItems": 900},
            "too large",
        ),
        (nested(900), "nested too deeply"),
    ):
        with pytest.raises(InvalidParameterError, match=reason):
            language(json_schema=json.dumps(schema))


def test_written_texts_are_json() -> None:
    rng, found = random.Random(0), _compiled('{"type": "object"}')
    for _ in range(200):
        assert isinstance(json.loads(random_text(found, rng, rng.randint(0, 120))), dict)
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "number"}}}
    found = _compiled(json.dumps(schema))
    for _ in range(200):
        assert isinstance(read_json(random_text(found, rng, rng.randint(0, 60))), dict)
