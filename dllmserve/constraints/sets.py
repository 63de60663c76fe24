"""RegionSets: which classes of tokens each slot of a partly filled canvas may hold.

A boundary is a place between two slots. ``reached`` holds the states that the slots before a
boundary can lead to, ``leads`` those from which the slots behind it can end well. A class is
allowed at a slot if some transition by it goes from the one to the other::

    slots        0     1     2
    boundaries  0     1     2     3
    reached     start ------------->
    leads         <------------ accepting

Sets depend on what stands in the slots alone. They are kept between calls, and worked out anew
only where that has changed what they depend on.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from dllmserve.constraints.grammar import TokenGrammar
from dllmserve.constraints.graph import edges_of

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

#: a slot that holds nothing yet
MASKED = -1
#: states up to which a matrix of states to states is kept: it is faster than a list of edges
_MATRIX = 256


def may_end_early(grammar: TokenGrammar) -> bool:
    """Whether a text that may end may end later as well: there are end ids."""
    after = grammar.delta[grammar.accepting]
    return bool(grammar.accepting[after].any(axis=1).all())


class Moves:
    """From a set of states to the next one and back, by any token.

    Args:
        grammar: the automaton; Q states and the dead one.
    """

    def __init__(self, grammar: TokenGrammar) -> None:
        self.grammar = grammar
        self._dead = len(grammar.delta) - 1

    @cached_property
    def edges(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[E] int64 each: a state, and a state that some token leads to from it; no pair twice."""
        source, target = edges_of(self.grammar.delta)
        pairs = np.unique(source.astype(np.int64) * (self._dead + 1) + target)
        return np.divmod(pairs, self._dead + 1)

    @cached_property
    def _matrix(self) -> Bools | None:
        """[Q + 1, Q + 1], whether some token leads from a state to another; None if too large."""
        if self._dead > _MATRIX:
            return None
        found = np.zeros((self._dead + 1, self._dead + 1), dtype=np.bool_)
        found[self.edges] = True
        return found

    def after(self, states: Bools, token_class: int) -> Bools:
        """States [Q + 1] bool that a class, or any if it is MASKED, leads to from some."""
        if token_class == MASKED and self._matrix is not None:
            return np.asarray(self._matrix[states].any(axis=0))
        found = np.zeros_like(states)
        if token_class == MASKED:
            source, target = self.edges
            found[target[states[source]]] = True
        else:
            found[self.grammar.delta[states, token_class]] = True
            found[self._dead] = False
        return found

    def before(self, states: Bools, token_class: int) -> Bools:
        """States [Q + 1] bool from which a class, or any if it is MASKED, leads to some."""
        if token_class != MASKED:
            return states[self.grammar.delta[:, token_class]]
        if self._matrix is not None:
            return np.asarray(self._matrix[:, states].any(axis=1))
        found = np.zeros_like(states)
        source, target = self.edges
        found[source[states[target]]] = True
        return found


@lru_cache(maxsize=16)
def moves_of(grammar: TokenGrammar) -> Moves:
    """The moves of a grammar, which take a while to find; the same for all its requests."""
    return Moves(grammar)


class RegionSets:
    """The sets of one region of a canvas: n slots whose text has to match one grammar.

    Args:
        moves: of the grammar; they may be shared.
        length: n.

    Example:
        >>> sets = RegionSets(Moves(grammar), 3)  # doctest: +SKIP
        >>> sets.fill(1, token_class=4)  # doctest: +SKIP
        >>> sets.allowed(0)  # doctest: +SKIP
    """

    def __init__(self, moves: Moves, length: int) -> None:
        grammar = moves.grammar
        self.grammar, self._moves = grammar, moves
        self.classes: Ints = np.full(length, MASKED, dtype=np.int64)
        shape = (length + 1, len(grammar.delta))
        self._reached = np.zeros(shape, dtype=np.bool_)
        self._leads = np.zeros(shape, dtype=np.bool_)
        self._reached[0, grammar.start] = True
        self._leads[length] = grammar.accepting
        for i in range(length):
            self._reached[i + 1] = moves.after(self._reached[i], MASKED)
        for i in reversed(range(length)):
            self._leads[i] = moves.before(self._leads[i + 1], MASKED)

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def feasible(self) -> bool:
        """Whether the slots can be filled so that the text matches."""
        return bool(self._leads[0, self.grammar.start])

    def update(self, classes: Ints) -> None:
        """Take what the slots hold: [n] int64 classes, MASKED where nothing."""
        changed = np.flatnonzero(classes != self.classes)
        if len(changed):
            self.classes[changed] = classes[changed]
            self._sweep(int(changed[0]), int(changed[-1]))

    def fill(self, slot: int, token_class: int) -> None:
        """Write a class to a slot, or take it back (MASKED)."""
        if self.classes[slot] != token_class:
            self.classes[slot] = token_class
            self._sweep(slot, slot)

    def allowed(self, slot: int) -> Bools:
        """[C] bool, classes that the slot may hold, given all other slots."""
        states = np.flatnonzero(self._reached[slot])
        found: Bools = self._leads[slot + 1][self.grammar.delta[states]].any(axis=0)
        return found

    def allows(self, slot: int, token_class: int) -> bool:
        """Whether the slot may hold a class."""
        targets = self.grammar.delta[self._reached[slot], token_class]
        return bool(self._leads[slot + 1][targets].any())

    def only(self, slot: int) -> int:
        """The id that the slot has to hold; -1 if there are several.

        Behind the end of a text any end id says the same, so it is the lowest.
        """
        classes = np.flatnonzero(self.allowed(slot))
        if len(classes) != 1:
            return -1
        reached = self._reached[slot]
        over = self.grammar.over
        ended = over >= 0 and reached[over] and reached.sum() == 1
        alone = ended or self.grammar.size[classes[0]] == 1
        return int(self.grammar.first[classes[0]]) if alone else -1

    def forced(self, slots: Iterable[int]) -> dict[int, int]:
        """Of some slots, those that are not filled and have to hold one id: slot to id."""
        found = {i: self.only(i) for i in slots if self.classes[i] == MASKED}
        return {i: token for i, token in found.items() if token >= 0}

    def _sweep(self, first: int, last: int) -> None:
        """Renew the sets after slots ``first .. last`` have changed."""
        for i in range(first, len(self)):
            found = self._moves.after(self._reached[i], int(self.classes[i]))
            if i >= last and (found == self._reached[i + 1]).all():
                break
            self._reached[i + 1] = found
        for i in reversed(range(last + 1)):
            found = self._moves.before(self._leads[i + 1], int(self.classes[i]))
            if i <= first and (found == self._leads[i]).all():
                break
            self._leads[i] = found
