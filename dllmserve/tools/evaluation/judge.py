"""Judges: whether a generated text is right. Exact rules, no model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from dllmserve.assets import scoring
from dllmserve.errors import ConfigError

#: --match
MATCHES = ("exact", "contains", "number", "json")
#: how items of the embedded model are judged, each task by its own rule
SCORER = "scorer"

#: 1,234.5 is one number; a minus after a digit, a letter, a point or a bracket is a subtraction
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-\u2212])?[$€£]?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][-+]?\d+)?"
)
_PLAIN = str.maketrans({",": "", "\u2212": "-", "$": "", "€": "", "£": ""})
#: what GSM8K writes before the final answer
_MARK = "####"


def judge(match: str, task: str, prompt: str, answers: tuple[str, ...], text: str) -> bool:
    """Whether a text is right.

    Args:
        match: one of MATCHES, or SCORER.
        task: of the item, for SCORER.
        prompt: the last message of the item, for SCORER.
        answers: accepted answers; one that fits is enough.
        text: what was generated.

    Example:
        >>> judge("number", "", "", ("#### 1234",), "So the answer is 1,234.0.")
        True
    """
    if match == SCORER:
        return any(scoring.score(task, prompt, answer, text) for answer in answers)
    return any(_RULES[match](answer, text) for answer in answers)


def check_answer(match: str, answer: str) -> None:
    """Raise ConfigError if no text could ever be judged right against this answer."""
    if match in ("exact", "contains") and not answer.strip():
        raise ConfigError("an answer is empty")
    if match == "number" and last_number(answer) is None:
        raise ConfigError(f"match 'number' needs an answer with a number, got {answer!r}")
    if match == "json" and _parsed(answer) is _NOTHING:
        raise ConfigError(f"match 'json' needs an answer that is JSON, got {answer!r}")


def last_number(text: str) -> Decimal | None:
    """The last number of a text, or the first one after its last ``####``; None without one.

    Example:
        >>> last_number("3 + 4 = 7"), last_number("#### 12 (a dozen is 12.5 - 0.5)")
        (Decimal('7'), Decimal('12'))
    """
    before, mark, after = text.rpartition(_MARK)
    if mark and (first := _NUMBER.search(after)):
        return _decimal(first[0])
    found = _NUMBER.findall(before if mark else text)
    return _decimal(found[-1]) if found else None


def _decimal(text: str) -> Decimal:
    return Decimal(text.translate(_PLAIN))


def _number(answer: str, text: str) -> bool:
    wanted = last_number(answer)
    return wanted is not None and last_number(text) == wanted


def _json(answer: str, text: str) -> bool:
    wanted, found = _parsed(answer), _parsed(text)
    if wanted is _NOTHING or found is _NOTHING:
        return False
    try:
        return _same(wanted, found)
    except RecursionError:  # so deep that only one of the two walks gets to the end
        return False


#: what is no JSON; None is, as null
_NOTHING = object()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # a model may write ten thousand brackets
        return _NOTHING


def _same(a: Any, b: Any) -> bool:
    """Equality of JSON values; to Python, but not here, true equals 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


_RULES: Mapping[str, Callable[[str, str], bool]] = {
    "exact": lambda answer, text: text.strip() == answer.strip(),
    "contains": lambda answer, text: answer.strip() in text,
    "number": _number,
    "json": _json,
}
