"""Questions: what is asked, in one form for all that ask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dllmserve.decisions.checks import fields, items, one_of, text, wrong
from dllmserve.decisions.inputs import instructions

#: most questions of a request, and most options of a question
MAX_QUESTIONS, MAX_OPTIONS = 400, 255


@dataclass(frozen=True)
class Option:
    """One of the answers to choose from.

    Attributes:
        text: how it is shown to the model.
        description: what it means, or None.
        value: what the answer calls it.
    """

    text: str
    description: str | None = None
    value: str | bool = ""


@dataclass(frozen=True)
class Question:
    """A question with its options.

    Attributes:
        kind: "predicate" (whether something is true: two options, yes and no), "choice", or "score"
            (the options are levels, from the lowest).
        instructions: what is asked; "" where the options say it.
        options: at least one.
        name: the caller's name for it, or None.
    """

    kind: Literal["predicate", "choice", "score"]
    instructions: str
    options: tuple[Option, ...]
    name: str | None = None


def predicate(
    asked: str, name: str | None = None, *, yes: str | None = None, no: str | None = None
) -> Question:
    """A question whether something is true; ``yes`` and ``no`` describe the two answers."""
    return Question("predicate", asked, (Option("yes", yes, True), Option("no", no, False)), name)


def read_questions(given: Any) -> list[Question]:
    """Questions in the shape of OpenAI's ``/v1/decisions``.

    Example:
        >>> [q.kind for q in read_questions([{"type": "predicate", "instructions": "It rains."}])]
        ['predicate']

    Raises:
        DecisionError: they are none; the message names the place.
    """
    listed = items(given, "questions", 1, MAX_QUESTIONS)
    return [_question(item, f"questions[{number}]") for number, item in enumerate(listed)]


def _question(item: Any, place: str) -> Question:
    if not isinstance(item, Mapping):
        raise wrong(place, "expected an object: a predicate, a choice or a score")
    readers = {"predicate": _predicate, "choice": _choice, "score": _score}
    return readers[one_of(item.get("type"), f"{place}.type", readers)](item, place)


def _common(item: Mapping[str, Any], place: str, *more: str) -> tuple[str, str | None]:
    """Instructions and name."""
    fields(item, place, ("type", "instructions", "name", *more), ("instructions", *more))
    name = item.get("name")
    if name is not None:
        text(name, f"{place}.name")
    return instructions(item["instructions"], f"{place}.instructions"), name


def _predicate(item: Mapping[str, Any], place: str) -> Question:
    return predicate(*_common(item, place))


def _choice(item: Mapping[str, Any], place: str) -> Question:
    asked, name = _common(item, place, "choices")
    found, place = [], f"{place}.choices"
    for number, choice in enumerate(items(item["choices"], place, 2, MAX_OPTIONS)):
        own = f"{place}[{number}]"
        fields(choice, own, ("value", "description"), ("value",))
        value = choice["value"]
        if not isinstance(value, bool):
            text(value, f"{own}.value", empty=False)
        found.append((value, _description(choice, own)))
    return Question("choice", asked, options_of(found, place), name)


def options_of(found: list[tuple[str | bool, str | None]], place: str) -> tuple[Option, ...]:
    """Options of values and descriptions. A text that reads as a boolean of them does is quoted.

    Raises:
        DecisionError: a value is there twice.
    """
    # True == 1 == "1" never meets here, but true and "true" do
    (typed, count), *_ = Counter((type(v), v) for v, _ in found).most_common(1)
    if count > 1:
        shown = f'"{typed[1]}"' if isinstance(typed[1], str) else str(typed[1]).lower()
        raise wrong(place, f"value {shown} is given twice")
    flags = {str(value).lower() for value, _ in found if isinstance(value, bool)}

    def shown_as(value: str | bool) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        return f'"{value}"' if value in flags else value

    return tuple(Option(shown_as(value), described, value) for value, described in found)


def _score(item: Mapping[str, Any], place: str) -> Question:
    asked, name = _common(item, place, "levels")
    found, place = [], f"{place}.levels"
    for number, level in enumerate(items(item["levels"], place, 2, MAX_OPTIONS)):
        own = f"{place}[{number}]"
        fields(level, own, ("label", "description"), ("label",))
        label = text(level["label"], f"{own}.label", empty=False)
        found.append(Option(label, _description(level, own), label))
    return Question("score", asked, tuple(found), name)


def _description(item: Mapping[str, Any], place: str) -> str | None:
    given = item.get("description")
    return None if given is None else text(given, f"{place}.description") or None
