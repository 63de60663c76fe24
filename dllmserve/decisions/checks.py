"""Checks of plain data from a caller; errors name the place, such as ``questions[2].choices``."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dllmserve.errors import DecisionError

#: of a JSON part: containers in each other, values, bytes of compact JSON
MAX_LEVELS, MAX_VALUES, MAX_BYTES = 32, 10_000, 256 * 1024
#: characters of an unknown name that an error tells
_MAX_NAME = 60


def wrong(place: str, text: str) -> DecisionError:
    """An error about a place."""
    return DecisionError(f"{place}: {text}", place)


def fields(
    value: Any, place: str, known: Collection[str], needed: Collection[str]
) -> Mapping[str, Any]:
    """An object with no other members than the known ones, and with those that are needed.

    Raises:
        DecisionError: it is none.
    """
    if not isinstance(value, Mapping):
        raise wrong(place, f"expected an object, got {told(value)}")
    for name in value:
        if name not in known:
            shown = str(name)[:_MAX_NAME]  # it may be as long as the whole body
            raise wrong(f"{place}.{shown}", f"is not known; known are {', '.join(sorted(known))}")
    for name in needed:
        if name not in value:
            raise wrong(f"{place}.{name}", "is missing")
    return value


def items(value: Any, place: str, low: int = 0, high: int | None = None) -> Sequence[Any]:
    """A list of ``low`` to ``high`` items. Raises DecisionError."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise wrong(place, f"expected a list, got {told(value)}")
    if len(value) < low or (high is not None and len(value) > high):
        bounds = f"{low} to {high} items" if high is not None else f"at least {low} item"
        raise wrong(place, f"expected {bounds}, got {len(value)}")
    return value


def text(value: Any, place: str, *, empty: bool = True) -> str:
    """A text of valid characters. Raises DecisionError."""
    if not isinstance(value, str):
        raise wrong(place, f"expected a text, got {told(value)}")
    if not empty and not value.strip():
        raise wrong(place, "is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise wrong(place, "holds a lone surrogate, which is no character") from error
    return value


def one_of(value: Any, place: str, choices: Collection[str]) -> str:
    """One of some texts. Raises DecisionError."""
    if not isinstance(value, str) or value not in choices:
        raise unexpected(value, place, choices)
    return value


def unexpected(value: Any, place: str, choices: Collection[str]) -> DecisionError:
    """An error about a value that is none of some texts."""
    return wrong(place, f"expected one of {', '.join(choices)}, got {told(value)}")


def json_text(value: Any, place: str) -> str:
    """The text that stands for JSON data: one line, in the order of its members.

    Raises:
        DecisionError: it is no JSON, or over MAX_LEVELS, MAX_VALUES or MAX_BYTES.
    """
    _bounded(value, place)
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
        compact = len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())
    except UnicodeEncodeError as error:
        raise wrong(place, "holds a lone surrogate, which is no character") from error
    except (TypeError, ValueError) as error:
        raise wrong(place, f"is no JSON: {error}") from error
    if compact > MAX_BYTES:
        raise wrong(place, f"has {compact} bytes of JSON, over the limit of {MAX_BYTES}")
    return written


def _bounded(value: Any, place: str) -> None:
    """Refuse data with too many values, or levels, before anything else is done with it."""
    level, count = [value], 1
    for _ in range(MAX_LEVELS + 1):
        holders = [item for item in level if isinstance(item, (Mapping, list, tuple))]
        if not holders:
            return
        count += sum(map(len, holders))
        if count > MAX_VALUES:
            raise wrong(place, f"holds more than {MAX_VALUES} values")
        level = [v for h in holders for v in (h.values() if isinstance(h, Mapping) else h)]
    raise wrong(place, f"has more than {MAX_LEVELS} lists and objects in each other")


def told(value: Any) -> str:
    """What was given, short."""
    return "null" if value is None else reprlib.repr(value)
