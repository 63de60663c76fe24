"""Constraints without classes, maps or minimal automata: plain loops, slow and obvious."""

from __future__ import annotations

import codecs
import datetime
import ipaddress
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def allowed_sets(grammar: Any, row: Sequence[int], mask: int) -> tuple[bool, dict[int, list[int]]]:
    """Whether a canvas can be filled, and the ids that every masked slot may hold.

    ``grammar`` is an automaton over tokens: ``delta``, ``class_of``, ``start``, ``accepting``,
    ``states`` and ``classes``. All states are swept, forward and backward.
    """
    dead = grammar.states
    steps = [{int(s) for s in row} - {dead} for row in grammar.delta]

    def after(state: int, id: int) -> set[int]:
        if id == mask:
            return steps[state]
        return {int(grammar.delta[state, grammar.class_of[id]])} - {dead}

    forward = [{grammar.start}]
    for id in row:
        forward.append({new for state in forward[-1] for new in after(state, id)})
    ends = {state for state in range(dead) if grammar.accepting[state]}
    backward = [ends]
    for id in reversed(row):
        backward.append({s for s in range(dead) if after(s, id) & backward[-1]})
    backward.reverse()
    feasible = grammar.start in backward[0]
    found: dict[int, list[int]] = {}
    for slot, id in enumerate(row):
        if id == mask:
            classes = {
                kind
                for kind in range(grammar.classes)
                for state in forward[slot]
                if feasible and int(grammar.delta[state, kind]) in backward[slot + 1]
            }
            found[slot] = [i for i, kind in enumerate(grammar.class_of.tolist()) if kind in classes]
    return feasible, found


class Fillings:
    """Every filling of a canvas, by trying every token.

    A filling is good if no slot holds the mask or an id without bytes, if behind the first end id
    stand end ids alone, and if the bytes before it are UTF-8 of a text that ``good`` takes.

    Args:
        pieces: bytes of every id, None for those that are never allowed.
        good: whether a whole text is right.
        ends: ids that end a text.
        first: bytes of every id at the beginning of a text, if others.
    """

    def __init__(
        self,
        pieces: Sequence[bytes | None],
        good: Callable[[str], bool],
        ends: Sequence[int] = (),
        first: Sequence[bytes | None] | None = None,
    ) -> None:
        self._pieces, self._ends = pieces, set(ends)
        self._first = pieces if first is None else first
        self._text_ids = [i for i, p in enumerate(pieces) if p and i not in self._ends]
        self._good = good

    def right(self, data: bytes) -> bool:
        """Whether these bytes are a right text."""
        try:
            return self._good(data.decode())
        except UnicodeDecodeError:
            return False

    def allowed(self, row: Sequence[int], mask: int) -> tuple[bool, dict[int, list[int]]]:
        """As :func:`allowed_sets`."""
        good = list(self._fill(row, mask, 0, b"", False, ()))
        found = {
            slot: sorted({filling[slot] for filling in good})
            for slot, id in enumerate(row)
            if id == mask
        }
        return bool(good), found

    def _fill(
        self,
        row: Sequence[int],
        mask: int,
        slot: int,
        data: bytes,
        ended: bool,
        written: tuple[int, ...],
    ) -> Iterator[tuple[int, ...]]:
        if slot == len(row):
            if ended or self.right(data):
                yield written
            return
        choices = [*self._text_ids, *self._ends] if row[slot] == mask else [row[slot]]
        for id in choices:
            if id in self._ends:
                if ended or self.right(data):
                    yield from self._fill(row, mask, slot + 1, data, True, (*written, id))
            elif not ended and id in self._text_ids:
                piece = (self._first if slot == 0 else self._pieces)[id]
                more = data + (piece or b"")
                if _begins_utf8(more):
                    yield from self._fill(row, mask, slot + 1, more, False, (*written, id))


def _begins_utf8(data: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")("strict").decode(data)
    except UnicodeDecodeError:
        return False
    return True


def read_json(text: str) -> Any:
    """A text as JSON, strictly: no key twice, no NaN. Raises ValueError."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(found)) != len(found):
            raise ValueError("a key comes twice")
        return dict(found)

    def constant(name: str) -> None:
        raise ValueError(name)

    return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)


def both_spacings(value: Any) -> list[str]:
    """A value as JSON with spaces between its parts, and without."""
    return [json.dumps(value, ensure_ascii=False, separators=s) for s in ((", ", ": "), (",", ":"))]


def _date(value: str) -> bool:
    return re.fullmatch(r"\d{4}-\d\d-\d\d", value, re.A) is not None and bool(
        datetime.date.fromisoformat(value)
    )


_TIME = r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?([Zz]|[+-]([01]\d|2[0-3]):[0-5]\d)"
FORMAT_CHECKS: dict[str, Callable[[str], bool]] = {
    "date": _date,
    "time": lambda v: re.fullmatch(_TIME, v, re.A) is not None,
    "date-time": lambda v: _date(v[:10]) and re.fullmatch("[Tt]" + _TIME, v[10:], re.A) is not None,
    "uuid": lambda v: (
        re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", v) is not None
    ),
    "email": lambda v: re.fullmatch(r"[^@\s]+@[^@\s.]+(\.[^@\s.]+)+", v) is not None,
    "ipv4": lambda v: bool(ipaddress.IPv4Address(v)),
    "ipv6": lambda v: ipaddress.IPv6Address(v) is not None,
    "hostname": lambda v: all(
        re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", label)
        for label in v.split(".")
    ),
}
