"""From an automaton over bytes to one over the tokens of a vocabulary.

A text of bytes acts on the automaton as a *map*: from states to states. Tokens with equal maps are
one class. Maps of all beginnings of tokens are made level by level, from one byte on; each one is
kept once, and what it becomes by one more kind of byte is found once. A map is kept as the pairs of
states that are alive before and behind it, which are few for most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dllmserve.constraints import limits
from dllmserve.constraints.dfa import first_of_each, mixed, salts
from dllmserve.constraints.utf8 import ByteDfa
from dllmserve.constraints.vocabulary import Vocabulary

#: pairs of states that are made at a time: bounds the memory of temporary arrays, and how long
#: other threads wait
_BATCH = 1 << 20


@dataclass(frozen=True, eq=False)
class Moves:
    """Maps, as pairs of states.

    Attributes:
        source, target: [E] states before and behind, sorted by map, then by source.
        starts: [maps + 1] where each map's pairs begin.
    """

    source: NDArray[np.int32]
    target: NDArray[np.int32]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def numbers(self) -> NDArray[np.int64]:
        """[E] the map of every pair."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def chosen(self, maps: NDArray[np.intp]) -> Moves:
        """Some of the maps, in that order."""
        places, starts = _spans(self.starts, maps)
        return Moves(self.source[places], self.target[places], starts)


def _spans(
    starts: NDArray[np.int64], rows: NDArray[np.intp]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of some rows of a table whose rows differ in length, and where each then begins."""
    lengths = starts[rows + 1] - starts[rows]
    found = np.concatenate([[0], np.cumsum(lengths)])
    shift = np.repeat(starts[rows] - found[:-1], lengths)
    return shift + np.arange(found[-1]), found


class _Maps:
    """All maps that were met, numbered as they came. 0 is the map that leads nowhere."""

    def __init__(self, automaton: ByteDfa) -> None:
        self._dfa = automaton
        self._kinds = automaton.delta.shape[1]
        states = np.arange(automaton.states, dtype=np.int32)
        self._salts = salts(2, automaton.states)
        self._known: dict[int, int] = {0: 0}
        self._source = [np.zeros(0, np.int32)]
        self._target = [np.zeros(0, np.int32)]
        self._lengths = [np.zeros(1, np.int64)]
        self._size = 1
        self._entries = 0
        self._work = 0
        #: [maps, kinds] what each map becomes by one more byte; -1 is not known yet
        self._next = np.full((64, self._kinds), -1, np.int32)
        self._next[0] = 0
        self._moves: Moves | None = None
        self.identity = int(self._add(Moves(states, states, np.array([0, len(states)])))[0])

    def moves(self) -> Moves:
        """All of them."""
        if self._moves is None:
            lengths = np.concatenate(self._lengths)
            starts = np.concatenate([[0], np.cumsum(lengths)])
            source, target = np.concatenate(self._source), np.concatenate(self._target)
            self._source, self._target, self._lengths = [source], [target], [lengths]
            self._moves = Moves(source, target, starts)
        return self._moves

    def after(self, maps: NDArray[np.int32], kinds: NDArray[np.int32]) -> NDArray[np.int32]:
        """What maps become by one more byte each."""
        keys = maps.astype(np.int64) * self._kinds + kinds
        open_keys = np.unique(keys[self._next.ravel()[keys] < 0])
        for part in self._parts(open_keys):
            old, kind = np.divmod(part, self._kinds)
            found = self._add(self._extended(old, kind))
            self._next[old, kind] = found
        return np.asarray(self._next.ravel()[keys], np.int32)

    def _parts(self, keys: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Keys in batches of bounded work."""
        if not len(keys):
            return []
        lengths = np.diff(self.moves().starts)[keys // self._kinds]
        self._work += int(lengths.sum())
        limits.check(self._work, limits.MAX_PAIRS, "the work of its tokens")
        cuts = np.flatnonzero(np.diff(np.cumsum(lengths) // _BATCH)) + 1
        return np.split(keys, cuts)

    def _extended(self, old: NDArray[np.int64], kind: NDArray[np.int64]) -> Moves:
        moves = self.moves()
        places, starts = _spans(moves.starts, old)
        kinds = np.repeat(kind, np.diff(starts))
        target = self._dfa.delta[moves.target[places], kinds]
        alive = target != self._dfa.states
        counts = np.concatenate([[0], np.cumsum(alive)])[starts]
        return Moves(moves.source[places[alive]], target[alive], counts)

    def _add(self, moves: Moves) -> NDArray[np.int32]:
        """Their numbers; those that are new get the next ones."""
        keys = hashes(moves, self._salts)
        first, numbers = first_of_each(keys)
        names = np.empty(len(first), np.int32)
        new: list[int] = []
        for i, key in enumerate(keys[first].tolist()):
            found = self._known.get(key)
            if found is None:
                found = self._known[key] = self._size + len(new)
                new.append(i)
            names[i] = found
        if new:
            self._keep(moves.chosen(first[new]))
        return names[numbers]

    def _keep(self, moves: Moves) -> None:
        self._entries += len(moves.source)
        limits.check(self._entries, limits.MAX_MOVES, "the size of its tokens' maps")
        self._source.append(moves.source)
        self._target.append(moves.target)
        self._lengths.append(np.diff(moves.starts))
        self._size += len(moves)
        self._moves = None
        room = len(self._next)
        if self._size > room:
            more = np.full((max(room, self._size - room), self._kinds), -1, np.int32)
            self._next = np.concatenate([self._next, more])


def hashes(moves: Moves, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """[maps] a number of every map, 0 for one without pairs; ``numbers`` are [2, states]."""
    pairs = mixed(numbers[0, moves.source] ^ (numbers[1, moves.target] * np.uint64(3)))
    # a sum over each map, where reduceat cannot be used as maps may be empty
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(pairs, dtype=np.uint64)])
    return np.asarray(sums[moves.starts[1:]] - sums[moves.starts[:-1]], np.uint64)


def token_maps(automaton: ByteDfa, vocabulary: Vocabulary) -> tuple[Moves, NDArray[np.int32]]:
    """What every token does.

    Returns:
        The maps, of which 0 is that of tokens that fit nowhere, and [ids] the map of every id.

    Raises:
        InvalidParameterError: there are too many.
    """
    maps = _Maps(automaton)
    of_id = np.zeros(len(vocabulary), np.int32)
    nodes = np.array([maps.identity], np.int32)
    for level in vocabulary.levels:
        before = nodes[level.parent]
        nodes = np.zeros(len(before), np.int32)
        alive = np.flatnonzero(before)
        if not len(alive):
            break
        nodes[alive] = maps.after(before[alive], automaton.kinds[level.byte[alive]])
        of_id[level.ids] = nodes[level.nodes]
    used, numbers = np.unique(np.append(of_id, 0), return_inverse=True)
    return maps.moves().chosen(used), numbers[:-1].astype(np.int32)


def first_states(automaton: ByteDfa, vocabulary: Vocabulary) -> NDArray[np.int32]:
    """[ids] the state after each id at the beginning of a text; -1 if no text begins with it."""
    dead = automaton.states
    first = vocabulary.opening
    found = np.full(len(vocabulary), -1, np.int32)
    found[[id for id, piece in enumerate(vocabulary.first or ()) if piece == b""]] = automaton.start
    nodes = np.array([automaton.start], np.int32)
    for level in first.levels:
        nodes = automaton.delta[nodes[level.parent], automaton.kinds[level.byte]]
        states = nodes[level.nodes]
        found[level.ids] = np.where(states == dead, -1, states)
    return found
