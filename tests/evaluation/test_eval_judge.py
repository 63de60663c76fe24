"""Judges of free text: what counts as the same answer, and what does not."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from dllmserve.errors import ConfigError
from dllmserve.tools.evaluation.items import held_out
from dllmserve.tools.evaluation.judge import SCORER, check_answer, judge, last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7", "7"),
        ("She has 1,234.50 left.", "1234.5"),
        ("-$5", "-5"),
        ("10-3", "3"),
        ("x = -3", "-3"),
        ("(4)-5", "5"),
        ("\u22127 degrees", "-7"),
        ("it is .5", "0.5"),
        ("50%", "50"),
        ("1, 2, 3", "3"),
        ("12,34", "34"),
        ("1234,567", "567"),
        ("2e3 metres", "2000"),
        ("The answer is 42.", "42"),
        ("#### 42\n(7 left over)", "42"),
        ("5 apples #### ", "5"),
        ("#### 1\n#### 2", "2"),
        ("none", None),
        ("####", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("match", "answer", "text", "right"),
    [
        ("exact", "6 54 98", " 6 54 98\n", True),
        ("exact", "6 54 98", "6 54 98.", False),
        ("exact", "Paris", "paris", False),
        ("contains", "Paris", "It is Paris, of course.", True),
        ("contains", "Paris", "It is paris.", False),
        ("number", "#### 18", "9 * 2 = 18 dollars", True),
        ("number", "18", "#### 18.00", True),
        ("number", "18", "18 and then 19", False),
        ("number", "18", "none", False),
        ("json", '{"a": 1, "b": [2]}', '{"b": [2], "a": 1.0}', True),
        ("json", '{"a": 1}', '{"a": 1', False),
        ("json", '{"a": 1}', '{"a": true}', False),
        ("json", "[1, 2]", "[2, 1]", False),
        ("json", '{"a": 1}', '{"a": 1, "b": 2}', False),
        ("json", "null", " null ", True),
        ("json", '{"a": 1}', "[" * 100_000, False),
    ],
)
def test_judges(match: str, answer: str, text: str, right: bool) -> None:
    assert judge(match, "", "", (answer,), text) is right


def test_one_of_several_answers_is_enough() -> None:
    assert judge("exact", "", "", ("colour", "color"), "color")
    assert not judge("exact", "", "", ("colour", "color"), "color colour")


def test_deep_json_is_compared_or_wrong_but_no_error() -> None:
    deep = "[" * 600 + "]" * 600
    assert judge("json", "", "", (deep,), deep) in (True, False)


def test_every_held_out_answer_is_right_by_its_own_scorer() -> None:
    items = held_out()
    assert len(items) == 2800 and {item.match for item in items} == {SCORER}
    assert all(item.is_right(item.answers[0]) for item in items)
    assert not any(item.is_right("") for item in items)


@pytest.mark.parametrize(
    ("match", "answer", "message"),
    [
        ("exact", " ", "an answer is empty"),
        ("contains", "", "an answer is empty"),
        ("number", "seven", "an answer with a number, got 'seven'"),
        ("json", "{a: 1}", "an answer that is JSON"),
    ],
)
def test_answers_that_nothing_could_match(match: str, answer: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_answer(match, answer)


def test_answers_that_something_can_match() -> None:
    for match, answer in (("exact", "a"), ("number", "#### 3"), ("json", json.dumps(None))):
        check_answer(match, answer)
