"""The plan of one step: ten integers per span, and nothing else.

Every phase of every cache policy is a choice of these ten numbers, so the scheduler,
the runner and the attention backend never ask which policy or phase they serve.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple


class Write(IntEnum):
    """What a span leaves in its request's K,V pages."""

    NONE = 0
    #: fresh K,V of every query position p goes to slot p, before attention
    ALL = 1
    #: after attention, each K,V head keeps its own ``keep`` best tokens in slots 0..keep-1
    SELECT_PER_HEAD = 2
    #: after attention, all heads keep the same ``keep`` best tokens
    SELECT_SHARED = 3
    #: fresh K,V go to their slots before any span of the step attends; the span then sees
    #: slots 0..ctx_len-1 and nothing else
    FIRST = 4
    #: nothing. All queries are mask tokens; each sees all slots but the one ``keep``
    #: positions behind its own, and the span itself
    SHADOW = 5


class Span(NamedTuple):
    """One request's share of a step.

    Queries are canvas positions ``q_start .. q_start + q_len - 1``. They attend to cached
    slots ``0 .. ctx_len - 1`` that this span does not overwrite, and to the span itself.
    LM-head rows are the masked ones among the ``blk_len`` positions that start at
    ``q_start + blk_off``.

    With ``pick`` above 0 (only ``Write.FIRST``), the device chooses the q_len queries among the
    ``pick`` positions from q_start on, those whose K,V are most out of date, and computes them in
    the order of their positions: first those it must (``keep`` 1: the whole block; 0: the masked
    ones, and what their logits are read at), then by :attr:`StateTable.stale`.
    """

    row: int
    q_start: int
    q_len: int
    ctx_len: int
    write: int
    keep: int
    blk_off: int
    blk_len: int
    stair: int
    pick: int = 0

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
        """True if the span is the canvas from its start and attends to itself alone.

        A span that writes NONE reads its cached slots even where it covers their positions: a
        sparse reuse at the canvas's start finds there what was kept from elsewhere.
        """
        overwrites = self.write in (Write.ALL, Write.FIRST) and not self.pick
        overwritten = overwrites and self.ctx_len <= self.q_len
        return self.q_start == 0 and (self.ctx_len == 0 or overwritten)

    @property
    def selects(self) -> bool:
        """True if the span keeps a selection of its tokens."""
        return self.write in (Write.SELECT_PER_HEAD, Write.SELECT_SHARED)


@dataclass(frozen=True)
class StepEntry:
    """A span with what the rule needs to know about it on the host.

    Attributes:
        span: the conditional (or only) span.
        uncond: the same span on the row whose prompt is masked (cfg_scale > 0), or None.
        masks: masked positions in the block, which is the number of LM-head rows.
        rule: name of the unmask rule.
        last: True if the request's answer is known to be complete after this step.
        shadow: the block once more, all masks, which scores the written positions; or None.
            Every position of the block is then an LM-head row.
    """

    span: Span
    uncond: Span | None
    masks: int
    rule: str
    last: bool = False
    shadow: Span | None = None

    @property
    def tokens(self) -> int:
        """Query tokens of this entry."""
        extra = 0 if self.shadow is None else self.shadow.q_len
        return self.span.q_len * (2 if self.uncond else 1) + extra

    @property
    def head_rows(self) -> int:
        """LM-head rows, without unconditional twins."""
        return self.masks if self.shadow is None else self.span.blk_len

    @property
    def logit_rows(self) -> int:
        """Rows that go through the LM head."""
        return self.head_rows * (2 if self.uncond else 1)


@dataclass(frozen=True)
class StepPlan:
    """The whole contract between the scheduler and the runner for one forward pass.

    Entries with guidance come last; their unconditional spans follow all other spans, in
    the same order. So span i of the first ``len(entries)`` belongs to entry i. Entries with a
    shadow come just before those; the shadows are the last spans.
    """

    entries: tuple[StepEntry, ...]

    @property
    def spans(self) -> tuple[Span, ...]:
        """Conditional spans in entry order, then the unconditional ones, then shadows."""
        first = tuple(e.span for e in self.entries)
        twins = tuple(e.uncond for e in self.entries if e.uncond is not None)
        return first + twins + tuple(e.shadow for e in self.entries if e.shadow is not None)

    @property
    def guided(self) -> int:
        """Number of entries with classifier-free guidance (they are last)."""
        return sum(e.uncond is not None for e in self.entries)

    @property
    def tokens(self) -> int:
        """Query tokens of the step."""
        return sum(e.tokens for e in self.entries)

    def validate(self, max_model_len: int) -> None:
        """Raise ValueError if the plan breaks its own contract (a bug, never user input)."""
        kinds = [(e.uncond is not None, e.shadow is not None) for e in self.entries]
        if kinds != sorted(kinds):
            raise ValueError("entries with guidance must come last, those with a shadow before")
        rows = [s.row for s in self.spans if s.write != Write.SHADOW]
        if len(set(rows)) != len(rows):
            raise ValueError(f"a row appears twice in one plan: {rows}")
        for span in self.spans:
            if span.q_len < 1 or span.q_start < 0 or span.q_start + span.reach > max_model_len:
                raise ValueError(f"query range outside the canvas: {span}")
            if span.blk_off < 0 or span.blk_off + span.blk_len > span.reach:
                raise ValueError(f"block outside the query range: {span}")
            if span.pick and (span.write != Write.FIRST or not span.q_len <= span.pick):
                raise ValueError(f"bad choice of queries: {span}")
            if span.write not in tuple(Write) or span.keep < 0 or span.ctx_len < 0:
                raise ValueError(f"bad write mode, keep or ctx_len: {span}")
        for entry in self.entries:
            if not 0 <= entry.masks <= entry.span.blk_len:
                raise ValueError(f"{entry.masks} masks in a block of {entry.span.blk_len}")
