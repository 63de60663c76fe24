"""The plan of one step: a few integers per span, and nothing else.

Every phase of every cache policy is a choice of these integers, so the scheduler, the runner and
the attention backend never ask which policy or phase they serve. Each integer has one meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple


class Store(IntEnum):
    """What a span leaves of its fresh K,V in its row's pages, and when."""

    NONE = 0
    #: those of every query position p go to slot p, while the span attends
    POSITIONS = 1
    #: the same, before any span of the step attends; the span then sees slots 0..ctx_len-1 and
    #: nothing else. For spans with ``pick``, and entries with a blind span
    AHEAD = 2
    #: after attention, each K,V head keeps its own ``keep`` best tokens in slots 0..keep-1
    SELECT_PER_HEAD = 3
    #: after attention, all heads keep the same ``keep`` best tokens
    SELECT_SHARED = 4


class Mask(IntEnum):
    """Which keys a query sees."""

    #: all of them
    FULL = 0
    #: those of its own block and of earlier ones; blocks of ``mask_arg`` are cut from position 0
    STAIR = 1
    #: all slots but the one ``mask_arg`` positions behind its own, and the span itself, whose
    #: queries are all mask tokens: what the model thinks of a position without looking at it
    BLIND = 2


class Part(IntEnum):
    """Which positions of a block are meant."""

    NONE = 0
    MASKED = 1
    BLOCK = 2
    #: masked ones, and written ones that may still be edited: all but given tokens
    OPEN = 3


class Kind(IntEnum):
    """What a forward of a request is for."""

    #: it computes K,V and decides nothing
    STORE = 0
    #: it decides tokens
    FILL = 1


class SpanField(IntEnum):
    """Columns of packed spans, in the order of :class:`Span`; kernels read them by these."""

    ROW = 0
    Q_START = 1
    Q_LEN = 2
    CTX_LEN = 3
    STORE = 4
    KEEP = 5
    BLK_OFF = 6
    BLK_LEN = 7
    HEAD = 8
    MASK = 9
    MASK_ARG = 10
    PICK = 11
    MUST = 12


class Span(NamedTuple):
    """One request's share of a step.

    ::

        canvas  . . . . . . . . . . . . . . . .
        queries       |<---- q_len ----->|          from q_start on
        block               |<-blk_len->|           from q_start + blk_off on
        slots   |<------ ctx_len ----------->|      cached, of the row's pages

    Attributes:
        row: row of the state table.
        q_start, q_len: queries are canvas positions ``q_start .. q_start + q_len - 1``.
        ctx_len: they attend to cached slots ``0 .. ctx_len - 1`` that the span does not
            overwrite, and to the span itself, as ``mask`` says.
        store: see :class:`Store`.
        keep: tokens that a selection keeps.
        blk_off, blk_len: the block's positions start at ``q_start + blk_off``.
        head: :class:`Part` of the block whose logits are computed; NONE in a forward that only
            stores, which has no block either. BLOCK adds the written positions, whose tokens are
            scored, OPEN those for which another token is proposed.
        mask, mask_arg: see :class:`Mask`.
        pick: 0, or the device chooses the ``q_len`` queries among the ``pick`` positions from
            q_start on (with Store.AHEAD), those whose K,V are most out of date, and computes them
            by position: first those it must, then by :attr:`StateTable.stale`.
        must: :class:`Part` of the block that is among them, and what its logits are read at.
    """

    row: int
    q_start: int
    q_len: int
    ctx_len: int
    store: int = Store.NONE
    keep: int = 0
    blk_off: int = 0
    blk_len: int = 0
    head: int = Part.MASKED
    mask: int = Mask.FULL
    mask_arg: int = 0
    pick: int = 0
    must: int = Part.NONE

    @property
    def reach(self) -> int:
        """Positions from q_start on that may be queries."""
        return self.pick or self.q_len

    @property
    def blk_start(self) -> int:
        """Canvas position of the first block token."""
        return self.q_start + self.blk_off

    @property
    def blk_end(self) -> int:
        """Canvas position behind the last block token."""
        return self.q_start + self.blk_off + self.blk_len

    @property
    def refresh(self) -> bool:
        """True if the span is the canvas from its start, and all of it attends to itself alone.

        A span that stores nothing reads its cached slots even where it covers their positions: a
        sparse reuse at the canvas's start finds there what was kept from elsewhere.
        """
        overwrites = self.store in (Store.POSITIONS, Store.AHEAD) and not self.pick
        overwritten = overwrites and self.ctx_len <= self.q_len
        alone = self.q_start == 0 and self.mask == Mask.FULL
        return alone and (self.ctx_len == 0 or overwritten)

    @property
    def final(self) -> int:
        """Position behind those whose K,V are final after the span; 0 with full attention.

        Those are whole windows before the block: what a block still changes, its window sees.
        """
        if self.mask != Mask.STAIR or self.store != Store.POSITIONS:
            return 0
        end = self.q_start + self.q_len
        if self.head == Part.NONE:
            return end
        return min(end, self.blk_start) // self.mask_arg * self.mask_arg

    @property
    def selects(self) -> bool:
        """True if the span keeps a selection of its tokens."""
        return self.store in (Store.SELECT_PER_HEAD, Store.SELECT_SHARED)


