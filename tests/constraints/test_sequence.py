"""Texts of parts: fixed texts, expressions, schemas, and what repeats."""

import json
from typing import Any

import pytest

from dllmserve.constraints.nfa import automaton
from dllmserve.constraints.sequence import SEQUENCE, sequence, sequence_of
from dllmserve.errors import InvalidParameterError


def accepts(parts: list[Any], text: str) -> bool:
    return automaton(sequence(parts)).accepts(text)


ONE = {
    "anyOf": [
        [
            "<a:",
            {"schema": {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer", "minimum": 0}}}},
            ">",
        ],
        ["<b>"],
    ]
}
WORDS = {"regex": "[^<]*"}
CASES: list[tuple[list[Any], list[str], list[str]]] = [
    ([], [""], ["a"]),
    (["a.", "b"], ["a.b"], ["a.", "axb", "a.b "]),
    ([WORDS], ["", "a\nb"], ["<"]),
    ([ONE], ["<a:1>", "<b>"], ["", "<a:>", "<b><b>", "<c>"]),
    (
        [{"repeat": [ONE], "between": ", "}],
        ["<b>", "<b>, <a:12>", "<b>, <b>, <b>"],
        ["", "<b>,", "<b><b>", ", <b>"],
    ),
    (
        [{"anyOf": [[WORDS], [WORDS, {"repeat": [ONE], "between": ""}]]}],
        ["", "words", "<b>", "words<b><b>"],
        ["words<b>words", "<"],
    ),
]


@pytest.mark.parametrize(("parts", "good", "bad"), CASES)
def test_languages(parts: list[Any], good: list[str], bad: list[str]) -> None:
    for text in good:
        assert accepts(parts, text), text
    for text in bad:
        assert not accepts(parts, text), text


def test_what_is_a_sequence() -> None:
    assert sequence_of(json.dumps({SEQUENCE: ["a", {"regex": "b"}]})) == ["a", {"regex": "b"}]
    for other in ({"type": "object"}, {SEQUENCE: ["a"], "type": "object"}, {"const": SEQUENCE}):
        assert sequence_of(json.dumps(other)) is None


def test_a_sequence_is_a_list() -> None:
    with pytest.raises(InvalidParameterError, match="takes lists"):
        sequence_of(json.dumps({SEQUENCE: 1}))


@pytest.mark.parametrize(
    "part",
    [
        7,
        {},
        {"regex": "a", "schema": {}},
        {"anyOf": []},
        {"anyOf": ["a"]},
        {"repeat": ["a"]},
        {"regex": "("},
        {"regex": "a(?=b)"},
        {"schema": {"$ref": "#"}},
    ],
)
def test_wrong_parts(part: Any) -> None:
    with pytest.raises(InvalidParameterError):
        sequence([part])
