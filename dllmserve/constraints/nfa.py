"""From a tree to an automaton over characters: positions, then sets of positions."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dllmserve.constraints import charset, limits
from dllmserve.constraints.alphabet import Alphabet
from dllmserve.constraints.charset import CharSet
from dllmserve.constraints.dfa import Dfa, minimised
from dllmserve.constraints.nodes import (
    EMPTY,
    Chars,
    Concat,
    Either,
    Embedded,
    Members,
    Node,
    Repeat,
)


@dataclass
class Positions:
    """A nondeterministic automaton.

    Attributes:
        sets: the sets of characters that edges are labelled with.
        free: for each state, states that it is at the same time.
        edges: for each state, pairs of the number of a set, and the next state.
    """

    sets: dict[CharSet, int] = field(default_factory=dict)
    free: list[list[int]] = field(default_factory=list)
    edges: list[list[tuple[int, int]]] = field(default_factory=list)
    _entries: dict[tuple[Node, int], int] = field(default_factory=dict)
    _steps: int = 0

    def automaton(self, start: int, final: int) -> Dfa:
        """The smallest automaton of the texts that lead from one state to another."""
        return minimised(_Subsets(self, final).determinise(start))

    def state(self, *free: int) -> int:
        """A new state, which is at the same time the given ones."""
        limits.check(len(self.free), limits.MAX_POSITIONS, "the number of its positions")
        self.free.append(list(free))
        self.edges.append([])
        return len(self.free) - 1

    def edge(self, source: int, characters: CharSet, target: int) -> None:
        """A way from state to state by any of some characters."""
        if characters:
            number = self.sets.setdefault(characters, len(self.sets))
            self.edges[source].append((number, target))

    def before(self, node: Node, out: int) -> int:
        """The state from which the node's texts, and they alone, lead to state ``out``."""
        # a node that stands in several places before the same state is there once
        found = self._entries.get((node, out))
        if found is None:
            found = self._entries[node, out] = self._before(node, out)
        return found

    def _before(self, node: Node, out: int) -> int:
        if isinstance(node, Chars):
            entry = self.state()
            self.edge(entry, node.set, out)
            return entry
        if isinstance(node, Concat):
            for part in reversed(node.parts):
                out = self.before(part, out)
            return out
        if isinstance(node, Either):
            return self.state(*[self.before(part, out) for part in node.parts])
        if isinstance(node, Repeat):
            return self._repeated(node, out)
        if isinstance(node, Members):
            return self._members(node, out)
        if isinstance(node, Embedded):
            return self._embedded(node.dfa, out)
        raise TypeError(f"no such node: {node!r}")

    def _repeated(self, node: Repeat, out: int) -> int:
        """A chain of parts from the last one to the first.

        ``more`` is where another part may follow, and ``after`` is where one just ended.
        """
        separator = node.separator or EMPTY
        if node.high == 0:
            return out
        if node.high is None:
            after = self.state(out)
            first = self.before(node.part, after)
            self.free[after].append(self.before(separator, first))
            after = first
            copies = 1
        else:
            after = out
            for _ in range(node.high - max(node.low, 1)):
                after = self.state(out, self.before(separator, self.before(node.part, after)))
            after = self.before(node.part, after)
            copies = max(node.low, 1)
        # the parts that must be there, and are not yet
        missing = node.low - 1 if node.high is None else copies - 1
        for _ in range(missing):
            self._steps += 1
            limits.check(self._steps, limits.MAX_POSITIONS, "the number of its positions")
            after = self.before(node.part, self.before(separator, after))
        return after if node.low else self.state(after, out)

    def _members(self, node: Members, out: int) -> int:
        """From the last part to the first, by how many stand before: exactly, if that counts."""
        count, needed = len(node.parts), sum(must for _, must in node.parts)
        most = count if node.high is None else node.high
        counts = node.low > max(needed, 0) or most < count
        rows = count + 1 if counts else 2
        after = [out if not counts or node.low <= n <= most else self.state() for n in range(rows)]
        for part, must in reversed(node.parts):
            before = []
            for written in range(rows):
                entry = self.before(part, after[min(written + 1, rows - 1)])
                if written:
                    entry = self.before(node.separator, entry)
                before.append(entry if must else self.state(entry, after[written]))
            after = before
        return after[0]

    def _embedded(self, dfa: Dfa, out: int) -> int:
        own = [self.state() for _ in range(dfa.states)]
        sets = dfa.alphabet.sets()
        for source, row in enumerate(dfa.delta[: dfa.states].tolist()):
            if dfa.accepting[source]:
                self.free[own[source]].append(out)
            for target, characters in grouped(row, sets).items():
                if target != dfa.states:
                    self.edge(own[source], characters, own[target])
        return self.state() if dfa.empty else own[dfa.start]


