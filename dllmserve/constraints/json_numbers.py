"""Ranges of numbers, and multiples, as texts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

import numpy as np

from dllmserve.constraints import charset, json_text, nodes
from dllmserve.constraints.alphabet import Alphabet
from dllmserve.constraints.dfa import Dfa, intersection, minimised
from dllmserve.constraints.nfa import automaton
from dllmserve.constraints.nodes import (
    EMPTY,
    NOTHING,
    Embedded,
    Node,
    Repeat,
    concat,
    either,
    text,
)

_DIGIT = nodes.between("0", "9")
_ANY = Repeat(_DIGIT, 0, None)
#: the smallest absolute value that is written without an exponent where zero is excluded
_SMALL = Decimal("0.000001")
_TINY, _HUGE = Decimal("0.0001"), Decimal(10) ** 16


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number; None is no bound.

    Attributes:
        low, high: the least and the largest value.
        low_open, high_open: whether the bound itself is excluded.
    """

    low: Decimal | None = None
    high: Decimal | None = None
    low_open: bool = False
    high_open: bool = False

    def contains(self, value: Decimal) -> bool:
        """Whether a number is within the bounds."""
        above = self.low is None or value > self.low or (value == self.low and not self.low_open)
        below = (
            self.high is None or value < self.high or (value == self.high and not self.high_open)
        )
        return above and below


def integers(bounds: Bounds) -> Node:
    """Integers within bounds, without leading zeros and exponents."""
    low, high = bounds.low, bounds.high
    least = None if low is None else int(low.to_integral_value(ROUND_CEILING))
    most = None if high is None else int(high.to_integral_value(ROUND_FLOOR))
    if least is not None and bounds.low_open and least == low:
        least += 1
    if most is not None and bounds.high_open and most == high:
        most -= 1
    if least is None and most is None:
        return json_text.INTEGER
    if least is not None and most is not None and least > most:
        return NOTHING
    parts = []
    if least is None or least < 0:
        # magnitudes of what is below zero
        largest = None if least is None else -least
        smallest = 1 if most is None or most >= 0 else -most
        parts.append(concat(text("-"), _whole(smallest, largest)))
    if most is None or most >= 0:
        parts.append(_whole(max(least or 0, 0), most))
    return either(parts)


def _whole(low: int, high: int | None) -> Node:
    """Integers from ``low`` to ``high``, none of them negative."""
    if high is None:
        return Embedded(automaton(_at_least(str(low), "")))
    least, most = automaton(_at_least(str(low), "")), automaton(_at_most(str(high), ""))
    return Embedded(intersection(least, most))


def decimals(bounds: Bounds) -> Node:
    """Numbers within bounds, as texts that are within them when they are read as floats."""
    low, high = bounds.low, bounds.high
    if low is None and high is None:
        return json_text.NUMBER
    nonzero = (low == 0 and bounds.low_open) or (high == 0 and bounds.high_open)
    if low is not None and bounds.low_open:
        low = _next(low, math.inf)
    if high is not None and bounds.high_open:
        high = _next(high, -math.inf)
    parts = []
    if high is None or high >= 0:
        parts.append(_absolute(low, high, nonzero))
    if low is None or low < 0:
        parts.append(concat(text("-"), _absolute(_minus(high), _minus(low), nonzero)))
    return either(parts)


def _minus(value: Decimal | None) -> Decimal | None:
    return None if value is None else -value


def _next(value: Decimal, towards: float) -> Decimal:
    """The next float; no text on its side of the bound is read as the bound. Zero stays."""
    return value if value == 0 else Decimal(repr(math.nextafter(float(value), towards)))


def _absolute(low: Decimal | None, high: Decimal | None, nonzero: bool) -> Node:
    """Numbers without a sign that are at least ``low``, at most ``high``, and zero perhaps not."""
    if high is not None and (high < 0 or (low is not None and low > high)):
        return NOTHING
    least = max(low or Decimal(0), Decimal(0))
    plain = _SMALL if nonzero and least == 0 else least
    found = automaton(_at_least(*_split(plain), decimals=True))
    if high is not None:
        found = intersection(found, automaton(_at_most(*_split(high), decimals=True)))
    parts: list[Node] = [Embedded(found)]
    if least == 0 and (high is None or high >= _TINY):
        parts.append(json_text.TINY)
    if high is None and least <= _HUGE:
        parts.append(json_text.HUGE)
    return either(parts)


