"""The plan of one step: nine integers per span, and nothing else.

Every phase of every cache policy is a choice of these nine numbers, so the scheduler,
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


class Span(NamedTuple):
    """One request's share of a step.

    Queries are canvas positions ``q_start .. q_start + q_len - 1``. They attend to cached
    slots ``0 .. ctx_len - 1`` that this span does not overwrite, and to the span itself.
    LM-head rows are the masked ones among the ``blk_len`` positions that start at
    ``q_start + blk_off``.
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
        overwritten = self.write == Write.ALL and self.ctx_len <= self.q_len
        return self.q_start == 0 and (self.ctx_len == 0 or overwritten)

    @property
    def selects(self) -> bool:
        """True if the span keeps a selection of its tokens."""
        return self.write >= Write.SELECT_PER_HEAD


@dataclass(frozen=True)
class StepEntry:
    """A span with what the rule needs to know about it on the host.

    Attributes:
        span: the conditional (or only) span.
        uncond: the same span on the row whose prompt is masked (cfg_scale > 0), or None.
        masks: masked positions in the block, which is the number of LM-head rows.
        rule: name of the unmask rule.
        last: True if the request's answer is known to be complete after this step.
    """

    span: Span
    uncond: Span | None
    masks: int
    rule: str
    last: bool = False

    @property
    def tokens(self) -> int:
        """Query tokens of this entry."""
        return self.span.q_len * (2 if self.uncond else 1)

    @property
    def logit_rows(self) -> int:
        """Rows that go through the LM head."""
        return self.masks * (2 if self.uncond else 1)


@dataclass(frozen=True)
class StepPlan:
    """The whole contract between the scheduler and the runner for one forward pass.

    Entries with guidance come last; their unconditional spans follow all other spans, in
    the same order. So span i of the first ``len(entries)`` belongs to entry i.
    """

    entries: tuple[StepEntry, ...]

    @property
    def spans(self) -> tuple[Span, ...]:
        """Conditional spans in entry order, then the unconditional ones."""
        first = tuple(e.span for e in self.entries)
        return first + tuple(e.uncond for e in self.entries if e.uncond is not None)

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
        guided = [e.uncond is not None for e in self.entries]
        if guided != sorted(guided):
            raise ValueError("entries with guidance must come last")
        rows = [s.row for s in self.spans]
        if len(set(rows)) != len(rows):
            raise ValueError(f"a row appears twice in one plan: {rows}")
        for span in self.spans:
            if span.q_len < 1 or span.q_start < 0 or span.q_start + span.q_len > max_model_len:
                raise ValueError(f"query range outside the canvas: {span}")
            if span.blk_off < 0 or span.blk_off + span.blk_len > span.q_len:
                raise ValueError(f"block outside the query range: {span}")
            if span.write not in tuple(Write) or span.keep < 0 or span.ctx_len < 0:
                raise ValueError(f"bad write mode, keep or ctx_len: {span}")
        for entry in self.entries:
            if not 0 <= entry.masks <= entry.span.blk_len:
                raise ValueError(f"{entry.masks} masks in a block of {entry.span.blk_len}")
