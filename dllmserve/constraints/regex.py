"""Python's regular expressions, read by Python's own parser, as languages.

What no finite automaton can do, or what Python does in a way that depends on places in a text, is
refused by name.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from dllmserve.constraints import charset, limits
from dllmserve.constraints.charset import CharSet
from dllmserve.constraints.nodes import EMPTY, Chars, Either, Node, Repeat, concat, either
from dllmserve.errors import InvalidParameterError

# Python's parser itself: nothing else reads all of its syntax in the same way
_parser: Any = re._parser  # type: ignore[attr-defined]

#: catch_warnings changes what all threads see, so one thread at a time is inside of it
_parsing = threading.Lock()
_CATEGORIES = {
    "CATEGORY_DIGIT": ("d", True),
    "CATEGORY_NOT_DIGIT": ("d", False),
    "CATEGORY_WORD": ("w", True),
    "CATEGORY_NOT_WORD": ("w", False),
    "CATEGORY_SPACE": ("s", True),
    "CATEGORY_NOT_SPACE": ("s", False),
}
_REFUSED = {
    "ASSERT": "lookaround, (?=...) and (?<=...)",
    "ASSERT_NOT": "lookaround, (?!...) and (?<!...)",
    "FAILURE": "lookaround, (?!...) and (?<!...)",
    "GROUPREF": r"back references, \1 and (?P=name)",
    "GROUPREF_EXISTS": "conditionals, (?(1)...)",
    "ATOMIC_GROUP": "atomic groups, (?>...)",
    "POSSESSIVE_REPEAT": "possessive quantifiers, such as *+",
}
_PLACES = {
    "AT_BEGINNING": "^",
    "AT_BEGINNING_STRING": r"\A",
    "AT_END": "$",
    "AT_END_STRING": r"\Z",
}
_NEWLINE = charset.chars("\n")
#: items of a parsed expression: names of operations with their arguments
_Items = Sequence[tuple[Any, Any]]


def parse(pattern: str, name: str, *, search: Node | None = None, end: Node = EMPTY) -> Node:
    r"""The language of a regular expression.

    Args:
        pattern: in Python's syntax.
        name: what errors call it.
        search: None if a text has to match as a whole; else what may stand before and behind a
            match that is not anchored.
        end: what may stand behind an anchor at the end.

    Raises:
        InvalidParameterError: it is no regular expression, or uses what is not supported.

    Example:
        >>> from dllmserve.constraints.nfa import automaton
        >>> automaton(parse(r"\d+", "regex")).accepts("123")
        True
    """
    if len(pattern) > limits.MAX_TEXT:
        raise InvalidParameterError(
            f"{name} has {len(pattern):,} characters; at most {limits.MAX_TEXT:,} are possible"
        )
    try:
        with _parsing, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "possible nested set": we read it as Python does
            parsed = _parser.parse(pattern)
        flags = parsed.state.flags & ~re.UNICODE
        if flags:
            raise _refused(f"flags, here {re.RegexFlag(flags)!r}")
        return _Reader(end).sequence(list(parsed), search, search)
    except _Unsupported as error:
        raise InvalidParameterError(f"{name} {_short(pattern)} uses {error}") from None
    except (re.error, OverflowError) as error:
        raise InvalidParameterError(
            f"{name} {_short(pattern)} is no regular expression: {error}"
        ) from error
    except RecursionError as error:
        raise InvalidParameterError(f"{name} {_short(pattern)} is nested too deeply") from error


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 200 else pattern[:197] + "...")


class _Unsupported(Exception):
    """A part of the syntax that is refused."""


def _refused(what: str) -> _Unsupported:
    return _Unsupported(f"{what}: not supported in constraints")


class _Reader:
    """From the parser's items to nodes.

    ``left`` and ``right`` are what stands before and behind an item if it is not anchored there,
    and None where an anchor would be inside of the text.
    """

    def __init__(self, end: Node) -> None:
        self._end = end

    def whole(self, items: _Items) -> Node:
        """Items that stand inside of a text."""
        return concat(*(self._item(item) for item in items))

    def sequence(self, items: _Items, left: Node | None, right: Node | None) -> Node:
        """Items that begin where a text may, and end where it may."""
        before, behind = left or EMPTY, right or EMPTY
        items = list(items)
        while items and _place(items[0]) in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            before = EMPTY
            items.pop(0)
        while items and _place(items[-1]) in ("AT_END", "AT_END_STRING"):
            behind = self._end
            items.pop()
        if not items or not any(map(_anchored, (items[0], items[-1]))):
            return concat(before, self.whole(items), behind)
        if len(items) == 1:
            return self._edge(items[0], before, behind)
        first = self._edge(items[0], before, None)
        last = self._edge(items[-1], None, behind)
        return concat(first, self.whole(items[1:-1]), last)

    def _edge(self, item: tuple[Any, Any], left: Node | None, right: Node | None) -> Node:
        """An item at one edge of a text or at both; None is the edge that it is not at."""
        if not _anchored(item):
            return concat(left or EMPTY, self._item(item), right or EMPTY)
        operation, value = item
        alternatives: Iterable[Any]
        if str(operation) == "SUBPATTERN":
            self._plain_group(value)
            alternatives = [value[3]]
        elif str(operation) == "BRANCH":
            alternatives = value[1]
        else:
            return self._item(item)  # which says what is wrong
        return either(self._at_edges(list(items), left, right) for items in alternatives)

    def _at_edges(self, items: _Items, left: Node | None, right: Node | None) -> Node:
        if left is not None and right is not None:
            return self.sequence(items, left, right)
        if left is not None:
            return self._from_left(list(items), left)
        return self._to_right(list(items), right or EMPTY)

    def _from_left(self, items: _Items, left: Node) -> Node:
        while items and _place(items[0]) in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            left, items = EMPTY, items[1:]
        if not items:
            return left
        return concat(self._edge(items[0], left, None), self.whole(items[1:]))

    def _to_right(self, items: _Items, right: Node) -> Node:
        while items and _place(items[-1]) in ("AT_END", "AT_END_STRING"):
            right, items = self._end, items[:-1]
        if not items:
            return right
        return concat(self.whole(items[:-1]), self._edge(items[-1], None, right))

    def _plain_group(self, value: Any) -> None:
        _, added, removed, _ = value
        if added or removed:
            raise _refused(f"flags, here {re.RegexFlag(added or removed)!r}")

    def _item(self, item: tuple[Any, Any]) -> Node:
        operation, value = str(item[0]), item[1]
        if operation in _REFUSED:
            raise _refused(_REFUSED[operation])
        if operation == "AT":
            found = _PLACES.get(str(value))
            if found is None:
                raise _refused(r"word boundaries, \b and \B")
            raise _refused(f"the anchor {found} inside of a text")
        if operation == "SUBPATTERN":
            self._plain_group(value)
            return self.whole(list(value[3]))
        if operation == "BRANCH":
            return Either(tuple(self.whole(list(items)) for items in value[1]))
        if operation in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, part = value
            bound = None if high == _parser.MAXREPEAT else int(high)
            return Repeat(self.whole(list(part)), int(low), bound)
        return Chars(_characters(operation, value))


def _place(item: tuple[Any, Any]) -> str:
    return str(item[1]) if str(item[0]) == "AT" else ""


def _anchored(item: tuple[Any, Any]) -> bool:
    """Whether an item holds an anchor, however deep inside of groups."""
    operation, value = str(item[0]), item[1]
    if operation == "AT":
        return True
    if operation == "SUBPATTERN":
        return any(map(_anchored, value[3]))
    if operation == "BRANCH":
        return any(_anchored(inner) for items in value[1] for inner in items)
    return False


def _characters(operation: str, value: Any) -> CharSet:
    if operation == "LITERAL":
        return charset.charset([(value, value)])
    if operation == "NOT_LITERAL":
        return charset.negate(charset.charset([(value, value)]))
    if operation == "ANY":
        return charset.negate(_NEWLINE)
    if operation == "RANGE":
        return charset.charset([value])
    if operation == "CATEGORY":
        letter, positive = _CATEGORIES[str(value)]
        found = charset.category(letter)
        return found if positive else charset.negate(found)
    if operation != "IN":
        raise _refused(f"the operation {operation}")
    negated = bool(value) and str(value[0][0]) == "NEGATE"
    sets = [_characters(str(kind), inner) for kind, inner in value[negated:]]
    found = charset.union(*sets)
    return charset.negate(found) if negated else found
