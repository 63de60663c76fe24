"""JSON values as texts: what is written for strings, numbers and constants.

Text is written as Python's ``json.dumps(value, ensure_ascii=False)`` does, on one line, with ", "
and ": " between parts. Strings hold their characters themselves, and may hold escapes instead.
"""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

from dllmserve.constraints import charset, nodes
from dllmserve.constraints.charset import CharSet
from dllmserve.constraints.dfa import Dfa
from dllmserve.constraints.nfa import Positions, grouped
from dllmserve.constraints.nodes import Chars, Concat, Embedded, Node, Repeat, concat, either, text

COMMA = text(", ")
COLON = text(": ")
QUOTE = text('"')
#: what a backslash and a letter mean in a string
SHORT = {'"': '"', "\\": "\\", "/": "/", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
#: characters that stand in a string as they are
RAW = charset.subtract(charset.ALL, charset.union(charset.charset([(0, 31)]), charset.chars('"\\')))

_DIGIT = nodes.between("0", "9")
_DIGITS = Repeat(_DIGIT, 0, None)
_SOME = Repeat(_DIGIT, 1, None)
_HEX = Chars(charset.chars("0123456789abcdefABCDEF"))
#: four hexadecimal digits of a character that is no surrogate
_CODE = either(
    [
        Concat((Chars(charset.chars("0123456789abcefABCEF")), _HEX, _HEX, _HEX)),
        Concat((nodes.one_of("dD"), nodes.between("0", "7"), _HEX, _HEX)),
    ]
)
_ESCAPE = concat(
    text("\\"), either([nodes.one_of("".join(SHORT.values())), concat(text("u"), _CODE)])
)
#: one character of a string
CHARACTER = either([Chars(RAW), _ESCAPE])

_WHOLE = either([text("0"), concat(nodes.between("1", "9"), _DIGITS)])
_FRACTION = concat(text("."), _SOME)
MINUS = nodes.optional(text("-"))
INTEGER = either([text("0"), concat(MINUS, nodes.between("1", "9"), _DIGITS)])
#: powers of ten that keep every number of one digit before the point finite
_POWER = either(
    [
        Repeat(_DIGIT, 1, 2),
        concat(nodes.one_of("12"), _DIGIT, _DIGIT),
        concat(text("30"), nodes.between("0", "7")),
    ]
)
_E = nodes.one_of("eE")
_MANTISSA = concat(_DIGIT, nodes.optional(_FRACTION))
NUMBER = concat(
    MINUS,
    either(
        [
            concat(_WHOLE, nodes.optional(_FRACTION)),
            concat(_MANTISSA, _E, nodes.optional(nodes.one_of("+-")), _POWER),
        ]
    ),
)
#: absolute numbers that Python writes with an exponent: below 0.0001, and from 1e16 on
_LEADING = concat(nodes.between("1", "9"), nodes.optional(_FRACTION), _E)
TINY = concat(
    _LEADING,
    text("-"),
    either(
        [
            concat(nodes.optional(text("0")), nodes.between("5", "9")),
            concat(nodes.between("1", "9"), _DIGIT),
            concat(nodes.one_of("12"), _DIGIT, _DIGIT),
            concat(text("30"), nodes.between("0", "7")),
        ]
    ),
)
HUGE = concat(
    _LEADING,
    nodes.optional(text("+")),
    either(
        [
            concat(text("1"), nodes.between("6", "9")),
            concat(nodes.between("2", "9"), _DIGIT),
            concat(nodes.one_of("12"), _DIGIT, _DIGIT),
            concat(text("30"), nodes.between("0", "7")),
        ]
    ),
)


def string(low: int, high: int | None) -> Node:
    """A string of a number of characters."""
    return concat(QUOTE, Repeat(CHARACTER, low, high), QUOTE)


def value_text(value: Any) -> str:
    """A constant as it is written."""
    return json.dumps(_plain(value), ensure_ascii=False)


def constant(value: Any) -> Node:
    """Exactly this value."""
    return text(value_text(value))


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def quoted(dfa: Dfa) -> Node:
    r"""Strings whose characters an automaton accepts.

    They are written as they are, but for quotes, backslashes and control characters. The short
    escapes are possible for all that have one, ``\u00XX`` for control characters alone.
    """
    if dfa.empty:
        return nodes.NOTHING
    positions = Positions()
    final = positions.state()
    own = [positions.state() for _ in range(dfa.states)]
    sets = dfa.alphabet.sets()
    for source, row in enumerate(dfa.delta[: dfa.states].tolist()):
        if dfa.accepting[source]:
            positions.edge(own[source], charset.chars('"'), final)
        escape = -1
        for target, characters in grouped(row, sets).items():
            if target == dfa.states:
                continue
            positions.edge(own[source], charset.intersect(characters, RAW), own[target])
            hidden = _escaped(characters)
            if hidden:
                if escape < 0:
                    escape = positions.state()
                    positions.edge(own[source], charset.chars("\\"), escape)
                for form in hidden:
                    positions.free[escape].append(positions.before(form, own[target]))
    begin = positions.state()
    positions.edge(begin, charset.chars('"'), own[dfa.start])
    return Embedded(positions.automaton(begin, final))


def _escaped(characters: CharSet) -> list[Node]:
    """Characters of a set that may be escaped, without the backslash."""
    found: list[Node] = []
    letters = "".join(SHORT[c] for c in SHORT if charset.intersect(characters, charset.chars(c)))
    if letters:
        found.append(nodes.one_of(letters))
    low = charset.intersect(characters, charset.charset([(0, 31)]))
    codes = [code for first, last in low for code in range(first, last + 1)]
    for half in "01":
        digits = "".join(f"{code:02x}"[1] for code in codes if f"{code:02x}"[0] == half)
        if digits:
            found.append(concat(text(f"u00{half}"), nodes.one_of(digits + digits.upper())))
    return found
