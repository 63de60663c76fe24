"""Deterministic automata over characters: the smallest one, and what two of them have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from secrets import randbits

import numpy as np
from numpy.typing import NDArray

from dllmserve.constraints import limits
from dllmserve.constraints.alphabet import Alphabet
from dllmserve.constraints.graph import NEVER, edges_of, most_steps, steps_to


@dataclass(frozen=True, eq=False)
class Dfa:
    """An automaton over characters.

    Attributes:
        alphabet: its symbols.
        delta: [states + 1, symbols] next state; the last state is dead, and stays so.
        accepting: [states + 1] a text may end here.
        start: where a text begins.
    """

    alphabet: Alphabet
    delta: NDArray[np.int32]
    accepting: NDArray[np.bool_]
    start: int

    @property
    def states(self) -> int:
        """Number of states, without the dead one, whose index it is."""
        return len(self.delta) - 1

    @property
    def empty(self) -> bool:
        """Whether it accepts nothing, if it is the smallest one."""
        return self.start == self.states

    def accepts(self, text: str) -> bool:
        """Whether it accepts a text."""
        state = self.start
        for c in text:
            place = int(np.searchsorted(self.alphabet.starts, ord(c), side="right")) - 1
            state = int(self.delta[state, self.alphabet.symbols[place]])
        return bool(self.accepting[state])


def salts(*shape: int) -> NDArray[np.uint64]:
    """Random numbers to hash rows with; nobody can make rows that collide without knowing them."""
    return np.random.default_rng(randbits(128)).integers(
        0, 1 << 64, shape, dtype=np.uint64, endpoint=False
    )


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of a number depends on all of them."""
    values = (values ^ (values >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return np.asarray(values ^ (values >> np.uint64(29)), np.uint64)


def first_of_each(
    keys: NDArray[np.uint64],
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Where each key stands first, in the order of these places, and the number of every key."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty(len(order), np.intp)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse]


def classes_of_states(delta: NDArray[np.int32], accepting: NDArray[np.bool_]) -> NDArray[np.intp]:
    """The number of every state's class: states from which the same texts lead to acceptance.

    Moore's refinement on hashes, which begins with the lengths of the shortest and the longest text
    that each state accepts: without them, as many rounds would be needed as texts are long. The
    result is compared with the table itself, so a collision can only cost time.

    Raises:
        InvalidParameterError: it takes too many rounds.
    """
    weights = salts(delta.shape[1])
    source, target = edges_of(delta)
    least = steps_to(source, target, accepting)
    alive = (least[source] < NEVER) & (least[target] < NEVER)
    most = most_steps(source[alive], target[alive], len(delta))
    most[least == NEVER] = NEVER
    end = keys = mixed(np.stack([least, most], axis=1).astype(np.uint64) @ salts(2))
    rounds, work = 4, 0
    while True:
        for _ in range(rounds):
            keys = mixed(keys[delta] @ weights + end)
        work += rounds * delta.size
        limits.check(work, limits.MAX_WORK, "the work of telling its states apart")
        first, classes = first_of_each(keys)
        moves = classes[delta]
        if np.array_equal(moves, moves[first][classes]) and np.array_equal(
            accepting, accepting[first][classes]
        ):
            return classes
        rounds = min(2 * rounds, 256)


def minimised(dfa: Dfa) -> Dfa:
    """The smallest automaton of the same language, with states in the order of a walk over them.

    Raises:
        InvalidParameterError: it has too many states.
    """
    classes = classes_of_states(dfa.delta, dfa.accepting)
    count = int(classes.max()) + 1
    first = np.full(count, -1, np.intp)
    first[classes[::-1]] = np.arange(len(classes))[::-1]
    delta = classes[dfa.delta[first]]
    dead, start = int(classes[-1]), int(classes[dfa.start])
    order = _reached(delta, start, dead)
    limits.check(len(order), limits.MAX_STATES, "the number of its states")
    rank = np.full(count, len(order), np.int32)
    rank[order] = np.arange(len(order))
    rows = np.append(order, dead)
    small = rank[delta[rows]]
    accepting = dfa.accepting[first][rows]
    # symbols that lead the same way from everywhere become one, apart from that of the surrogates
    keys = salts(len(rows)) @ small.astype(np.uint64)
    keys[0] = np.uint64(0) if 0 not in keys[1:] else _unused(keys)
    symbols, renamed = first_of_each(keys)
    alphabet = dfa.alphabet.coarser(renamed.astype(np.int32), len(symbols))
    return Dfa(alphabet, small[:, symbols], accepting, int(rank[start]))


def _unused(keys: NDArray[np.uint64]) -> np.uint64:
    return np.uint64(next(n for n in range(len(keys) + 1) if n not in keys))


def _reached(delta: NDArray[np.intp], start: int, dead: int) -> NDArray[np.intp]:
    """States that can be reached, in the order of a walk in breadth; without the dead one."""
    seen = np.zeros(len(delta), np.bool_)
    seen[[start, dead]] = True
    levels = [np.array([start] if start != dead else [], np.intp)]
    while len(levels[-1]):
        targets = delta[levels[-1]].ravel()
        targets = targets[~seen[targets]]
        _, first = np.unique(targets, return_index=True)
        levels.append(targets[np.sort(first)])
        seen[levels[-1]] = True
    return np.concatenate(levels)


def complement(dfa: Dfa) -> Dfa:
    """The smallest automaton of all other texts."""
    states = dfa.states
    delta = np.concatenate([dfa.delta, dfa.delta[-1:] + 1])
    delta[states] = states  # was dead: accepts all from now on
    delta[:, 0] = states + 1
    delta[-1] = states + 1
    accepting = np.append(~dfa.accepting, False)
    return minimised(Dfa(dfa.alphabet, delta, accepting, dfa.start))


def intersection(a: Dfa, b: Dfa) -> Dfa:
    """The smallest automaton of the texts that both accept."""
    return _product(a, b, np.logical_and)


def _product(a: Dfa, b: Dfa, both: Callable[..., NDArray[np.bool_]]) -> Dfa:
    """Pairs of states, as far as they can be reached; a pair with a dead state is dead."""
    alphabet, own, theirs = a.alphabet.refined(b.alphabet)
    first, second = a.delta[:, own].astype(np.int64), b.delta[:, theirs]
    width = len(second)
    keys = first_pair = np.array([a.start * width + b.start], np.int64)
    seen = first_pair
    rows: list[NDArray[np.int64]] = []
    order: list[NDArray[np.int64]] = [first_pair]
    total = 0
    while len(keys):
        left, right = np.divmod(keys, width)
        moves = first[left] * width + second[right]
        dead = (first[left] == a.states) | (second[right] == b.states)
        moves[dead] = -1
        rows.append(moves)
        total += moves.size
        limits.check(total, limits.MAX_TABLE, "states times kinds of characters")
        new = np.setdiff1d(moves[~dead], seen)
        seen = np.union1d(seen, new)
        order.append(new)
        keys = new
    pairs, table = np.concatenate(order), np.concatenate(rows)
    sorter = np.argsort(pairs)
    places = np.searchsorted(pairs, table, sorter=sorter)
    delta = np.where(table < 0, len(pairs), sorter[np.minimum(places, len(pairs) - 1)])
    delta = np.concatenate([delta, np.full((1, alphabet.size), len(pairs))]).astype(np.int32)
    left, right = np.divmod(pairs, width)
    accepting = np.append(both(a.accepting[left], b.accepting[right]), False)
    return minimised(Dfa(alphabet, delta, accepting, 0))


def all_of(automata: list[Dfa]) -> Dfa:
    """The smallest automaton of the texts that all of them accept."""
    return functools.reduce(intersection, automata)