def with_blind(span: Span, seen: int, shift: int) -> tuple[Span, Span]:
    """A span whose K,V are stored before anything attends, and a blind one that reads them.

    Args:
        span: stores all its K,V, or covers all that it sees.
        seen: canvas positions that are seen.
        shift: 1 for models that read the logits of position p at p - 1.
    """
    start = max(span.blk_start - shift, 0)  # position 0 has nothing before it
    blind = Span(
        row=span.row,
        q_start=start,
        q_len=max(span.blk_end - shift - start, 1),
        ctx_len=seen,
        head=Part.NONE,
        mask=Mask.BLIND,
        mask_arg=shift,
    )
    return span._replace(store=Store.AHEAD, ctx_len=seen, head=Part.BLOCK), blind


class StepEntry(NamedTuple):
    """A span with what the rule needs to know about it on the host.

    Attributes:
        span: the conditional (or only) span.
        uncond: the same span on the row whose given tokens are masked (cfg_scale > 0), or None.
        masks: masked positions in the block.
        rule: name of the unmask rule.
        step: forwards that the block has had; rules begin anew at 0. -1 of a forward that only
            stores.
        quota: tokens that a schedule writes in this forward; 0 for rules without one.
        last: True if the request's answer is known to be complete after this step.
        blind: the block once more, with Mask.BLIND, where the written positions are scored; or
            None.
        stores: more than one window or frame is stored for good: given tokens, a part of them, or
            what was lost.
        fills: positions of the block that are not given; for Part.OPEN.
    """

    span: Span
    uncond: Span | None
    masks: int
    rule: str
    step: int = -1
    quota: int = 0
    last: bool = False
    blind: Span | None = None
    stores: bool = False
    fills: int = 0

    @property
    def kind(self) -> Kind:
        """What the forward is for."""
        return Kind.STORE if self.span.head == Part.NONE else Kind.FILL

    @property
    def tokens(self) -> int:
        """Query tokens of this entry."""
        extra = 0 if self.blind is None else self.blind.q_len
        return self.span.q_len * (2 if self.uncond else 1) + extra

    @property
    def head_rows(self) -> int:
        """LM-head rows, without unconditional twins."""
        return (0, self.masks, self.span.blk_len, self.fills)[self.span.head]

    @property
    def logit_rows(self) -> int:
        """Rows that go through the LM head."""
        return self.head_rows * (2 if self.uncond else 1)


class NewToken(NamedTuple):
    """A token that the host writes to a row: its canvas position had to hold it."""

    row: int
    position: int
    token: int


class NewPage(NamedTuple):
    """A page that a row got, and its column in the page table."""

    row: int
    column: int
    page: int


