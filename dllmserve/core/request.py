"""Request: the host record of one job, and how far it has come."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from dllmserve._values import SparseConfig
from dllmserve.catalog import RULES
from dllmserve.core.schedule import block_lengths, block_quotas
from dllmserve.sampling_params import SamplingParams


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
        end: answer position of the first end id that stands anywhere, as last reported; -1
            without one.
        seen: canvas positions that the block's first forward sees.
        seen_before: canvas positions that any forward of earlier blocks has seen.
    """

    block: int = 0
    step_in_block: int = 0
    masks_left: int = 0
    forwards: int = 0
    frontier: int = 0
    wrote: int = 0
    end: int = -1
    seen: int = 0
    seen_before: int = 0


@dataclass(eq=False)
class Request:
    """Host record of one job. It holds no tensors.

    ``row``, ``uncond_row``, ``pages`` and ``history`` are set by the scheduler at admission;
    ``error`` and ``finish_reason`` when the request ends. ``assumed`` holds the masks that
    each forward launched ahead of its report is expected to leave in its block. ``watch``
    asks for a canvas after every step, ``stream`` for the ids that join the committed prefix.
    ``owner`` is a short name of whose it is: owners are served in turns, and those with a name
    leave room for others; "" is somebody who has the engine alone.
    """

    id: int
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    watch: bool = False
    stream: bool = False
    owner: str = ""
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
    assumed: deque[int] = field(default_factory=deque)
    blocks: tuple[int, ...] = ()
    quotas: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        self.blocks = block_lengths(self.params.gen_length, self.block_length)
        if self.params.unmask == "steps":
            self.quotas = block_quotas(
                self.blocks, self.params.steps, self.params.schedule, self.params.eps
            )
        self.progress.masks_left = self.blocks[0]
        self.progress.seen = self.visible

    @property
    def block_length(self) -> int:
        """Diffusion block length in tokens; the last block may be shorter."""
        return self.params.resolved_block_length

    @property
    def sparse(self) -> SparseConfig | None:
        """Settings of sparse attention."""
        return self.params.sparse

    @property
    def policy(self) -> str:
        """Name of the cache policy."""
        return self.params.policy

    @property
    def predictable(self) -> bool:
        """True if the host knows each step's outcome (but for an early end) beforehand."""
        free = not self.watch and not self.params.stop_strings and not self.params.early_end
        return bool(self.quotas) and free

    @property
    def revokes(self) -> bool:
        """True if the rule may mask written positions again."""
        return RULES[self.params.unmask].revokes

    @property
    def shadow_len(self) -> int:
        """Most tokens of a shadow that a forward of the request computes beside the canvas."""
        return max(self.blocks) if self.revokes else 0

    @property
    def history_needed(self) -> int:
        """Distributions that the rule keeps: one for each position of a block, or none."""
        return max(self.blocks) if RULES[self.params.unmask].compares else 0

    @property
    def launched(self) -> bool:
        """True if every forward has been launched; some reports may be outstanding."""
        return self.progress.block == len(self.blocks)

    @property
    def reported_forwards(self) -> int:
        """Forwards whose reports have arrived."""
        return self.progress.forwards - len(self.assumed)

    @property
    def quota(self) -> int:
        """Tokens that the next forward of a fixed schedule writes."""
        return self.quotas[self.progress.block][self.progress.step_in_block]

    @property
    def guided(self) -> bool:
        """True if the request runs a second, unconditional row."""
        return self.params.cfg_scale > 0

    @property
    def rows_needed(self) -> int:
        """Rows of the state table that the request takes."""
        return 2 if self.guided else 1

    @property
    def prompt_len(self) -> int:
        """Prompt tokens."""
        return len(self.prompt_ids)

    @property
    def canvas_len(self) -> int:
        """Prompt and answer together, in tokens."""
        return len(self.prompt_ids) + self.params.gen_length

    @property
    def visible(self) -> int:
        """Canvas positions that the active block's next forward sees.

        All of them, unless masks far behind the block are left out (``suffix_window``) or the
        answer is known to end before (``early_end``).
        """
        length, window = self.canvas_len, self.params.suffix_window
        block = min(self.progress.block, len(self.blocks) - 1)
        _, end = self.block_range(block)
        if window is not None:
            length = min(length, end + window)
        if self.params.early_end and self.progress.end >= 0:
            length = min(length, end)  # an end id is never written behind the active block
        return length

    def block_range(self, block: int) -> tuple[int, int]:
        """Canvas positions ``[start, end)`` of a block."""
        start = self.prompt_len + block * self.block_length
        return start, start + self.blocks[block]
