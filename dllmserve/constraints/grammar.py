"""The automaton over tokens that a running request follows."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dllmserve.constraints.graph import edges_of, steps_to

_LIMIT_SHORT = 1 << 15


@dataclass(frozen=True, eq=False)
class TokenGrammar:
    """Which tokens may follow which, for texts of one constraint in one vocabulary.

    Two grammars are equal if their keys are.

    Attributes:
        key: names all that the grammar was made of.
        delta: [Q + 1, C] int32: next state by state and class. Q is the dead state, which is never
            left; class 0 leads to it from everywhere.
        class_of: [V] int32: class of every id; 0 is never allowed.
        start: state before the first token.
        accepting: [Q + 1] bool: a canvas may end here.
        least: [Q + 1] int32: fewest tokens to an accepting state; :data:`NEVER` for the dead state.
        first: [C] int32: lowest id of every class, -1 for a class without ids (0 alone may be one).
        size: [C] int32: number of ids of every class.

    Example:
        >>> from dllmserve.constraints.compile import compile_grammar
        >>> from dllmserve.constraints.vocabulary import Vocabulary
        >>> grammar = compile_grammar(
        ...     regex="ab?", vocabulary=Vocabulary([b"a", b"b"]), vocab_size=3, mask_id=2
        ... )
        >>> [bool(grammar.accepting[grammar.walk(ids)]) for ids in ([0], [0, 1], [1])]
        [True, True, False]
    """

    key: str
    delta: NDArray[np.int32]
    class_of: NDArray[np.int32]
    start: int
    accepting: NDArray[np.bool_]
    least: NDArray[np.int32]
    first: NDArray[np.int32]
    size: NDArray[np.int32]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenGrammar) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def states(self) -> int:
        """Q: number of states without the dead one, whose index it is."""
        return len(self.delta) - 1

    @property
    def classes(self) -> int:
        """C: number of classes, with that of the ids that are never allowed."""
        return len(self.first)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, in bytes."""
        arrays = (self.delta, self.class_of, self.accepting, self.least, self.first, self.size)
        return sum(array.nbytes for array in arrays)

    def walk(self, ids: list[int]) -> int:
        """The state after some tokens."""
        state = self.start
        for id in ids:
            state = int(self.delta[state, self.class_of[id]])
        return state

    def to_bytes(self) -> bytes:
        """All of it, compressed; see :meth:`from_bytes`."""
        return self._bytes

    @cached_property
    def _bytes(self) -> bytes:
        key = self.key.encode()
        head = np.array(
            [len(key), self.states, self.classes, len(self.class_of), self.start], "<i8"
        )
        # what repeats column by column is small if columns are stored
        kind = "<i2" if self.states < _LIMIT_SHORT else "<i4"
        parts = [
            head.tobytes(),
            key,
            self.delta.T.astype(kind).tobytes(),
            self.class_of.astype("<i4").tobytes(),
            self.least.astype("<i4").tobytes(),
            self.accepting.tobytes(),
        ]
        return zlib.compress(b"".join(parts), 1)

    @classmethod
    def from_bytes(cls, data: bytes) -> TokenGrammar:
        """The grammar that :meth:`to_bytes` wrote. The data must come from this package."""
        raw = zlib.decompress(data)
        length, states, classes, ids, start = np.frombuffer(raw, "<i8", 5).tolist()
        place = 40 + length
        key = raw[40:place].decode()
        kind = np.dtype("<i2" if states < _LIMIT_SHORT else "<i4")
        table = np.frombuffer(raw, kind, (states + 1) * classes, place)
        place += table.nbytes
        delta = np.ascontiguousarray(table.reshape(classes, states + 1).T, np.int32)
        class_of = np.frombuffer(raw, "<i4", ids, place).astype(np.int32)
        least = np.frombuffer(raw, "<i4", states + 1, place + 4 * ids).astype(np.int32)
        place += 4 * (ids + states + 1)
        accepting = np.frombuffer(raw, np.bool_, states + 1, place).copy()
        return _with_counts(key, delta, class_of, start, accepting, least)


def finished(
    key: str,
    delta: NDArray[np.int32],
    class_of: NDArray[np.int32],
    start: int,
    accepting: NDArray[np.bool_],
) -> TokenGrammar:
    """A grammar with what follows from its table."""
    least = steps_to(*edges_of(delta), accepting)
    return _with_counts(key, delta, class_of, start, accepting, least)


def _with_counts(
    key: str,
    delta: NDArray[np.int32],
    class_of: NDArray[np.int32],
    start: int,
    accepting: NDArray[np.bool_],
    least: NDArray[np.int32],
) -> TokenGrammar:
    classes = delta.shape[1]
    first = np.full(classes, -1, np.int32)
    first[class_of[::-1]] = np.arange(len(class_of), dtype=np.int32)[::-1]
    size = np.bincount(class_of, minlength=classes).astype(np.int32)
    return TokenGrammar(key, delta, class_of, start, accepting, least, first, size)
