"""StepShape: the sizes of a step, as plain numbers. Two plans of equal shape run the same kernels.

A shape may be padded: to more entries, tokens and LM-head rows than the plan has, so that
few shapes, and few CUDA graphs, serve many plans. Padding entries lie on the trash row
with empty spans; padding LM-head rows repeat the first cell of their segment.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from dllmserve.core.plan import Span, StepEntry, StepPlan
from dllmserve.core.rows import RowInit

SPAN_FIELDS = len(Span._fields)
#: statistics that take more than a row of logits, see :mod:`dllmserve.decoding.rule`
LOGIT_STATES = ("back", "credit", "kl")
#: Integers that say where an entry's LM-head rows lie, see :class:`Packing`.
HEAD_FIELDS = 4


@dataclass(frozen=True)
class SegmentShape:
    """Successive entries whose LM-head rows have the same needs.

    Attributes:
        entries, rows: entries and LM-head rows, padding included.
        guided: each row has an unconditional twin.
        sampled: some have a temperature above 0.
        filtered: some use top-p or top-k.
        bias: most token ids that one of them biases, padding included; 0 where none does.
        state: which of LOGIT_STATES their rule needs; "" for none.
        last: each has ids whose proposals are without confidence.
    """

    entries: int
    rows: int
    guided: bool
    sampled: bool
    filtered: bool
    bias: int = 0
    state: str = ""
    last: bool = False


@dataclass(frozen=True)
class StepShape:
    """Sizes of a step; also the key of its CUDA graph.

    Attributes:
        segments: the step's entries; guided segments last.
        tokens: packed query tokens.
        width: longest block.
        answer: answer columns that the report looks at.
        max_q: longest span.
        rules: names of the unmask rules in use.
        needs: statistics beyond token and probability, "memory" if a rule has one, "track" and
            "drift" if ``StateTable.stale`` is kept.
        pick: most positions that the queries of a span are chosen from; 0 if none are.
    """

    segments: tuple[SegmentShape, ...]
    tokens: int
    width: int
    answer: int
    max_q: int
    rules: tuple[str, ...]
    needs: frozenset[str]
    pick: int = 0

    @property
    def entries(self) -> int:
        """Entries, padding included."""
        return sum(s.entries for s in self.segments)

    @property
    def guided(self) -> int:
        """Guided entries, padding included; they are last."""
        return sum(s.entries for s in self.segments if s.guided)

    @property
    def shadowed(self) -> int:
        """Entries with a shadow, padding included; they are last but for the guided ones."""
        return sum(s.entries for s in self.segments if s.state == "back")

    @property
    def spans(self) -> int:
        """Spans: one per entry, then one per guided entry, then the shadows."""
        return self.entries + self.guided + self.shadowed

    @property
    def plain(self) -> bool:
        """True if nothing is kept between forwards besides tokens, masks and K,V."""
        extra = {*LOGIT_STATES, "memory", "track"}
        return not self.pick and not self.needs & extra

    @property
    def rows(self) -> int:
        """LM-head rows, without unconditional twins."""
        return sum(s.rows for s in self.segments)

    @property
    def twins(self) -> int:
        """LM-head rows that have an unconditional twin; they are last."""
        return sum(s.rows for s in self.segments if s.guided)


@dataclass(frozen=True)
class Packing:
    """A plan laid out in a shape.

    Attributes:
        shape: the sizes.
        ints: ``shape.spans`` spans of ten integers each, padding included; then four
            integers for each of ``shape.entries``: the first of its LM-head rows and their
            number, and the first of its segment's padding rows and their number, which are
            0 but for the segment's first entry.
        places: span of the layout of each of ``plan.spans``.
    """

    shape: StepShape
    ints: array[int]
    places: tuple[int, ...]


Needs = Callable[[StepEntry], frozenset[str]]


@dataclass(frozen=True)
class Padding:
    """How sizes are rounded up.

    Attributes:
        tokens: of query tokens, which every layer computes.
        rows: of LM-head rows, which only the LM head does, so they may be rounded further.
        other: of entries, block width and the like, which cost next to nothing.
    """

    tokens: Callable[[int], int]
    rows: Callable[[int], int]
    other: Callable[[int], int]


def ladder(size: int, fine: int) -> int:
    """The next power of two up to ``fine``, then the next multiple of it, or of 1/16 of the size.

    Example:
        >>> [ladder(n, 32) for n in (1, 3, 17, 33, 130, 2000, 2048, 2100)]
        [1, 4, 32, 64, 160, 2048, 2048, 2176]
    """
    if size <= fine:
        return 1 << (size - 1).bit_length()
    step = max(fine, (1 << (size.bit_length() - 1)) // 16)
    return -(-size // step) * step


#: Sizes as they are.
EXACT = Padding(tokens=lambda n: n, rows=lambda n: n, other=lambda n: n)
#: Few sizes, for CUDA graphs.
LADDER = Padding(
    tokens=lambda n: ladder(n, 32),
    rows=lambda n: ladder(max(n, 16), 128 if n > 512 else 64),
    other=lambda n: ladder(n, 16),
)


def lay_out(
    plan: StepPlan,
    host: Mapping[int, RowInit],
    needs: Needs,
    trash_row: int,
    pad: Padding = EXACT,
) -> Packing:
    """Lay a plan out in the shape that ``pad`` gives it."""

    def kind(entry: StepEntry) -> _Kind:
        init, wanted = host[entry.span.row], needs(entry)
        state = next((s for s in LOGIT_STATES if s in wanted), "")
        return _Kind(entry.uncond is not None, init.sampled, init.filtered, state, bool(init.last))

    layout = _Layout(trash_row, pad)
    for flags, members in groupby(plan.entries, key=kind):
        entries = list(members)
        bias = max(len(host[e.span.row].bias) for e in entries)
        layout.add(entries, flags, bias)
    wanted: set[str] = set()
    for entry in plan.entries:
        wanted |= needs(entry)
    pick = max(s.pick for s in plan.spans)
    shape = StepShape(
        segments=tuple(layout.segments),
        tokens=pad.tokens(plan.tokens),
        width=pad.other(max(e.span.blk_len for e in plan.entries)),
        answer=pad.other(max(host[e.span.row].gen_length for e in plan.entries)),
        max_q=pad.other(max(s.q_len for s in plan.spans)),
        rules=tuple(sorted({e.rule for e in plan.entries})),
        needs=frozenset(wanted),
        pick=pad.other(pick) if pick else 0,
    )
    return layout.packing(shape)


class _Kind(NamedTuple):
    """What entries of a segment have in common."""

    guided: bool
    sampled: bool
    filtered: bool
    state: str
    last: bool


class _Spans:
    """Spans laid out one after another, of entries some of which may have none.

    Attributes:
        ints: their integers.
        places: place of each real one.
    """

    def __init__(self, empty: tuple[int, ...]) -> None:
        self.ints, self.places = array("i"), list[int]()
        self._empty = empty

    def add(self, spans: list[Span], padding: int) -> None:
        """Add spans, and then ``padding`` empty ones."""
        for span in spans:
            self.places.append(len(self))
            self.ints.extend(span)
        self.ints.extend(self._empty * padding)

    def __len__(self) -> int:
        return len(self.ints) // SPAN_FIELDS


class _Layout:
    """Entries, their unconditional twins and their shadows, segment after segment."""

    def __init__(self, trash_row: int, pad: Padding) -> None:
        empty = (trash_row,) + (0,) * (SPAN_FIELDS - 1)
        self._pad = pad
        self._own, self._twins, self._shadows = _Spans(empty), _Spans(empty), _Spans(empty)
        self._heads = array("i")
        self.segments: list[SegmentShape] = []

    def add(self, entries: list[StepEntry], kind: _Kind, bias: int) -> None:
        """Add a segment, whose entries bias up to ``bias`` token ids."""
        pad = self._pad
        count = pad.other(len(entries))
        padding = count - len(entries)
        masks = [e.head_rows for e in entries] + [0] * padding
        segment = SegmentShape(
            count,
            pad.rows(sum(masks)),
            kind.guided,
            kind.sampled,
            kind.filtered,
            pad.other(bias) if bias else 0,
            kind.state,
            kind.last,
        )
        self._heads.extend(_head_rows(masks, sum(s.rows for s in self.segments), segment.rows))
        self.segments.append(segment)
        self._own.add([e.span for e in entries], padding)
        twins = [e.uncond for e in entries if e.uncond is not None]
        self._twins.add(twins, padding if kind.guided else 0)
        shadows = [e.shadow for e in entries if e.shadow is not None]
        self._shadows.add(shadows, padding if kind.state == "back" else 0)

    def packing(self, shape: StepShape) -> Packing:
        """All of it."""
        ints, places = array("i"), list[int]()
        for spans in (self._own, self._twins, self._shadows):
            first = len(ints) // SPAN_FIELDS
            places += [first + place for place in spans.places]
            ints.extend(spans.ints)
        ints.extend(self._heads)
        return Packing(shape, ints, tuple(places))


def empty_ints(shape: StepShape, trash_row: int) -> array[int]:
    """The integers of a packing with nothing but padding."""
    ints = array("i", (trash_row, *(0,) * (SPAN_FIELDS - 1)) * shape.spans)
    first = 0
    for segment in shape.segments:
        ints.extend(_head_rows([0] * segment.entries, first, segment.rows))
        first += segment.rows
    return ints


def _head_rows(masks: list[int], first: int, rows: int) -> array[int]:
    """Where the LM-head rows of a segment's entries lie, if it starts at row ``first``."""
    ints = array("i")
    row = first
    for count in masks:
        ints.extend((row, count, 0, 0))
        row += count
    ints[2], ints[3] = row, first + rows - row
    return ints
