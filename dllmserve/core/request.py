"""Request: the host record of one job, and how far it has come."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from dllmserve._values import SparseConfig
from dllmserve.catalog import CACHES, EDITS, RULES
from dllmserve.constraints.compiled import Compiled
from dllmserve.core.canvas import Canvas, Range
from dllmserve.core.prefix import Prefix
from dllmserve.core.schedule import block_quotas, window_split
from dllmserve.holes import Holes
from dllmserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from dllmserve.constraints.grammar import TokenGrammar


class Region(NamedTuple):
    """Canvas positions ``[start, end)`` whose text has to match a grammar."""

    start: int
    end: int
    compiled: Compiled

    @property
    def grammar(self) -> TokenGrammar:
        """The grammar."""
        return self.compiled.grammar


class Forced(NamedTuple):
    """A token that had to stand where it does, and the step that would have written it."""

    token: int
    step: int


class Status(Enum):
    """Life of a request."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"


@dataclass
class Progress:
    """Where a request stands. Written by the scheduler alone.

    All but ``frontier`` count forwards that were launched ahead of their reports.

    Attributes:
        block: index of the active block.
        step_in_block: forwards already run for the active block.
        masks_left: masked positions of the active block.
        forwards: forwards already run for the request; also the noise counter.
        frontier: answer positions unmasked without a gap, from the left, as last reported.
        wrote: positions that the block's last forward wrote; 0 before the first.
        edit_steps: forwards of the block that began without masks, for edits alone.
        edits: tokens that all forwards have replaced.
        end: answer position of the first end id that stands anywhere, as last reported; -1
            without one.
        scheduled: of the schedule of the active block, what is done: forwards that were run, and
            those whose outcome was known.
        eos: answer position of the end id before the frontier, as last reported; -1 without one.
        seen: canvas positions that the block's first forward sees.
        seen_before: canvas positions that any forward of earlier blocks has seen.
        stored: canvas positions whose K,V are final, of a request that grows.
        storing: what ``stored`` will be after the forward that was planned last; 0 if that one
            stores nothing that stays.
        deciding: whether that one decides tokens.
    """

    block: int = 0
    step_in_block: int = 0
    masks_left: int = 0
    forwards: int = 0
    frontier: int = 0
    wrote: int = 0
    edit_steps: int = 0
    edits: int = 0
    end: int = -1
    eos: int = -1
    scheduled: int = 0
    seen: int = 0
    seen_before: int = 0
    stored: int = 0
    storing: int = 0
    deciding: bool = True


