"""Marked text: what users write, told apart from what a chat template writes around it.

While a template is rendered, those characters of users' texts that control tokens are made of
are replaced by *marks*: lone surrogates, which no valid text holds, one for each character.
So whatever a template does to a text, a control token in the result that holds no mark was
written by the template. Templates compare, search and split such texts all the same:
:class:`MarkedText` looks at the characters that the marks stand for. Operations that
it does not know keep the marks, so they are safe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

from dllmserve.errors import TokenizerError

#: roles of messages, as templates know them
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_MARKS = range(0xD800, 0xE000)
_ANY_MARK = re.compile("[\ud800-\udfff]")


class Marks:
    """Which characters are marked, and with what.

    Args:
        tokens: texts of the control tokens.

    Raises:
        TokenizerError: the tokens have more characters than there are marks, 2,048.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        tokens = list(tokens)
        used = {c for token in tokens for form in _cases(token) for c in form}
        # blanks stay as they are: a template may strip them from texts that it has put together
        found = sorted((c for c in used if not c.isspace()), key=lambda c: (c.isalnum(), c))
        marked = set(found[: len(_MARKS)])
        if any(marked.isdisjoint(token) for token in tokens):
            raise TokenizerError(
                f"the tokenizer's added tokens are made of {len(found)} characters, of which "
                f"{len(_MARKS)} can be told from those of users: use generate() instead of chat()"
            )
        pairs = [(ord(c), mark) for c, mark in zip(found, _MARKS, strict=False)]
        self.table = dict(pairs)
        self._names = {c: mark for c, mark in pairs if not chr(c).isalnum()}
        self._characters = {mark: c for c, mark in pairs}
        self._words = [token for token in tokens if token.isidentifier()]

    def mark(self, text: str) -> str:
        """A text of a user, marked."""
        return self.wrap(text.translate(self.table))

    def mark_name(self, text: str) -> str:
        """A role, of which letters and digits stay: templates put ``<|`` and ``|>`` around it.

        The common ones stay as they are: a template may well write the token of one.
        """
        if text in ROLES:
            return text
        if any(word in text for word in self._words):
            return self.mark(text)
        return self.wrap(text.translate(self._names))

    def wrap(self, text: str) -> str:
        """A text that may hold marks, as one that works for templates."""
        return MarkedText(text, self) if _ANY_MARK.search(text) else text

    def plain(self, text: str) -> str:
        """The text without marks: as long as before, each with its own character."""
        return str.translate(text, self._characters)


def _cases(token: str) -> tuple[str, str, str]:
    """A template may change the case of what a user wrote."""
    return token, token.lower(), token.upper()


class MarkedText(str):
    """A text with marks that behaves as the text without them.

    Only string operations that templates use are known; the others see the marks.
    """

    __slots__ = ("_marks", "_plain")
    _marks: Marks
    _plain: str

    def __new__(cls, text: str, marks: Marks) -> MarkedText:
        """A text that may hold marks of these."""
        self = super().__new__(cls, text)
        self._marks = marks
        self._plain = marks.plain(text)
        return self

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        # what a template writes of a list or a table is made of these
        return self._marks.mark(repr(self._plain))

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self._plain,)

    def __hash__(self) -> int:
        return hash(self._plain)

    def __getitem__(self, index: SupportsIndex | slice) -> str:
        return self._marks.wrap(super().__getitem__(index))

    def __iter__(self) -> Iterator[str]:
        return map(self._marks.wrap, super().__iter__())

    def __add__(self, other: str) -> str:
        return self._marks.wrap(super().__add__(other))

    def __radd__(self, other: str) -> str:
        return self._marks.wrap(str.__add__(other, self))

    def __mul__(self, count: SupportsIndex) -> str:
        return self._marks.wrap(super().__mul__(count))

    def removeprefix(self, prefix: str, /) -> str:
        """See str."""
        return self[len(self) - len(self._plain.removeprefix(unmarked(prefix))) :]

    def removesuffix(self, suffix: str, /) -> str:
        """See str."""
        return self[: len(self._plain.removesuffix(unmarked(suffix)))]

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        """See str; what replaces keeps its own marks, or has none."""
        if not old:
            return self
        return self._marks.wrap(str.join(new, self.split(old, count)))

    def join(self, parts: Iterable[str], /) -> str:
        """See str."""
        return self._marks.wrap(super().join(parts))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """See str."""
        return self._pieces(self._plain.split(unmarked(sep), maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """See str."""
        return self._pieces(self._plain.rsplit(unmarked(sep), maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        """See str."""
        return self._pieces(self._plain.splitlines(keepends), 0)

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        """See str."""
        before, found, after = self._pieces(list(self._plain.partition(unmarked(sep))), 0)
        return before, found, after

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        """See str."""
        before, found, after = self._pieces(list(self._plain.rpartition(unmarked(sep))), 0)
        return before, found, after

    def _pieces(self, parts: list[str], gap: int) -> list[str]:
        """Parts of the plain text, in order, with ``gap`` characters or blanks in between."""
        found, place = [], 0
        for part in parts:
            start = self._plain.index(part, place)
            found.append(self[start : start + len(part)])
            place = start + len(part) + gap
        return found


def unmarked(value: Any) -> Any:
    """The same data without marks. Use it to look at users' texts, never to write them."""
    if isinstance(value, MarkedText):
        return value._plain
    if isinstance(value, Mapping):
        return {unmarked(key): unmarked(item) for key, item in value.items()}
    return type(value)(map(unmarked, value)) if type(value) in (list, tuple) else value


def _asked(name: str) -> Callable[..., Any]:
    """A method that finds something out about the plain text."""
    method = getattr(str, name)

    def call(self: MarkedText, *args: Any) -> Any:
        return method(self._plain, *map(unmarked, args))

    return call


def _stripped(name: str) -> Callable[..., str]:
    """strip, lstrip or rstrip."""
    method = getattr(str, name)

    def call(self: MarkedText, chars: str | None = None) -> str:
        kept = method(self._plain, unmarked(chars))
        start = self._plain.index(kept)
        return self[start : start + len(kept)]

    return call


def _recased(name: str) -> Callable[[MarkedText], str]:
    """lower, upper and their like."""
    method = getattr(str, name)

    def call(self: MarkedText) -> str:
        changed: str = method(self._plain)
        if len(changed) != len(self):  # "ß".upper() is "SS"
            return self._marks.mark(changed)
        marked = changed.translate(self._marks.table)
        old = str.__iter__(self)
        pairs = zip(old, changed, marked, strict=True)
        return self._marks.wrap("".join(m if _ANY_MARK.match(o) else c for o, c, m in pairs))

    return call


_ASKED = (
    *("__contains__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"),
    *("count", "find", "index", "rfind", "rindex", "startswith", "endswith"),
    *(name for name in dir(str) if name.startswith("is")),
)
for _name in _ASKED:
    setattr(MarkedText, _name, _asked(_name))
for _name in ("strip", "lstrip", "rstrip"):
    setattr(MarkedText, _name, _stripped(_name))
for _name in ("lower", "upper", "title", "capitalize", "swapcase", "casefold"):
    setattr(MarkedText, _name, _recased(_name))