@dataclass(frozen=True)
class StepPlan:
    """The whole contract between the scheduler and the runner for one forward pass.

    Entries with guidance come last; their unconditional spans follow all other spans, in
    the same order. So span i of the first ``len(entries)`` belongs to entry i. Entries with a
    blind span come just before those; the blind spans are the last spans.

    Attributes:
        entries: the requests' forwards.
        pages: pages that rows have got since the last plan, which go to the page table first.
        tokens_known: tokens that the host writes to rows first, since they had to stand there.
    """

    entries: tuple[StepEntry, ...]
    pages: tuple[NewPage, ...] = ()
    tokens_known: tuple[NewToken, ...] = ()

    @property
    def spans(self) -> tuple[Span, ...]:
        """Conditional spans in entry order, then the unconditional ones, then blind ones."""
        first = tuple(e.span for e in self.entries)
        twins = tuple(e.uncond for e in self.entries if e.uncond is not None)
        return first + twins + tuple(e.blind for e in self.entries if e.blind is not None)

    @property
    def guided(self) -> int:
        """Number of entries with classifier-free guidance (they are last)."""
        return sum(e.uncond is not None for e in self.entries)

    @property
    def tokens(self) -> int:
        """Query tokens of the step."""
        return sum(e.tokens for e in self.entries)

    def part(self, low: int, high: int | None = None) -> StepPlan:
        """Entries ``low .. high - 1`` as a plan; any part may be the first to run."""
        return replace(self, entries=self.entries[low:high])

    def validate(self, max_model_len: int) -> None:
        """Raise ValueError if the plan breaks its own contract (a bug, never user input)."""
        kinds = [(e.uncond is not None, e.blind is not None) for e in self.entries]
        if kinds != sorted(kinds):
            raise ValueError("entries with guidance must come last, blind ones before them")
        rows = [s.row for s in self.spans if s.mask != Mask.BLIND]
        if len(set(rows)) != len(rows):
            raise ValueError(f"a row appears twice in one plan: {rows}")
        for span in self.spans:
            _validate(span, max_model_len)
        for entry in self.entries:
            masks = entry.masks
            if masks < 0 or max(masks, entry.fills) > entry.span.blk_len:
                raise ValueError(f"{masks} masks in a block of {entry.span.blk_len}")
            if entry.span.store == Store.AHEAD and not (entry.span.pick or entry.blind):
                raise ValueError(f"nothing of the step reads what is stored ahead: {entry.span}")


#: what :attr:`EntryReport.holds` says of a position that is written, and of one that is open
WRITTEN, OPEN = -2, -1


class EntryReport(NamedTuple):
    """What the runner says of one entry after a step.

    Attributes:
        masks_left: masked positions left in the block.
        frontier: answer positions unmasked without a gap, from the left.
        eos: answer index of the first end-of-sequence id before the frontier, or -1.
        broken: LM-head rows whose logits were not numbers; any ends the request.
        end: answer index of the first end-of-sequence id that stands anywhere, or -1.
        edits: written tokens that were replaced.
        holds: of a constrained request, for each position of the answer: WRITTEN, OPEN, or the
            only id that an open position can hold, as far as that was looked at.
    """

    masks_left: int
    frontier: int
    eos: int
    broken: int = 0
    end: int = -1
    edits: int = 0
    holds: Sequence[int] | None = None

    def within(self, length: int) -> EntryReport:
        """The report of the answer's first ``length`` positions."""
        if self.frontier <= length and self.eos < length and self.end < length:
            return self
        eos = self.eos if self.eos < length else -1
        end = self.end if self.end < length else -1
        return self._replace(frontier=min(self.frontier, length), eos=eos, end=end)


def _validate(span: Span, max_model_len: int) -> None:
    if span.q_len < 1 or span.q_start < 0 or span.q_start + span.reach > max_model_len:
        raise ValueError(f"query range outside the canvas: {span}")
    # logits may be read one position earlier, and then need no query at the last position itself
    reach = span.reach + (span.mask == Mask.STAIR)
    if span.blk_off < 0 or span.blk_off + span.blk_len > reach:
        raise ValueError(f"block outside the query range: {span}")
    if span.pick and (span.store != Store.AHEAD or not span.q_len <= span.pick):
        raise ValueError(f"bad choice of queries: {span}")
    if span.store not in tuple(Store) or span.keep < 0 or span.ctx_len < 0:
        raise ValueError(f"bad store, keep or ctx_len: {span}")
    if span.mask not in tuple(Mask) or (span.mask == Mask.STAIR and span.mask_arg < 1):
        raise ValueError(f"bad mask: {span}")
    if span.head not in tuple(Part) or span.must not in tuple(Part):
        raise ValueError(f"bad part of the block: {span}")
    if span.head == Part.NONE and span.blk_len:
        raise ValueError(f"a span that decides nothing has a block: {span}")
