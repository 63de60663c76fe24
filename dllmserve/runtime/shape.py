"""StepShape: the sizes of a step, as plain numbers. Two plans of equal shape run the same kernels.

A shape may be padded: to more entries, tokens and LM-head rows than the plan has, so that
few shapes, and few CUDA graphs, serve many plans. Padding entries lie on the trash row
with empty spans; padding LM-head rows repeat the first cell of their segment.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from typing import NamedTuple

from dllmserve.catalog import EDITS
from dllmserve.core.plan import Span, SpanField, StepEntry, StepPlan
from dllmserve.core.rows import RowInit
from dllmserve.decoding.logprobs import Wanted, rounded

SPAN_FIELDS = len(SpanField)


class EntryField(IntEnum):
    """Columns of packed entries."""

    #: the first of the entry's LM-head rows, and their number
    FIRST_ROW = 0
    ROWS = 1
    #: the first of its segment's padding rows and their number; 0 but for a segment's first entry
    FIRST_PAD = 2
    PADS = 3
    #: forwards that the block has had; -1 of one that only stores
    STEP = 4
    #: tokens that a schedule writes
    QUOTA = 5


ENTRY_FIELDS = len(EntryField)
#: LM-head rows of a padding entry, its step and its quota. It enters a block in every step: what is
#: kept on the trash row may be anything, and begins anew
_PADDING = (0, 0, 0)


@dataclass(frozen=True)
class SegmentShape:
    """Successive entries whose LM-head rows have the same needs.

    Attributes:
        entries, rows: entries and LM-head rows, padding included.
        guided: each row has an unconditional twin.
        sampled: some have a temperature above 0.
        filtered: some use top-p or top-k.
        last: each has ids whose proposals are without confidence.
        blind: each has a blind span.
        edits: name of each logit edit, and most pairs that an entry gives it, padding included.
        joint: a schedule writes several tokens of an entry.
        wanted: log-probabilities that are worked out, the most of any entry; None for none.
    """

    entries: int
    rows: int
    guided: bool
    sampled: bool
    filtered: bool
    last: bool = False
    blind: bool = False
    edits: tuple[tuple[str, int], ...] = ()
    joint: bool = False
    wanted: Wanted | None = None

    @property
    def constrained(self) -> bool:
        """True if its entries' texts have to match something."""
        return any(name == "constraint" for name, _ in self.edits)

    @property
    def keeps(self) -> bool:
        """True if something of the logits is kept from forward to forward."""
        return any(EDITS[name].keeps for name, _ in self.edits)


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
            "drift" if ``StateTable.stale`` is kept, "replace" if written tokens may be edited.
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
    def blind(self) -> int:
        """Entries with a blind span, padding included; they are last but for the guided ones."""
        return sum(s.entries for s in self.segments if s.blind)

    @property
    def spans(self) -> int:
        """Spans: one per entry, then one per guided entry, then the blind ones."""
        return self.entries + self.guided + self.blind

    @property
    def edited(self) -> bool:
        """True if what is done to logits, or wanted of them, differs from row to row."""
        named = self.candidates > 0
        return named or any(segment.edits or segment.last for segment in self.segments)

    @property
    def replaces(self) -> bool:
        """True if some entry may edit written tokens."""
        return "replace" in self.needs

    @property
    def candidates(self) -> int:
        """Most tokens whose log-probabilities a request wants at a position."""
        return max((s.wanted.candidates for s in self.segments if s.wanted), default=0)

    @property
    def constrained(self) -> bool:
        """True if some entry's text has to match something."""
        return any(segment.constrained for segment in self.segments)

    @property
    def plain(self) -> bool:
        """True if nothing is kept between forwards besides tokens, masks and K,V."""
        kept = any(segment.keeps for segment in self.segments)
        other = self.pick or self.blind or kept or self.candidates
        return not other and not self.needs & {"memory", "track"}

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
        ints: ``shape.spans`` rows of :class:`~dllmserve.core.plan.SpanField`, padding included,
            then ``shape.entries`` rows of :class:`EntryField`.
        indices: index in the layout of each of ``plan.spans``.

    ::

        spans    | entries' | guided twins' | blind |
        entries  | 0 | 1 | 2 | padding |
    """

    shape: StepShape
    ints: array[int]
    indices: tuple[int, ...]


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
#: Fewer still, for steps that store prompts too, whose sizes hardly ever come back otherwise.
COARSE = Padding(
    tokens=lambda n: -(-n // 128) * 128 if n > 64 else 64,
    rows=lambda n: -(-n // 128) * 128 if n > 32 else 32,
    other=lambda n: 1 << (n - 1).bit_length(),
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
        init = host[entry.span.row]
        return _Kind(
            entry.uncond is not None,
            init.sampled,
            init.filtered,
            bool(init.last),
            entry.blind is not None,
            tuple(init.edits),
            init.wants,
        )

    layout = _Layout(trash_row, pad)
    for flags, members in groupby(plan.entries, key=kind):
        entries = list(members)
        edits = [host[e.span.row].edits for e in entries]
        layout.add(
            entries,
            flags,
            [max(len(e[name]) for e in edits) for name in flags.edits],
            _wanted([host[e.span.row] for e in entries]) if flags.wants else None,
        )
    wanted: set[str] = set()
    for entry in plan.entries:
        wanted |= needs(entry)
    pick = max(s.pick for s in plan.spans)
    shape = StepShape(
        segments=tuple(layout.segments),
        tokens=pad.tokens(plan.tokens),
        width=pad.other(max(1, *(e.span.blk_len for e in plan.entries))),
        answer=pad.other(max(host[e.span.row].length for e in plan.entries)),
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
    last: bool
    blind: bool
    edits: tuple[str, ...]
    wants: bool


def _wanted(inits: list[RowInit]) -> Wanted:
    """The most log-probabilities that any of the rows wants."""
    named = (len(ids) for init in inits for ids in init.candidates)
    return Wanted(rounded(max(init.logprobs or 0 for init in inits)), max(named, default=0))


class _Spans:
    """Spans laid out one after another, of entries some of which may have none.

    Attributes:
        ints: their integers.
        indices: of the real ones.
    """

    def __init__(self, empty: tuple[int, ...]) -> None:
        self.ints, self.indices = array("i"), list[int]()
        self._empty = empty

    def add(self, spans: list[Span], padding: int) -> None:
        """Add spans, and then ``padding`` empty ones."""
        for span in spans:
            self.indices.append(len(self))
            self.ints.extend(span)
        self.ints.extend(self._empty * padding)

    def __len__(self) -> int:
        return len(self.ints) // SPAN_FIELDS


class _Layout:
    """Entries, their unconditional twins and their blind spans, segment after segment."""

    def __init__(self, trash_row: int, pad: Padding) -> None:
        empty = (trash_row,) + (0,) * (SPAN_FIELDS - 1)
        self._pad = pad
        self._own, self._twins, self._blind = _Spans(empty), _Spans(empty), _Spans(empty)
        self._entries = array("i")
        self.segments: list[SegmentShape] = []

    def add(
        self, entries: list[StepEntry], kind: _Kind, sizes: list[int], wanted: Wanted | None
    ) -> None:
        """Add a segment, whose entries give each edit up to so many pairs."""
        pad = self._pad
        count = pad.other(len(entries))
        padding = count - len(entries)
        heads = [(e.head_rows, e.step, e.quota) for e in entries] + [_PADDING] * padding
        segment = SegmentShape(
            entries=count,
            # at least one, so that a step that only stores is no special case
            rows=max(pad.rows(sum(rows for rows, _, _ in heads)), 1),
            guided=kind.guided,
            sampled=kind.sampled,
            filtered=kind.filtered,
            last=kind.last,
            blind=kind.blind,
            edits=tuple(
                (name, pad.other(size) if size else 0)
                for name, size in zip(kind.edits, sizes, strict=True)
            ),
            joint="constraint" in kind.edits and any(entry.quota > 1 for entry in entries),
            wanted=wanted,
        )
        first = sum(s.rows for s in self.segments)
        self._entries.extend(_entry_fields(heads, first, segment.rows))
        self.segments.append(segment)
        self._own.add([e.span for e in entries], padding)
        twins = [e.uncond for e in entries if e.uncond is not None]
        self._twins.add(twins, padding if kind.guided else 0)
        blind = [e.blind for e in entries if e.blind is not None]
        self._blind.add(blind, padding if kind.blind else 0)

    def packing(self, shape: StepShape) -> Packing:
        """All of it."""
        ints, indices = array("i"), list[int]()
        for spans in (self._own, self._twins, self._blind):
            first = len(ints) // SPAN_FIELDS
            indices += [first + index for index in spans.indices]
            ints.extend(spans.ints)
        ints.extend(self._entries)
        return Packing(shape, ints, tuple(indices))


def empty_ints(shape: StepShape, trash_row: int) -> array[int]:
    """The integers of a packing with nothing but padding."""
    ints = array("i", (trash_row, *(0,) * (SPAN_FIELDS - 1)) * shape.spans)
    first = 0
    for segment in shape.segments:
        ints.extend(_entry_fields([_PADDING] * segment.entries, first, segment.rows))
        first += segment.rows
    return ints


def _entry_fields(heads: list[tuple[int, int, int]], first: int, rows: int) -> array[int]:
    """:class:`EntryField` of a segment's entries, if it starts at LM-head row ``first``.

    Args:
        heads: number of LM-head rows of each entry, forwards that its block has had, and its quota.
        rows: LM-head rows of the segment.
    """
    ints = array("i")
    row = first
    for count, step, quota in heads:
        ints.extend((row, count, 0, 0, step, quota))
        row += count
    ints[EntryField.FIRST_PAD], ints[EntryField.PADS] = row, first + rows - row
    return ints