def grouped(row: list[int], sets: list[CharSet]) -> dict[int, CharSet]:
    """The characters that lead to each of the next states of a row."""
    found: dict[int, list[CharSet]] = {}
    for target, characters in zip(row, sets, strict=True):
        found.setdefault(target, []).append(characters)
    return {target: charset.union(*parts) for target, parts in found.items()}


def automaton(node: Node) -> Dfa:
    """The smallest automaton over characters that accepts a node's texts.

    Raises:
        InvalidParameterError: it, or the way to it, is over a limit.
    """
    positions = Positions()
    final = positions.state()
    return positions.automaton(positions.before(node, final), final)


class _Subsets:
    """The states of a deterministic automaton are sets of positions."""

    def __init__(self, positions: Positions, final: int) -> None:
        self._positions, self._final = positions, final
        self._alphabet, self._symbols = Alphabet.of(list(positions.sets))
        self._closures: dict[int, tuple[int, ...]] = {}
        self._partitions: dict[tuple[int, ...], list[tuple[NDArray[np.intp], tuple[int, ...]]]] = {}
        self._ids: dict[tuple[int, ...], int] = {}
        self._todo: list[tuple[int, ...]] = []
        self._work = 0

    def determinise(self, start: int) -> Dfa:
        """All sets that can be reached."""
        self._id(self._closure(start))
        kinds = self._alphabet.size
        rows: list[NDArray[np.int32]] = []
        while len(rows) < len(self._todo):
            row = np.full(kinds, -1, np.int32)
            for symbols, targets in self._steps(self._todo[len(rows)]):
                row[symbols] = self._id(targets)
            rows.append(row)
            limits.check(len(self._todo), 4 * limits.MAX_STATES, "the number of its states")
            limits.check(len(rows) * kinds, limits.MAX_TABLE, "states times kinds of characters")
        rows.append(np.full(kinds, -1, np.int32))
        delta = np.stack(rows)
        delta[delta < 0] = len(rows) - 1
        accepting = np.array([self._final in key for key in self._todo] + [False])
        return Dfa(self._alphabet, delta, accepting, 0)

    def _id(self, key: tuple[int, ...]) -> int:
        found = self._ids.get(key)
        if found is None:
            found = self._ids[key] = len(self._todo)
            self._todo.append(key)
        return found

    def _steps(self, key: tuple[int, ...]) -> list[tuple[NDArray[np.intp], tuple[int, ...]]]:
        """Kinds of characters, and the set of positions that they lead to."""
        edges = [edge for state in key for edge in self._positions.edges[state]]
        self._spend(len(edges))
        signature = tuple(number for number, _ in edges)
        parts = self._partitions.get(signature)
        if parts is None:
            parts = self._partitions[signature] = self._partition(signature)
        found = []
        for symbols, chosen in parts:
            if len(chosen) == 1:
                found.append((symbols, self._closure(edges[chosen[0]][1])))
                continue
            merged: set[int] = set()
            for i in chosen:
                closure = self._closure(edges[i][1])
                self._spend(len(closure))
                merged.update(closure)
            found.append((symbols, tuple(sorted(merged))))
        return found

    def _partition(
        self, signature: tuple[int, ...]
    ) -> list[tuple[NDArray[np.intp], tuple[int, ...]]]:
        """Kinds of characters that are in the same of some sets, and in which of them."""
        found: dict[tuple[int, ...], list[int]] = {}
        # the product of both is what arrays do, which is much faster than a step
        self._spend(len(signature) + 4 * self._alphabet.size)
        if not signature:
            return []
        table = self._symbols[list(signature)]
        for symbol, column in enumerate(table.T):
            chosen = tuple(np.flatnonzero(column).tolist())
            if chosen:
                found.setdefault(chosen, []).append(symbol)
        return [(np.array(symbols, np.intp), chosen) for chosen, symbols in found.items()]

    def _closure(self, state: int) -> tuple[int, ...]:
        """What a state is at the same time, as far as it has edges or is the end."""
        found = self._closures.get(state)
        if found is None:
            seen, todo = {state}, [state]
            while todo:
                for other in self._positions.free[todo.pop()]:
                    if other not in seen:
                        seen.add(other)
                        todo.append(other)
            self._spend(len(seen))
            edges = self._positions.edges
            found = tuple(sorted(s for s in seen if edges[s] or s == self._final))
            self._closures[state] = found
        return found

    def _spend(self, amount: int) -> None:
        self._work += amount
        limits.check(self._work, limits.MAX_STEPS, "the work of finding its states")
