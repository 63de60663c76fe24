"""Distances in automata: how far it is to an end, at least and at most."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: the distance of what cannot be reached
NEVER = 1 << 30


def edges_of(delta: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Pairs (source, target) of a table's states, without those that lead to the dead state."""
    source, column = np.nonzero(delta != len(delta) - 1)
    return source.astype(np.int32), delta[source, column]


def steps_to(
    source: NDArray[np.int32], target: NDArray[np.int32], ends: NDArray[np.bool_]
) -> NDArray[np.int32]:
    """Fewest edges from every state to an end, or :data:`NEVER`.

    Args:
        source, target: [E] edges; they may repeat.
        ends: [N] which states are ends.
    """
    count = len(ends)
    before, starts = _grouped(target, source, count)
    least = np.full(count, NEVER, np.int32)
    least[ends] = 0
    level, far = np.flatnonzero(ends), 0
    while len(level):
        far += 1
        found = np.unique(_rows(before, starts, level))
        level = found[least[found] == NEVER]
        least[level] = far
    return least


def most_steps(
    source: NDArray[np.int32], target: NDArray[np.int32], count: int
) -> NDArray[np.int32]:
    """Most edges that can be taken from every state; :data:`NEVER` if there is no bound.

    Args:
        source, target: [E] edges; they may repeat.
        count: number of states.
    """
    before, starts = _grouped(target, source, count)
    left = np.bincount(before, minlength=count)
    most = np.full(count, NEVER, np.int32)
    level, far = np.flatnonzero(left == 0), 0
    while len(level):
        most[level] = far
        far += 1
        found, times = np.unique(_rows(before, starts, level), return_counts=True)
        left[found] -= times
        level = found[left[found] == 0]
    return most


def _grouped(
    by: NDArray[np.int32], values: NDArray[np.int32], count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Values by a number, each once, and where those of each number begin."""
    pairs = np.unique(by.astype(np.int64) * count + values)
    keys, found = np.divmod(pairs, count)
    return found, np.searchsorted(keys, np.arange(count + 1))


def _rows(
    values: NDArray[np.int64], starts: NDArray[np.int64], rows: NDArray[np.intp]
) -> NDArray[np.int64]:
    """The values of some numbers."""
    lengths = starts[rows + 1] - starts[rows]
    shift = np.repeat(starts[rows] - np.cumsum(lengths) + lengths, lengths)
    return values[shift + np.arange(len(shift))]
