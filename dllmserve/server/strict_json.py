"""Reads JSON bodies: limits are checked before parsing, and ambiguous JSON is refused.

A byte of JSON can become 30 bytes of objects. So the values of a body are counted in its bytes
first, which costs little more than a copy, and a body with too many is refused before it is parsed.
JSON that two parsers could read differently is refused as well: members that are given twice, NaN,
anything but UTF-8.
"""

from __future__ import annotations

import codecs
import json
from array import array
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn

from dllmserve.server.failures import ApiError
from dllmserve.server.http.escape import shown

#: texts (names of members are texts), lists, objects, fractions, true, false and null of a body:
#: more than twice what a conversation of 1,024 messages with calls of tools has
MAX_VALUES = 32_768
#: lists and objects in each other
MAX_DEPTH = 100

_BRACKETS = b"[{]}"
_STEPS = bytes.maketrans(_BRACKETS, b"\x01\x01\xff\xff")
_NO_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))
#: all bytes but those of which a value outside of texts that is no whole number has one; true and
#: false have two
_UNCOUNTED = bytes(set(range(256)) - set(b"[{.eEtfn"))


class Size(NamedTuple):
    """What a JSON text holds.

    Attributes:
        values: texts, lists, objects, fractions, true, false and null.
        members: of all objects, counted as often as they are there.
        commas: those outside of texts: one less than there are values and whole numbers in a list.
        depth: most lists and objects in each other.
        outside: bytes outside of texts.
    """

    values: int
    members: int
    commas: int
    depth: int
    outside: int


def measure(data: bytes) -> Size:
    r"""Count what a JSON text holds, without parsing it.

    It takes a few passes over the bytes, and the time does not depend on their values. In a text
    that is not valid JSON, at least the part before its first mistake is counted.

    Example:
        >>> measure(rb'{"a": [1, 2, "\"["], "b": null}')
        Size(values=6, members=2, commas=3, depth=2, outside=20)
    """
    if b"\\" in data:
        # the quotes that are left are the ends of texts
        data = data.replace(rb"\\", b"").replace(rb"\"", b"")
    texts = (data.count(b'"') + 1) // 2
    if texts > MAX_VALUES:  # too many already; splitting the text would take memory
        return Size(texts, 0, 0, 0, 0)
    outside = b"".join(data.split(b'"')[::2])
    counted = outside.translate(None, _UNCOUNTED)
    values = texts + len(counted) - counted.count(b"t") - counted.count(b"f")
    # an allowed body has at most MAX_VALUES brackets that open, and as many that close
    steps = outside.translate(_STEPS, _NO_BRACKETS)[: 2 * MAX_VALUES]
    depth = max(accumulate(array("b", steps)), default=0)
    return Size(values, outside.count(b":"), outside.count(b","), depth, len(outside))


def check_texts(texts: Iterable[str], param: str) -> None:
    """Refuse texts of JSON inside of a body that hold too much, together, to be parsed.

    Args:
        texts: JSON or not.
        param: the body's field that they are in.

    Raises:
        ApiError: 400.
    """
    sizes = [measure(text.encode()) for text in texts]
    depth = max((size.depth for size in sizes), default=0)
    _check(sum(max(s.values, s.commas) for s in sizes), depth, f"JSON inside of {param}", param)


def _check(values: int, depth: int, name: str, param: str | None = None) -> None:
    why = ""
    if depth > MAX_DEPTH:
        why = f"is nested too deeply: lists and objects may be {MAX_DEPTH} deep."
    elif values > MAX_VALUES:
        why = (
            f"holds {values} texts, lists, objects and other values that are no whole numbers, "
            f"over the limit of {MAX_VALUES}: split the request into smaller ones."
        )
    if why:
        raise ApiError(400, f"{name} {why}", code="invalid_json", param=param)


def parse(body: bytes, most_numbers: int) -> Any:
    """The value of a body.

    Args:
        body: JSON in UTF-8; a byte order mark before it is skipped.
        most_numbers: whole numbers that it may hold.

    Raises:
        ApiError: 400, with what is wrong with it.
    """
    size = measure(body)
    _check(size.values, size.depth, "The body")
    if size.commas > most_numbers + MAX_VALUES:
        raise ApiError(
            400,
            f"The body holds about {size.commas} numbers, over the {most_numbers} token ids that "
            "max_prompts prompts of max_model_len tokens have: send fewer, or shorter ones.",
            code="context_length_exceeded",
        )
    members = 0

    def count(made: dict[str, Any]) -> dict[str, Any]:
        nonlocal members
        members += len(made)
        return made

    # raised below, outside of the handlers: an error with a cause would keep the body in memory
    why = ""
    try:
        text = body.removeprefix(codecs.BOM_UTF8).decode()
        value = json.loads(
            text,
            object_hook=count,
            parse_int=_small_numbers().__getitem__ if size.outside < 6 * size.commas else None,
            parse_constant=_no_number,
        )
    except UnicodeDecodeError as error:
        why = _not_unicode(body, error)
    except json.JSONDecodeError as error:
        why = f"The body is not valid JSON, from character {error.pos + 1} on."
        if "\0" in error.doc:
            why += " It has NUL bytes: send JSON encoded as UTF-8."
    except _NoNumber as error:
        why = f"The body is not valid JSON: it has {error}, which is no number there."
    except ValueError:  # Python reads whole numbers up to some length only
        why = "The body has a number of too many digits."
    if why:
        raise ApiError(400, why, code="invalid_json")
    if members < size.members:
        name, outermost = _twice(text)
        name = shown(name, 100)
        why = f"The body has '{name}' twice in one object: give each member once."
        raise ApiError(400, why, code="invalid_json", param=name if outermost else None)
    return value


def _twice(text: str) -> tuple[str, bool]:
    """The first member that an object has twice, and whether it is the outermost object."""
    found: list[tuple[str, dict[str, Any]]] = []

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs) and not found:
            found.append((Counter(name for name, _ in pairs).most_common(1)[0][0], made))
        return made

    value = json.loads(text, object_pairs_hook=look)
    return found[0][0], found[0][1] is value


class _NoNumber(Exception):
    """NaN or an infinity, which Python would read."""


def _no_number(name: str) -> NoReturn:
    raise _NoNumber(name)


def _not_unicode(body: bytes, error: UnicodeDecodeError) -> str:
    start = error.start + len(body) - len(error.object)  # of the body, mark included
    return (
        f"The body is not UTF-8 text: byte {start} (0x{body[start]:02x}) does not belong there. "
        "Send JSON encoded as UTF-8."
    )


class _Numbers(dict[str, int]):
    """Whole numbers by their texts; a missing one is made by int()."""

    __missing__ = staticmethod(int)


@cache
def _small_numbers() -> _Numbers:
    """Numbers of up to four characters.

    Python makes an object of 32 bytes of every number above 256, eight times what "300," takes. In
    bodies of many short numbers these are shared.
    """
    return _Numbers((str(number), number) for number in range(-999, 10_000))