def _split(value: Decimal) -> tuple[str, str]:
    """Digits before the point, and those behind it without zeros at the end."""
    whole, _, fraction = f"{value:f}".partition(".")
    return whole.lstrip("0") or "0", fraction.rstrip("0")


def _digit(low: int, high: int) -> Node:
    return nodes.between(str(low), str(high)) if low <= high else NOTHING


def _digits(count: int) -> Node:
    return Repeat(_DIGIT, count, count)


def _more_digits(count: int) -> Node:
    """Whole numbers of more than ``count`` digits, not zero."""
    return concat(nodes.between("1", "9"), Repeat(_DIGIT, count, None))


def _fewer_digits(count: int) -> Node:
    """Whole numbers of fewer than ``count`` digits."""
    if count < 2:
        return NOTHING
    return either([text("0"), concat(nodes.between("1", "9"), Repeat(_DIGIT, 0, count - 2))])


def _at_least(whole: str, fraction: str, *, decimals: bool = False) -> Node:
    """Unsigned numbers that are not below one."""
    rest = nodes.optional(concat(text("."), Repeat(_DIGIT, 1, None))) if decimals else EMPTY
    parts = [concat(_more_digits(len(whole)), rest)]
    for i, digit in enumerate(whole):
        higher = _digit(int(digit) + 1, 9)
        parts.append(concat(text(whole[:i]), higher, _digits(len(whole) - i - 1), rest))
    if not fraction:
        parts.append(concat(text(whole), rest))
        return either(parts)
    for i, digit in enumerate(fraction):
        parts.append(concat(text(f"{whole}.{fraction[:i]}"), _digit(int(digit) + 1, 9), _ANY))
    parts.append(concat(text(f"{whole}.{fraction}"), _ANY))
    return either(parts)


def _at_most(whole: str, fraction: str, *, decimals: bool = False) -> Node:
    """Unsigned numbers that are not above one."""
    rest = nodes.optional(concat(text("."), Repeat(_DIGIT, 1, None))) if decimals else EMPTY
    parts = [concat(_fewer_digits(len(whole)), rest)]
    for i, digit in enumerate(whole):
        # a number of several digits does not begin with zero
        lower = _digit(1 if i == 0 and len(whole) > 1 else 0, int(digit) - 1)
        parts.append(concat(text(whole[:i]), lower, _digits(len(whole) - i - 1), rest))
    parts.append(text(whole))
    if not decimals:
        return either(parts)
    for i, digit in enumerate(fraction):
        start = text(f"{whole}.{fraction[:i]}")
        parts.append(concat(start, _digit(0, int(digit) - 1), _ANY))
        parts.append(text(f"{whole}.{fraction[: i + 1]}"))
    zeros = Repeat(text("0"), 0 if fraction else 1, None)
    parts.append(concat(text(f"{whole}.{fraction}"), zeros))
    return either(parts)


def multiples(of: int) -> Dfa:
    """Integers that a number divides, without leading zeros."""
    sets = [charset.chars(c) for c in "0123456789-"]
    alphabet, inside = Alphabet.of(sets)
    symbol = [int(np.flatnonzero(row)[0]) for row in inside]
    # states: the remainders, then the start, after a sign, after a single zero, and dead
    start, signed, zero, dead = range(of, of + 4)
    delta = np.full((of + 4, alphabet.size), dead, np.int32)
    for digit in range(10):
        delta[:of, symbol[digit]] = (np.arange(of) * 10 + digit) % of
        if digit:
            delta[[start, signed], symbol[digit]] = digit % of
    delta[start, symbol[0]] = zero
    delta[start, symbol[10]] = signed
    accepting = np.zeros(of + 4, np.bool_)
    accepting[[0, zero]] = True
    return minimised(Dfa(alphabet, delta, accepting, start))
