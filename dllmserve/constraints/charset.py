"""Sets of Unicode characters, as sorted ranges of code points.

Surrogates are no characters: no set holds them, and no text does.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

#: sorted ranges (first, last) that neither touch nor overlap
CharSet = tuple[tuple[int, int], ...]

LAST = 0x10FFFF
ALL: CharSet = ((0, 0xD7FF), (0xE000, LAST))
NONE: CharSet = ()
_SURROGATES = (0xD800, 0xDFFF)


def _merged(ranges: Iterable[tuple[int, int]]) -> CharSet:
    found: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        else:
            found.append((low, high))
    return tuple(found)


def charset(ranges: Iterable[tuple[int, int]]) -> CharSet:
    """The set of all characters in ranges, which may overlap.

    Example:
        >>> charset([(0x61, 0x63), (0x62, 0x7A)])
        ((97, 122),)
    """
    return intersect(_merged(ranges), ALL)


def chars(text: str) -> CharSet:
    """The set of a text's characters."""
    return charset((ord(c), ord(c)) for c in text)


def union(*sets: CharSet) -> CharSet:
    """All characters of any of the sets."""
    # two ranges that touch at the surrogates stay two
    return charset(pair for one in sets for pair in one)


def intersect(a: CharSet, b: CharSet) -> CharSet:
    """The characters that are in both."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        low, high = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if low <= high:
            found.append((low, high))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def negate(a: CharSet) -> CharSet:
    """All characters that are not in the set."""
    found, place = [], 0
    for low, high in _merged([*a, _SURROGATES]):
        if low > place:
            found.append((place, low - 1))
        place = high + 1
    if place <= LAST:
        found.append((place, LAST))
    return tuple(found)


def subtract(a: CharSet, b: CharSet) -> CharSet:
    """The characters of the first set that are not in the second."""
    return intersect(a, negate(b))


@functools.cache
def category(letter: str) -> CharSet:
    r"""What Python's ``\d``, ``\w`` or ``\s`` matches in a text: all of Unicode, not ASCII alone.

    Args:
        letter: "d", "w" or "s".
    """
    found: list[tuple[int, int]] = []
    for low, high in ALL:
        text = "".join(map(chr, range(low, high + 1)))
        spans = (match.span() for match in re.finditer(rf"\{letter}+", text))
        found += [(low + start, low + end - 1) for start, end in spans]
    return charset(found)
