"""Marked text: what users write, told apart from what a chat template writes around it.

While a template is rendered, those characters of users' texts that control tokens are made of
are replaced by *marks*: lone surrogates, which no valid text holds, one for each character.
So whatever a template does to a text, a control token in the result that holds no mark was
written by the template. Templates compare, search and split such texts all the same:
:class:`MarkedText` looks at the characters that the marks stand for. Operations that
it does not know keep the marks, so they are safe.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

from jinja2 import Environment, Template, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from dllmserve.engine.codec import ROLES, Codec, Controls, valid_text
from dllmserve.engine.template import ChatTemplate
from dllmserve.errors import PromptError, TokenizerError

#: characters that a vocabulary may lack; normalizers drop some of them
_RARE = "\U0010fffd\U0001f642\u65e5\u2603\u0e5b"
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


class _Joins(NodeTransformer):
    """``a ~ b`` becomes ``[a, b] | join``, which is the same, and a filter."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        items = nodes.List(node.nodes).set_lineno(node.lineno)
        joined = nodes.Filter(items, "join", [], [], None, None)
        joined.set_lineno(node.lineno)
        return joined


class _Sandbox(ImmutableSandboxedEnvironment):
    """Whatever puts texts together gives a MarkedText if there are marks in the result."""

    wrap: Callable[[Any], Any]

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self.wrap(super().call(context, obj, *args, **kwargs))


class MarkedTemplate(ChatTemplate):
    """A chat template whose users' texts are marked; what it renders holds marks.

    Args:
        source, variables: as for :class:`ChatTemplate`.
        marks: for the texts.

    Raises:
        TokenizerError: the template has errors.
        PromptError: of ``render``: a text is no valid Unicode.
    """

    sandbox = _Sandbox

    def __init__(self, source: str, variables: Mapping[str, str], marks: Marks) -> None:
        self._marks = marks
        super().__init__(source, variables)

    def environment(self) -> Environment:
        """See :class:`ChatTemplate`."""
        marks, made = self._marks, super().environment()

        def wrap(value: Any) -> Any:
            return marks.wrap(value) if type(value) is str else value

        def concat(parts: Iterable[str]) -> str:
            return marks.wrap("".join(parts))

        def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(call)  # keeps what jinja2 says of its arguments
            def result(*args: Any, **kwargs: Any) -> Any:
                return wrap(call(*args, **kwargs))

            return result

        made.wrap = wrap  # type: ignore[attr-defined]
        made.concat = concat  # type: ignore[method-assign]
        made.filters = {name: wrapped(call) for name, call in made.filters.items()}
        return made

    def compiled(self, environment: Environment, source: str) -> Template:
        """See :class:`ChatTemplate`."""
        return environment.from_string(_Joins().visit(environment.parse(source)))

    def json(self, value: Any, **options: Any) -> str:
        """See :class:`ChatTemplate`."""
        text = super().json(unmarked(value), **options)
        return self._marks.mark(text) if _has_marks(value) else text

    def text(self, text: str) -> str:
        """See :class:`ChatTemplate`."""
        return self._marks.mark(valid_text(text))

    def role(self, role: str) -> str:
        """See :class:`ChatTemplate`."""
        return self._marks.mark_name(valid_text(role))

    def plain(self, text: str) -> str:
        """See :class:`ChatTemplate`."""
        return self._marks.plain(text)


def _has_marks(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_marks(item) for pair in value.items() for item in pair)
    if isinstance(value, (list, tuple)):
        return any(map(_has_marks, value))
    return isinstance(value, MarkedText)


class LiteralPrompts:
    """Prompts in which only the template writes control tokens.

    Args:
        codec: the tokenizer.
        controls: its control tokens.

    Attributes:
        marks: for the texts of users while a template is rendered.
    """

    def __init__(self, codec: Codec, controls: Controls) -> None:
        self._codec, self._tokens, self._pattern = codec, controls.tokens, controls.pattern
        # characters that the vocabulary lacks may all become one of them, such as <unk>
        unknown = [id for character in _RARE for id in codec.encode_literally(character)]
        self._ids = frozenset(id for id, _ in self._tokens.values()).difference(unknown)
        self._whole_words = any(token.single_word for _, token in self._tokens.values())
        self.marks = Marks(self._tokens)

    def encode(self, marked: str) -> list[int]:
        """Ids of a rendered prompt, in which control tokens that hold marks are ordinary text.

        Raises:
            PromptError: a character that the tokenizer can read as a control token only.
        """
        text = self.marks.plain(marked)
        written = list(self._pattern.finditer(marked))
        places = [match.span() for match in written]
        # a token that must stand alone could be hidden by a letter beside it
        if not self._whole_words and places == [m.span() for m in self._pattern.finditer(text)]:
            ids = self._codec.encode(text, False)
            # the tokenizer may read a control token into other characters
            if self._among(ids) == self._among([self._tokens[m[0]][0] for m in written]):
                return ids
        return list(self._pieces(text, written))

    def _pieces(self, text: str, written: list[re.Match[str]]) -> Iterator[int]:
        """The template's control tokens, and what is in between by itself."""
        place, strips = 0, False
        for match in written:
            id, token = self._tokens[match[0]]
            between = text[place : match.start()]
            between = between.lstrip() if strips else between
            yield from self._ordinary(between.rstrip() if token.lstrip else between)
            yield id
            place, strips = match.end(), token.rstrip
        rest = text[place:]
        yield from self._ordinary(rest.lstrip() if strips else rest)

    def _ordinary(self, text: str) -> list[int]:
        """Ids of a text that is to hold no control token."""
        if not text:
            return []
        ids = self._codec.encode(text, False)
        return self._literal(text) if self._among(ids) else ids

    def _literal(self, text: str) -> list[int]:
        ids = self._codec.encode_literally(text)
        if not self._among(ids):
            return ids
        if len(text) == 1:
            raise PromptError(
                f"the messages hold {text!r}, which this tokenizer can read as a special token only"
            )
        # the vocabulary itself holds the token: halves of a text do not hold it whole
        middle = len(text) // 2
        return self._literal(text[:middle]) + self._literal(text[middle:])

    def _among(self, ids: list[int]) -> list[int]:
        return [id for id in ids if id in self._ids]
