"""Labels: what stands for an option in the answer, one token each if the tokenizer has such.

A label is looked for where it will stand, in a line of the answer: putting it there must change one
token of the line and nothing else.
"""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from dllmserve.decisions.questions import Question
from dllmserve.errors import TokenizerError

#: answers to a predicate: the first pair of which both are one token
_PAIRS = (("yes", "no"), ("Yes", "No"), ("true", "false"), ("True", "False"))
_LETTERS = string.ascii_uppercase


def line_of(number: int, label: str) -> str:
    """A line of the answer."""
    return f"{number}: {label}\n"


@dataclass(frozen=True)
class Labels:
    """Labels of one kind.

    Attributes:
        names: as the prompt shows them.
        codes: token ids of each, all of the same length: those of its slots.
        ends: where the slots stand in a line, counted from its end: -1 is the last token.
        fixed: whether a label belongs to its option, wherever that is listed.
    """

    names: tuple[str, ...]
    codes: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]
    fixed: bool = False

    def first(self, count: int) -> Labels:
        """The first so many."""
        return Labels(self.names[:count], self.codes[:count], self.ends, self.fixed)


class LabelMaker:
    """Finds labels in a tokenizer.

    Args:
        encode: ids of a text, without what a tokenizer adds around a prompt.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]]) -> None:
        self._encode = encode

    def labels(self, question: Question) -> Labels:
        """Labels of a question's options.

        - A predicate has ``yes`` and ``no``, or another such pair.
        - A score of up to ten levels has their numbers, from 0.
        - Anything else has A, B, C ..; over 26 also AA, AB .., as far as these are one token each;
          and if that is not enough ``A A``, ``A B`` .. with two slots.

        Raises:
            TokenizerError: the tokenizer has no such tokens.
        """
        count = len(question.options)
        if question.kind == "predicate" and self._pair is not None:
            return self._pair
        if question.kind == "score" and len(self._digits.names) >= count:
            return self._digits.first(count)
        if len(self._letters.names) >= count:
            return self._letters.first(count)
        wide = self._wide
        found = wide if len(wide.names) >= count else self._codes
        if len(found.names) < count:
            raise TokenizerError(
                f"the tokenizer has {len(found.names)} labels, too few for {count} options: ask "
                "with fewer"
            )
        return found.first(count)

    def line(self, number: int, labels: Labels) -> tuple[list[int], tuple[int, ...]]:
        """Ids of a line whose slots hold the first label, and the places of its slots.

        Raises:
            TokenizerError: the tokenizer reads this line in another way than others.
        """
        ids = list(self._encode(line_of(number, labels.names[0])))
        slots = tuple(len(ids) + end for end in labels.ends)
        if slots[0] < 0 or tuple(ids[slot] for slot in slots) != labels.codes[0]:
            raise TokenizerError(
                f"the tokenizer reads {line_of(number, labels.names[0])!r} in another way than "
                f"{line_of(1, labels.names[0])!r}: decisions need labels of one token"
            )
        return ids, slots

    @cached_property
    def _pair(self) -> Labels | None:
        found = (self._single(pair) for pair in _PAIRS)
        pair = next((labels for labels in found if len(labels.names) == 2), None)
        return pair and Labels(pair.names, pair.codes, pair.ends, fixed=True)

    @cached_property
    def _digits(self) -> Labels:
        found = self._single(string.digits)
        return Labels(found.names, found.codes, found.ends, fixed=True)

    @cached_property
    def _letters(self) -> Labels:
        found = self._single(_LETTERS)
        if len(found.names) < 2:
            raise TokenizerError(
                "the tokenizer has no single tokens for A and B in a line of text: decisions need "
                "labels of one token"
            )
        return found

    @cached_property
    def _wide(self) -> Labels:
        """Single tokens for A to Z, and then for AA to ZZ."""
        pairs = map("".join, itertools.product(_LETTERS, repeat=2))
        return self._single([*self._letters.names, *pairs])

    @cached_property
    def _codes(self) -> Labels:
        """Two letters in two slots: every one of them can be followed by every one."""
        names = self._letters.names
        parts = [self._single([f"{n} {names[0]}" for n in names])]
        parts.append(self._single([f"{names[0]} {n}" for n in names]))
        count = min(len(part.names) for part in parts)
        first, second = (part.first(count) for part in parts)
        pairs = list(itertools.product(range(count), repeat=2))
        return Labels(
            tuple(f"{names[a]} {names[b]}" for a, b in pairs),
            tuple(first.codes[a] + second.codes[b] for a, b in pairs),
            first.ends + second.ends,
        )

    def _single(self, names: Sequence[str]) -> Labels:
        """Those of the names that change one token of a line, the one that the second changes."""
        base = list(self._encode(line_of(1, names[0])))
        lines = [list(self._encode(line_of(1, name))) for name in names]
        places = [_only_change(base, line) for line in lines]
        place = places[1]
        if place is None:
            return Labels((), (), ())
        fit = [
            (name, line[place])
            for name, line, changed in zip(names, lines, places, strict=True)
            if changed == place or name == names[0]
        ]
        # names that share a token are ones that the tokenizer does not know
        used = Counter(id for _, id in fit)
        fit = [(name, id) for name, id in fit if used[id] == 1]
        found, ids = tuple(name for name, _ in fit), tuple((id,) for _, id in fit)
        return Labels(found, ids, (place - len(base),))


def _only_change(base: list[int], line: list[int]) -> int | None:
    """The only place at which two lines of the same length differ, or None."""
    if len(base) != len(line):
        return None
    found = [i for i, (a, b) in enumerate(zip(base, line, strict=True)) if a != b]
    return found[0] if len(found) == 1 else None
