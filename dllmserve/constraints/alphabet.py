"""Kinds of characters: those that an automaton never tells apart are one symbol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dllmserve.constraints.charset import ALL, LAST, CharSet, charset


@dataclass(frozen=True, eq=False)
class Alphabet:
    """All code points, in kinds. Symbol 0 holds the surrogates, which no text has.

    Attributes:
        starts: [n] first code point of each interval; the first one is 0.
        symbols: [n] symbol of the interval's code points.
        size: number of symbols.
    """

    starts: NDArray[np.int32]
    symbols: NDArray[np.int32]
    size: int

    @classmethod
    def of(cls, sets: Sequence[CharSet]) -> tuple[Alphabet, NDArray[np.bool_]]:
        """The coarsest alphabet that tells some sets of characters apart.

        Returns:
            The alphabet, and which symbols are in which set ([sets, symbols]).
        """
        every = [ALL, *sets]
        edges = {0, *(edge for one in every for low, high in one for edge in (low, high + 1))}
        starts = np.array(sorted(edge for edge in edges if edge <= LAST), np.int32)
        inside = np.zeros((len(every), len(starts)), np.bool_)
        for row, one in zip(inside, every, strict=True):
            if one:
                ends = np.array(one, np.int64)
                places = np.searchsorted(starts, ends[:, 0])
                behind = np.searchsorted(starts, ends[:, 1], side="right")
                change = np.zeros(len(starts) + 1, np.int64)
                change[places] += 1
                change[behind] -= 1
                row[:] = np.cumsum(change[:-1]) > 0
        # surrogates are in no set, not even in ALL, so they come first
        columns = np.packbits(inside, axis=0).T.copy()
        keys = columns.view([("", columns.dtype)] * columns.shape[1])[:, 0]
        _, first, symbols = np.unique(keys, return_index=True, return_inverse=True)
        order = np.argsort(first, kind="stable")
        surrogates = symbols[np.searchsorted(starts, 0xD800)]
        order = np.concatenate([[surrogates], order[order != surrogates]])
        rank = np.empty(len(order), np.int32)
        rank[order] = np.arange(len(order))
        return cls(starts, rank[symbols], len(order)), inside[1:, first[order]]

    def sets(self) -> list[CharSet]:
        """The characters of every symbol."""
        ends = np.append(self.starts[1:], LAST + 1) - 1
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.size)]
        spans = zip(self.starts.tolist(), ends.tolist(), self.symbols.tolist(), strict=True)
        for low, high, symbol in spans:
            found[symbol].append((low, high))
        return [charset(ranges) for ranges in found]

    def refined(self, other: Alphabet) -> tuple[Alphabet, NDArray[np.int32], NDArray[np.int32]]:
        """The coarsest alphabet that is finer than both, and the two symbols that each was."""
        starts = np.union1d(self.starts, other.starts).astype(np.int32)
        own, theirs = (
            a.symbols[np.searchsorted(a.starts, starts, side="right") - 1] for a in (self, other)
        )
        keys = own.astype(np.int64) * other.size + theirs  # the surrogates' is 0, the least
        pairs, symbols = np.unique(keys, return_inverse=True)
        alphabet = Alphabet(starts, symbols.astype(np.int32), len(pairs))
        first, second = np.divmod(pairs, other.size)
        return alphabet, first.astype(np.int32), second.astype(np.int32)

    def coarser(self, symbols: NDArray[np.int32], size: int) -> Alphabet:
        """The same with each symbol replaced; intervals that become equal are joined."""
        found = symbols[self.symbols]
        keep = np.concatenate([[True], found[1:] != found[:-1]])
        return Alphabet(self.starts[keep], found[keep], size)

    def of_code_points(self) -> NDArray[np.int32]:
        """[0x110000] the symbol of every code point."""
        lengths = np.diff(np.append(self.starts, LAST + 1))
        return np.repeat(self.symbols, lengths)
