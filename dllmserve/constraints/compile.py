"""From what a request asks for to the automaton over tokens that its answer follows."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from numpy.typing import NDArray

from dllmserve.constraints import limits
from dllmserve.constraints.dfa import Dfa, first_of_each, salts
from dllmserve.constraints.grammar import TokenGrammar, finished
from dllmserve.constraints.graph import NEVER, steps_to
from dllmserve.constraints.nfa import automaton
from dllmserve.constraints.nodes import either, text
from dllmserve.constraints.regex import parse
from dllmserve.constraints.schema import schema_node
from dllmserve.constraints.sequence import sequence, sequence_of
from dllmserve.constraints.tokens import Moves, first_states, hashes, token_maps
from dllmserve.constraints.utf8 import ByteDfa, to_bytes
from dllmserve.constraints.vocabulary import Vocabulary
from dllmserve.errors import InvalidParameterError

#: part of every key; raise it if the same input gives another grammar than before
_VERSION = 1


def grammar_key(
    *,
    regex: str | None = None,
    json_schema: str | None = None,
    choice: tuple[str, ...] | None = None,
    vocabulary: Vocabulary,
    vocab_size: int,
    mask_id: int,
    end_ids: tuple[int, ...] = (),
) -> str:
    """The key of the grammar that :func:`compile_grammar` makes of the same arguments."""
    asked = [regex, json_schema, choice]
    ids = [vocab_size, mask_id, sorted(set(end_ids))]
    said = json.dumps([_VERSION, asked, vocabulary.key, ids])
    return hashlib.sha256(said.encode()).hexdigest()


def compile_grammar(
    *,
    regex: str | None = None,
    json_schema: str | None = None,
    choice: tuple[str, ...] | None = None,
    vocabulary: Vocabulary,
    vocab_size: int,
    mask_id: int,
    end_ids: tuple[int, ...] = (),
) -> TokenGrammar:
    """The automaton over tokens of one constraint.

    Args:
        regex, json_schema, choice: what the whole text has to match; exactly one of them.
        vocabulary: bytes of the tokenizer's ids.
        vocab_size: ids that the model may write, which can be more than the tokenizer has.
        mask_id: the mask, which is never allowed.
        end_ids: ids that end a text; behind the first one stand end ids alone. Without any the text
            fills its canvas exactly.

    Raises:
        InvalidParameterError: the constraint is wrong, not supported, too large, or no text of this
            vocabulary satisfies it.
    """
    asked = {"regex": regex, "json_schema": json_schema, "choice": choice}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) != 1:
        raise InvalidParameterError(f"one of {', '.join(asked)} must be given, got {len(given)}")
    key = grammar_key(
        regex=regex,
        json_schema=json_schema,
        choice=choice,
        vocabulary=vocabulary,
        vocab_size=vocab_size,
        mask_id=mask_id,
        end_ids=end_ids,
    )
    ends = [id for id in end_ids if 0 <= id < vocab_size and id != mask_id]
    try:
        with limits.bounded_time():
            dfa = language(regex=regex, json_schema=json_schema, choice=choice)
            if dfa.empty:
                raise InvalidParameterError(f"{given[0]} is satisfied by no text at all")
            parts = _Parts(to_bytes(dfa), vocabulary, vocab_size, {mask_id, *end_ids})
            return parts.assemble(key, ends)
    except _NoTextError:
        raise InvalidParameterError(
            f"{given[0]} is satisfied by no text that this model's tokens can make"
        ) from None


def language(
    *,
    regex: str | None = None,
    json_schema: str | None = None,
    choice: tuple[str, ...] | None = None,
) -> Dfa:
    """The smallest automaton over characters of what one of them describes.

    Raises:
        InvalidParameterError: it is wrong, not supported or too large.
    """
    try:
        if regex is not None:
            return automaton(parse(regex, "regex"))
        if choice is not None:
            limits.check(sum(map(len, choice)), limits.MAX_TEXT, "the length of all choices")
            _check_unicode(choice)
            return automaton(either(text(one) for one in choice))
        parts = sequence_of(json_schema or "")
        return automaton(schema_node(json_schema or "") if parts is None else sequence(parts))
    except RecursionError as error:
        raise InvalidParameterError("the constraint is nested too deeply") from error


def _check_unicode(choice: tuple[str, ...]) -> None:
    for one in choice:
        try:
            one.encode()
        except UnicodeEncodeError as error:
            raise InvalidParameterError(f"choice {one!r} is not valid Unicode: {error}") from error


class _NoTextError(Exception):
    """No sequence of tokens is accepted."""


class _Parts:
    """The token automaton while it is put together.

    Its states are those of the byte automaton, then START if the decoder strips what a text begins
    with, then END if there are end ids. Its columns are classes of ids; 0 is never allowed.

    Args:
        automaton: over bytes.
        vocabulary: bytes of the ids.
        vocab_size: number of ids.
        never: ids that are no text, whatever their bytes are.
    """

    def __init__(
        self, automaton: ByteDfa, vocabulary: Vocabulary, vocab_size: int, never: set[int]
    ) -> None:
        self._accepting = automaton.accepting[:-1]
        self._start = automaton.start
        moves, of_id = token_maps(automaton, vocabulary)
        self._moves = moves
        self._of_id = _sized(of_id, vocab_size, never)
        if vocabulary.first is not None:
            self._add_start(_sized(first_states(automaton, vocabulary) + 1, vocab_size, never))

    def assemble(self, key: str, ends: list[int]) -> TokenGrammar:
        """The grammar.

        Raises:
            InvalidParameterError: it is too large.
            _NoTextError: it accepts nothing.
        """
        if ends:
            self._add_end(ends)
        moves = self._alive()
        columns = self._moves.numbers()[moves]
        rank = np.cumsum(self._live) - 1
        states = int(rank[-1]) + 1
        source = rank[self._moves.source[moves]].astype(np.int32)
        target = rank[self._moves.target[moves]].astype(np.int32)
        counts = np.bincount(columns, minlength=len(self._moves))
        kept = Moves(source, target, np.concatenate([[0], np.cumsum(counts)]))
        keys = hashes(kept, salts(2, states))
        keys[0] = 0
        class_of, first = _classes(keys[self._of_id])
        limits.check((states + 1) * (len(first) + 1), limits.MAX_TABLE, "its states times classes")
        delta = np.full((states + 1, len(first) + 1), states, np.int32)
        chosen = kept.chosen(self._of_id[first])
        delta[chosen.source, chosen.numbers() + 1] = chosen.target
        accepting = np.append(self._accepting[self._live], False)
        over = states - 1 if ends else -1  # the last one; a text that may end leads to it
        return finished(key, delta, class_of, int(rank[self._start]), accepting, over)

    def _alive(self) -> NDArray[np.bool_]:
        """Which moves are on the way from the start to an end; sets the states that are."""
        source, target = self._moves.source, self._moves.target
        begin = np.zeros(len(self._accepting), np.bool_)
        begin[self._start] = True
        self._live = steps_to(target, source, begin) < NEVER
        self._live &= steps_to(source, target, self._accepting) < NEVER
        if not self._live[self._start]:
            raise _NoTextError
        return self._live[source] & self._live[target]

    def _add_start(self, targets: NDArray[np.int64]) -> None:
        """A state that nothing leads to, from which the first token of a text leads.

        ``targets`` are [ids] states plus 1; 0 for ids that no text begins with.
        """
        width = len(self._accepting) + 1
        pairs, self._of_id = np.unique(self._of_id * width + targets, return_inverse=True)
        if pairs[0]:  # column 0 is that of ids that are never allowed
            pairs, self._of_id = np.append([0], pairs), self._of_id + 1
        maps, starts = np.divmod(pairs, width)
        old = self._moves.chosen(maps)
        some = np.flatnonzero(starts)
        columns = np.append(old.numbers(), some)
        order = np.argsort(columns, kind="stable")
        source = np.append(old.source, np.full(len(some), width - 1, np.int32))
        target = np.append(old.target, (starts[some] - 1).astype(np.int32))
        counts = np.bincount(columns, minlength=len(pairs))
        self._moves = Moves(source[order], target[order], np.concatenate([[0], np.cumsum(counts)]))
        self._accepting = np.append(self._accepting, self._accepting[self._start])
        self._start = width - 1

    def _add_end(self, ends: list[int]) -> None:
        """A state behind the text, which end ids lead to and keep."""
        end = len(self._accepting)
        self._accepting = np.append(self._accepting, True)
        source = np.flatnonzero(self._accepting).astype(np.int32)
        moves = self._moves
        self._of_id[ends] = len(moves)
        self._moves = Moves(
            np.append(moves.source, source),
            np.append(moves.target, np.full(len(source), end, np.int32)),
            np.append(moves.starts, moves.starts[-1] + len(source)),
        )


def _sized(of_id: NDArray[np.int32], vocab_size: int, never: set[int]) -> NDArray[np.int64]:
    """Numbers of the model's ids; 0 for those that the tokenizer lacks or ``never`` names."""
    found = np.zeros(vocab_size, np.int64)
    known = min(vocab_size, len(of_id))
    found[:known] = of_id[:known]
    found[[id for id in never if 0 <= id < vocab_size]] = 0
    return found


def _classes(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
    """Class of every id by its key, in the order of their lowest ids, from 1 on, and these.

    Ids with key 0 have class 0.
    """
    some = np.flatnonzero(keys)
    first, numbers = first_of_each(keys[some])
    class_of = np.zeros(len(keys), np.int32)
    class_of[some] = numbers + 1
    return class_of, some[first]
