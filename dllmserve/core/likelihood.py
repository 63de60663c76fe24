"""How likely given answers are: which forwards that takes, and what their numbers add up to.

Source: ``get_loglikelihood`` of ML-GSAI/LLaDA's eval_llada.py. A masked model bounds the
log-probability of an answer from below: with x of its n tokens masked, the others and the prompt
given, the sum of the log-probabilities of the masked ones, times n / x, is on average no more than
that. The average is taken over samples, whose x are spread evenly over 1 .. n.

Each sample is one forward, and a request like any other: a canvas with holes in it, which names the
true tokens as its candidates. An answer of one token needs one forward, and the result is exact. So
is that of an autoregressive model, whose answer is a chain of such.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import sha256

from dllmserve.core.canvas import Canvas, Range

#: which positions of a part of an answer a sample masks, ascending
Masks = tuple[int, ...]


def sample_masks(length: int, samples: int, key: str) -> dict[Masks, float]:
    """Which positions of ``length`` each sample masks, with its weight in the sum.

    Samples that mask the same are one. Whatever has the same key draws the same numbers: what is
    masked of a longer answer begins with the same ranks as that of a shorter one.

    Example:
        >>> sample_masks(1, 128, "any")
        {(0,): 1.0}
        >>> sorted({len(masks) for masks in sample_masks(4, 4, "any")})
        [1, 2, 3, 4]
    """
    found: dict[Masks, float] = {}
    first = 1 + int(random.Random(key).random() * length)
    for sample in range(samples):
        # evenly spread over 1 .. length, from a random one on
        count = (round(Fraction(first) + Fraction(sample * length, samples)) - 1) % length + 1
        draw = random.Random(f"{key} {sample}").random
        ranks = [(draw(), place) for place in range(length)]
        masks = tuple(sorted(place for _, place in sorted(ranks)[:count]))
        found[masks] = found.get(masks, 0.0) + length / (count * samples)
    return found


@dataclass
class Forward:
    """A forward that is run once, whoever needs it.

    Attributes:
        canvas: what it is given, and the holes.
        named: of each position to fill, the tokens whose log-probabilities are wanted, and their
            places in the list.
    """

    canvas: Canvas
    named: list[dict[int, int]]

    @property
    def candidates(self) -> tuple[tuple[int, ...], ...]:
        """As a request takes them."""
        return tuple(map(tuple, self.named))


@dataclass(frozen=True)
class _Term:
    """A number that is added: where it is found, and its weight."""

    forward: Forward
    hole: int
    place: int
    weight: float


@dataclass
class Likelihoods:
    """Sums for some answers, and the forwards that they are made of.

    Example:
        >>> from dllmserve.core.canvas import answer_canvas
        >>> sums = Likelihoods(samples=4, seed=0)
        >>> for answer in ([8], [9]):
        ...     sums.add([5, 6], answer, answer_canvas([5, 6], 1, 1))
        >>> [forward.candidates for forward in sums.forwards]
        [((8, 9),)]
        >>> sums.totals([[[-0.5, -1.5]]])
        [-0.5, -1.5]
    """

    samples: int
    seed: int
    forwards: list[Forward] = field(default_factory=list)
    _known: dict[object, Forward] = field(default_factory=dict)
    _terms: list[list[_Term]] = field(default_factory=list)

    def add(self, prompt: Sequence[int], answer: Sequence[int], geometry: Canvas) -> None:
        """Add an answer; its sum comes with the others', in the order of the calls.

        Args:
            prompt, answer: token ids.
            geometry: the canvas that the model would fill with an answer of this length. Blocks of
                a model that does not see what stands behind them are estimated one by one.
        """
        ids, start = [*prompt, *answer], len(prompt)
        blocks = geometry.blocks if geometry.window else ((start, len(ids)),)
        digest = sha256(array("q", prompt).tobytes()).hexdigest()
        terms = list[_Term]()
        for number, (low, high) in enumerate(blocks):
            first, last = max(low, start), min(high, len(ids))
            if first >= last:
                break  # the rest of the last block is not asked for
            key = f"{self.seed} {digest} {number}"
            for masks, weight in sample_masks(last - first, self.samples, key).items():
                places = [first + place for place in masks]
                forward = self._forward(ids[:high], places, (low, high), geometry)
                for hole, position in enumerate(places):
                    named = forward.named[hole]
                    place = named.setdefault(ids[position], len(named))
                    terms.append(_Term(forward, hole, place, weight))
        self._terms.append(terms)

    def totals(self, found: Sequence[Sequence[Sequence[float]]]) -> list[float]:
        """The answers' sums.

        Args:
            found: of each of ``forwards`` the log-probabilities of its candidates.
        """
        by_forward = {id(f): values for f, values in zip(self.forwards, found, strict=True)}
        return [
            sum(t.weight * by_forward[id(t.forward)][t.hole][t.place] for t in terms)
            for terms in self._terms
        ]

    def _forward(
        self, ids: Sequence[int], places: Sequence[int], block: Range, geometry: Canvas
    ) -> Forward:
        """The forward over these tokens without those at some places of a block."""
        end = block[1] if geometry.window else len(ids)
        # what an answer leaves of its last block is masked, as it would be when it is filled
        holes = _ranges([*places, *range(len(ids), end)])
        open_ = {p for low, high in holes for p in range(low, high)}
        given = tuple(0 if p in open_ else token for p, token in enumerate(ids))
        key = (given, holes, block)
        if key not in self._known:
            canvas = Canvas(given, holes, (block,), geometry.window, shift=geometry.shift)
            fills = sum(high - low for low, high in holes)
            self._known[key] = forward = Forward(canvas, [{} for _ in range(fills)])
            self.forwards.append(forward)
        return self._known[key]


def _ranges(places: Sequence[int]) -> tuple[Range, ...]:
    """Ascending places as ranges.

    Example:
        >>> _ranges([2, 3, 4, 7])
        ((2, 5), (7, 8))
    """
    found = list[Range]()
    for place in places:
        if found and found[-1][1] == place:
            found[-1] = found[-1][0], place + 1
        else:
            found.append((place, place + 1))
    return tuple(found)