@dataclass(eq=False)
class Request:
    """Host record of one job. It holds no tensors.

    What a step asks of every request, and what never changes, is worked out once.

    ``row``, ``uncond_row``, ``pages``, ``history`` and ``prefix`` (None where K,V cannot be shared)
    are set by the scheduler, ``error`` and ``finish_reason`` when the request ends. ``sent`` pages
    of a row are in the page table, ``preempted`` counts how often its pages were taken.
    ``assumed`` holds the masks that each forward launched ahead of its report is expected to leave
    in its block; None for one that decides nothing. ``watch``
    asks for a canvas after every step, ``trace`` for what each forward decided, with the output,
    ``stream`` for the ids that join the committed prefix.
    ``candidates`` are ids whose log-probabilities are wanted, one tuple for each position to fill.
    ``grammars`` say what the answer, or each of the holes, has to match, ``regions`` where that is.
    ``forced`` tokens of canvas positions were written by the host, the first end id among them at
    answer position ``forced_end``; those that are ``unsent`` are not on the device yet.
    ``foreseen`` has, for each step of the schedule whose outcome was known without a forward, the
    forwards that were run before it.
    ``holes`` are those of a template; the canvas's are then the same, where they touch as one.
    ``owner`` is a short name of whose it is: owners are served in turns, and those with a name
    leave room for others; "" is somebody who has the engine alone.
    """

    id: int
    canvas: Canvas
    params: SamplingParams
    seed: int
    watch: bool = False
    stream: bool = False
    owner: str = ""
    grammars: tuple[Compiled | None, ...] = ()
    regions: tuple[Region, ...] = ()
    candidates: tuple[tuple[int, ...], ...] = ()
    trace: bool = False
    holes: Holes = ()
    status: Status = Status.WAITING
    progress: Progress = field(default_factory=Progress)
    row: int = -1
    uncond_row: int = -1
    pages: list[int] = field(default_factory=list)
    uncond_pages: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    last_step: int = -1
    skipped: int = 0
    history: list[int] = field(default_factory=list)
    sent: int = 0
    preempted: int = 0
    prefix: Prefix | None = None
    assumed: deque[int | None] = field(default_factory=deque)
    forced: dict[int, Forced] = field(default_factory=dict)
    forced_end: int = -1
    unsent: dict[int, Forced] = field(default_factory=dict)
    foreseen: list[int] = field(default_factory=list)
    masks: tuple[int, ...] = ()
    quotas: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        params = self.params
        self.masks = self.canvas.masks
        self._num_blocks = len(self.blocks)
        if RULES[params.unmask].quota:
            self.quotas = self._schedule()
        self.progress.masks_left = self.masks[0]
        self.progress.seen = self.visible

    def _schedule(self) -> tuple[tuple[int, ...], ...]:
        """Tokens that each forward of each block writes, or writes at least."""
        params, whole = self.params, self.canvas.quota_len
        steps = params.steps_per_block or self.canvas.unit
        if whole:
            return tuple(window_split(n, whole, steps) for n in self.masks)
        total = steps * len(self.masks) or params.steps
        return block_quotas(self.masks, total, params.schedule, params.eps)

    def begin_block(self, masks: int) -> None:
        """Note how many positions of the active block are open when it begins."""
        index = self.progress.block
        if self.masks[index] != masks:
            self.masks = (*self.masks[:index], masks, *self.masks[index + 1 :])
            if self.quotas:
                self.quotas = self._schedule()

    def leave_block(self) -> None:
        """Go on to the next block: all of the active one is written."""
        progress = self.progress
        progress.block += 1
        progress.step_in_block = progress.scheduled = progress.wrote = progress.edit_steps = 0
        if not self.launched:
            progress.masks_left = self.masks[progress.block]
            progress.seen_before = max(progress.seen_before, progress.seen)
            progress.seen = self.visible

    def forward_done(self, masks_left: int, edits: int) -> None:
        """Note a forward that decided tokens of the active block, and go on if that is final.

        A block that may be edited is final when a forward that began without masks has changed
        nothing, or was the last one that may.

        Args:
            masks_left: in the block.
            edits: tokens that it replaced.
        """
        progress, before = self.progress, self.progress.masks_left
        progress.forwards += 1
        progress.step_in_block += 1
        progress.scheduled += 1
        progress.wrote = max(before - masks_left, 0)
        progress.masks_left = masks_left
        progress.edits += edits
        if not self.params.edits:
            final = masks_left == 0
        else:
            progress.edit_steps += before == 0
            spent = progress.edit_steps >= self.params.max_edit_steps
            final = masks_left == 0 and (spent or (before == 0 and edits == 0))
        if final:
            self.leave_block()

    @property
    def settled(self) -> int:
        """Positions from the answer's start on that no forward will edit."""
        if self.launched:
            return self.canvas.end - self.canvas.start
        return max(self.blocks[self.progress.block][0] - self.canvas.start, 0)

    def with_forced(self, ids: list[int], first: int = 0) -> list[int]:
        """Ids of the answer from position ``first`` on, with those that the host wrote."""
        start = self.canvas.start + first
        for position, forced in self.forced.items():
            if 0 <= position - start < len(ids):
                ids[position - start] = forced.token
        return ids

    def steps_of(self, forwards: list[int]) -> list[int]:
        """Steps, from 1, that wrote the answer's first positions, from the forwards that did.

        A step whose outcome was known counts, though no forward was run for it.
        """
        steps = [f + bisect_left(self.foreseen, f) for f in forwards]
        for position, forced in self.forced.items():
            if position - self.canvas.start < len(steps):
                steps[position - self.canvas.start] = forced.step
        return steps

    @property
    def prompt_ids(self) -> list[int]:
        """Given tokens; what they are in holes does not matter."""
        return list(self.canvas.ids)

    @property
    def ends_from(self) -> int:
        """Answer position from which on an end id ends the answer; its length if none does.

        In a template that is the last hole, if it may end early. What is written before it is
        complete when its end is known.
        """
        if not self.holes:
            return 0
        start, hole = self.holes[-1]
        return (start if hole.may_end else self.canvas.end) - self.canvas.start

    @property
    def blocks(self) -> tuple[Range, ...]:
        """Canvas positions ``[start, end)`` of each block."""
        return self.canvas.blocks

    @property
    def sparse(self) -> SparseConfig | None:
        """Settings of sparse attention."""
        return self.params.sparse

    @cached_property
    def policy(self) -> str:
        """Name of the cache policy; block-causal models have policies of their own."""
        named = self.params.policy
        return named if CACHES[named].windowed or not self.canvas.window else "paged"

    @cached_property
    def predictable(self) -> bool:
        """True if the host knows each step's outcome (but for an early end) beforehand."""
        seen = self.watch or self.trace or self.regions
        free = not seen and not self.params.stop_strings and not self.params.early_end
        exact = RULES[self.params.unmask].quota == "exact" and not CACHES[self.policy].follows
        return exact and free

    @cached_property
    def revokes(self) -> bool:
        """True if the rule may mask written positions again."""
        return RULES[self.params.unmask].revokes

    @cached_property
    def noise(self) -> bool:
        """True if its blocks are canvases of noise, each written at once by its last forward."""
        return RULES[self.params.unmask].noise

    @cached_property
    def grows(self) -> bool:
        """True if it gets pages as it stores K,V, and may have to compute them anew."""
        return CACHES[self.policy].grows

    @property
    def blind_len(self) -> int:
        """Most tokens of a blind span that a forward of the request computes beside the canvas."""
        return self.longest_block if self.revokes else 0

    @cached_property
    def longest_block(self) -> int:
        """Positions of the longest block."""
        return max(end - start for start, end in self.blocks)

    @property
    def history_needed(self) -> int:
        """Distributions that the rule keeps: one for each position of a block, or none."""
        return self.longest_block if RULES[self.params.unmask].compares else 0

    @property
    def launched(self) -> bool:
        """True if every forward has been launched; some reports may be outstanding."""
        return self.progress.block == self._num_blocks

    @property
    def reported_forwards(self) -> int:
        """Forwards that decide tokens whose reports have arrived."""
        return self.progress.forwards - sum(left is not None for left in self.assumed)

    @property
    def quota(self) -> int:
        """Tokens that the next forward of a schedule writes, or writes at least; 0 without one."""
        if not self.quotas or self.launched:
            return 0
        block = self.quotas[self.progress.block]
        return block[min(self.progress.scheduled, len(block) - 1)]

    @cached_property
    def guided(self) -> bool:
        """True if the request runs a second, unconditional row."""
        return self.params.cfg_scale > 0

    @cached_property
    def kind(self) -> tuple[object, ...]:
        """What requests have in common that a step computes together."""
        params = self.params
        filtered = params.top_k > 0 or params.top_p < 1
        biased = bool(params.logit_bias) or params.logits_eos_inf
        wants = params.logprobs is not None or bool(self.candidates)
        edits = sorted(RULES[params.unmask].needs & {*EDITS})
        sampled = params.temperature > 0
        needs = (sampled, filtered, params.confidence_eos_eot_inf, wants)
        return (biased, params.penalty_lambda > 0, bool(self.regions), edits, *needs)

    @cached_property
    def rows_needed(self) -> int:
        """Rows of the state table that the request takes."""
        return 2 if self.guided else 1

    @property
    def prompt_len(self) -> int:
        """Given tokens."""
        return self.canvas.given

    @cached_property
    def canvas_len(self) -> int:
        """Prompt and answer together, in tokens."""
        return len(self.canvas)

    @property
    def visible(self) -> int:
        """Canvas positions that the active block's next forward sees.

        All of them, unless masks far behind the block are left out (``suffix_window``) or the
        answer is known to end before (``early_end``) and what follows is left out.
        """
        length, window = self.canvas_len, self.params.suffix_window
        ends = self.params.early_end and not self.params.end_padding
        if window is None and not ends:
            return length
        block = min(self.progress.block, len(self.blocks) - 1)
        _, end = self.blocks[block]
        if window is not None:
            length = min(length, end + window)
        if ends and self.progress.end >= 0 and not self.holes:
            length = min(length, end)  # an end id is never written behind the active block
        return length
