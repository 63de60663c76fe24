"""From an automaton over characters to one over the bytes of their UTF-8.

Within a character of several bytes the automaton is in a state of its own. 64 characters share all
but their last byte, so a state and one *chunk* of 64 characters make such a state; two that lead on
in the same way are one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dllmserve.constraints import limits
from dllmserve.constraints.dfa import Dfa, first_of_each, mixed, salts


@dataclass(frozen=True, eq=False)
class ByteDfa:
    """An automaton over bytes.

    Attributes:
        kinds: [256] which bytes are told apart.
        delta: [states + 1, kinds] next state; the last one is dead.
        accepting: [states + 1].
        start: where a text begins.
    """

    kinds: NDArray[np.int32]
    delta: NDArray[np.int32]
    accepting: NDArray[np.bool_]
    start: int

    @property
    def states(self) -> int:
        """Number of states, without the dead one, whose index it is."""
        return len(self.delta) - 1


def to_bytes(dfa: Dfa) -> ByteDfa:
    """The smallest automaton over bytes, of the smallest one over characters.

    Raises:
        InvalidParameterError: it has too many states.
    """
    symbols = dfa.alphabet.of_code_points()
    rows = symbols.reshape(-1, 64).astype(np.intp)
    rows[:2] = 0  # ASCII is in no chunk: symbol 0 leads nowhere
    chunks, of_chunk = _unique_rows(rows)  # [U, 64] symbols
    none = len(chunks)  # a chunk without characters, for bytes that begin nothing
    planes = of_chunk.reshape(-1, 64).copy()  # [272, 64] chunks, by the bytes before
    planes[0, :32] = none  # E0 80: what fewer bytes can say
    leads = np.concatenate([np.full((1, 64), none), planes])
    groups, of_group = _unique_rows(leads)  # [G, 64] chunks
    of_group = of_group[1:]  # the first row was that of no plane
    fours = np.zeros((5, 64), np.intp)  # groups, by second byte; group 0 has no character
    fours.ravel()[16:272] = of_group[16:]
    delta = np.where(dfa.delta == dfa.states, -1, dfa.delta)
    inside = _Inside(dfa.states)
    last = inside.before(delta, np.vstack([chunks, np.zeros((1, 64), np.intp)]))
    third = inside.before(last, groups)
    second = inside.before(third, fours)
    table = inside.table()
    table[: dfa.states, :0x80] = delta[:-1, symbols[:0x80]]
    table[: dfa.states, 0xC2:0xE0] = last[:-1, of_chunk[2:32]]
    table[: dfa.states, 0xE0:0xF0] = third[:-1, of_group[:16]]
    table[: dfa.states, 0xF0:0xF5] = second[:-1]
    table[table < 0] = len(table) - 1
    first, kinds = first_of_each(salts(len(table)) @ table.astype(np.uint64))
    accepting = np.zeros(len(table), np.bool_)
    accepting[: dfa.states] = dfa.accepting[:-1]
    return ByteDfa(kinds.astype(np.int32), table[:, first], accepting, dfa.start)


def _unique_rows(table: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows in the order in which they come, and the number of every row."""
    keys = table.astype(np.uint64) @ salts(table.shape[1])
    first, numbers = first_of_each(keys)
    return table[first], numbers


class _Inside:
    """States within characters, numbered from the last byte to the first. -1 is dead here."""

    def __init__(self, states: int) -> None:
        self._outside = self._states = states
        self._rows: list[NDArray[np.int32]] = []

    def before(self, targets: NDArray[np.int32], ways: NDArray[np.intp]) -> NDArray[np.int32]:
        """States before one byte.

        Args:
            targets: [R, T] where each state's ways lead.
            ways: [N, 64] which of the T ways a continuation byte takes.

        Returns:
            [R, N] the state in which each of the R states is before these bytes.
        """
        limits.check(targets.size * len(ways), limits.MAX_WORK, "the work of splitting characters")
        weights = salts(64)
        sums = np.zeros((targets.shape[1], len(ways)), np.uint64)
        for column, taken in enumerate(ways):
            np.add.at(sums[:, column], taken, weights)
        keys = mixed((targets + 2).astype(np.uint64) * salts(1)) @ sums
        first, numbers = first_of_each(keys.ravel())
        row, way = np.divmod(first, len(ways))
        limits.check(len(first), 4 * limits.MAX_STATES, "the number of its states")
        made = targets[row[:, None], ways[way]]
        alive = (made >= 0).any(axis=1)
        names = np.full(len(first), -1, np.int32)
        names[alive] = self._states + np.arange(int(alive.sum()))
        self._states += int(alive.sum())
        limits.check(self._states, limits.MAX_STATES, "the number of its states")
        self._rows.append(made[alive].astype(np.int32))
        return names[numbers].reshape(len(targets), len(ways))

    def table(self) -> NDArray[np.int32]:
        """[states + 1, 256] with what the states within characters do."""
        table = np.full((self._states + 1, 256), -1, np.int32)
        table[self._outside : self._states, 0x80:0xC0] = np.concatenate(self._rows)
        return table
