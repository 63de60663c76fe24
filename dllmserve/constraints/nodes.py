"""Languages as trees, from which automata are made.

A node is immutable and may stand in several places; two nodes are equal only if they are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dllmserve.constraints import charset
from dllmserve.constraints.charset import CharSet

if TYPE_CHECKING:
    from dllmserve.constraints.dfa import Dfa


class Node:
    """A set of texts."""

    __slots__ = ()


@dataclass(frozen=True, eq=False)
class Chars(Node):
    """One character of a set."""

    set: CharSet


@dataclass(frozen=True, eq=False)
class Concat(Node):
    """One part after the other; without parts the empty text."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Either(Node):
    """A text of any of the parts; without parts none at all."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Repeat(Node):
    """``low`` to ``high`` times a part, with a separator in between; no ``high`` is no bound."""

    part: Node
    low: int
    high: int | None
    separator: Node | None = None


@dataclass(frozen=True, eq=False)
class Members(Node):
    """Parts in their order, each there or not, with a separator in between.

    Attributes:
        parts: the parts, and whether each must be there.
        low, high: fewest and most parts; no ``high`` is no bound.
        separator: between two that are there.
    """

    parts: tuple[tuple[Node, bool], ...]
    low: int
    high: int | None
    separator: Node


@dataclass(frozen=True, eq=False)
class Embedded(Node):
    """The language of an automaton."""

    dfa: Dfa


EMPTY: Node = Concat(())
NOTHING: Node = Either(())
ANY_TEXT: Node = Repeat(Chars(charset.ALL), 0, None)


def text(value: str) -> Node:
    """Exactly this text."""
    return Concat(tuple(Chars(charset.chars(c)) for c in value))


def concat(*parts: Node) -> Node:
    """One part after the other."""
    return parts[0] if len(parts) == 1 else Concat(parts)


def either(parts: Iterable[Node]) -> Node:
    """Any of the parts."""
    found = tuple(parts)
    return found[0] if len(found) == 1 else Either(found)


def optional(part: Node) -> Node:
    """The part, or the empty text."""
    return Repeat(part, 0, 1)


def one_of(characters: str) -> Node:
    """One of these characters."""
    return Chars(charset.chars(characters))


def between(first: str, last: str) -> Node:
    """One character of a range."""
    return Chars(charset.charset([(ord(first), ord(last))]))
