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

from dllmserve.core.plan import Span, StepEntry, StepPlan
from dllmserve.core.rows import RowInit

SPAN_FIELDS = len(Span._fields)
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
    """

    entries: int
    rows: int
    guided: bool
    sampled: bool
    filtered: bool
    bias: int = 0


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
        needs: statistics beyond token and probability.
    """

    segments: tuple[SegmentShape, ...]
    tokens: int
    width: int
    answer: int
    max_q: int
    rules: tuple[str, ...]
    needs: frozenset[str]

    @property
    def entries(self) -> int:
        """Entries, padding included."""
        return sum(s.entries for s in self.segments)

    @property
    def guided(self) -> int:
        """Guided entries, padding included; they are last."""
        return sum(s.entries for s in self.segments if s.guided)

    @property
    def spans(self) -> int:
        """Spans: one per entry, then one per guided entry."""
        return self.entries + self.guided

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
        ints: ``shape.spans`` spans of nine integers each, padding included; then four
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

    def kind(entry: StepEntry) -> tuple[bool, bool, bool]:
        init = host[entry.span.row]
        return entry.uncond is not None, init.sampled, init.filtered

    empty = (trash_row,) + (0,) * (SPAN_FIELDS - 1)
    segments: list[SegmentShape] = []
    places, twins = [], []
    ints, uncond, heads = array("i"), array("i"), array("i")
    for flags, members in groupby(plan.entries, key=kind):
        entries = list(members)
        count = pad.other(len(entries))
        masks = [e.masks for e in entries] + [0] * (count - len(entries))
        most = max(len(host[e.span.row].bias) for e in entries)
        bias = pad.other(most) if most else 0
        segment = SegmentShape(count, pad.rows(sum(masks)), *flags, bias)
        heads.extend(_head_rows(masks, sum(s.rows for s in segments), segment.rows))
        segments.append(segment)
        for entry in entries:
            places.append(len(ints) // SPAN_FIELDS)
            ints.extend(entry.span)
            if entry.uncond is not None:
                twins.append(len(uncond) // SPAN_FIELDS)
                uncond.extend(entry.uncond)
        filling = empty * (count - len(entries))
        ints.extend(filling)
        if flags[0]:
            uncond.extend(filling)
    first_twin = len(ints) // SPAN_FIELDS
    ints.extend(uncond)
    ints.extend(heads)
    wanted: set[str] = set()
    for entry in plan.entries:
        wanted |= needs(entry)
    shape = StepShape(
        segments=tuple(segments),
        tokens=pad.tokens(plan.tokens),
        width=pad.other(max(e.span.blk_len for e in plan.entries)),
        answer=pad.other(max(host[e.span.row].gen_length for e in plan.entries)),
        max_q=pad.other(max(s.q_len for s in plan.spans)),
        rules=tuple(sorted({e.rule for e in plan.entries})),
        needs=frozenset(wanted),
    )
    return Packing(shape, ints, (*places, *(first_twin + t for t in twins)))


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
