"""StepBudget and MemoryBudget: what one step may hold, and what memory is spent on."""

from __future__ import annotations

from dataclasses import dataclass, field

GIB = 1024**3
#: More tokens than any step holds.
NO_LIMIT = 2**31 - 1


@dataclass
class SoftLimit:
    """Tokens that are left for one kind of forward; the first of a step always fits."""

    tokens: int = NO_LIMIT
    used: bool = False

    def has(self, tokens: int) -> bool:
        """Whether there is room for so many."""
        return not self.used or tokens <= self.tokens

    def take(self, tokens: int) -> None:
        """Take them."""
        self.tokens, self.used = self.tokens - tokens, True


@dataclass
class StepBudget:
    """What is left of one step while the scheduler packs it.

    Attributes:
        tokens: query tokens (max_num_batched_tokens).
        logit_rows: LM-head rows, soft: one entry always fits an empty step, because the
            head runs in chunks whatever the number of rows.
        rows: rows of the state table.
        refreshes, stores: tokens that may be refreshes, or prompts that are stored.
        filling: names of the pages that the step fills.
    """

    tokens: int
    logit_rows: int
    rows: int
    refreshes: SoftLimit = field(default_factory=SoftLimit)
    stores: SoftLimit = field(default_factory=SoftLimit)
    filling: set[bytes] = field(default_factory=set)
    empty: bool = True

    def has(self, tokens: int, logit_rows: int, rows: int, limit: SoftLimit | None = None) -> bool:
        """Whether there is room for a share."""
        fits = tokens <= self.tokens and rows <= self.rows
        if not fits or (logit_rows > self.logit_rows and not self.empty):
            return False
        return limit is None or limit.has(tokens)

    def take(self, tokens: int, logit_rows: int, rows: int, limit: SoftLimit | None = None) -> bool:
        """Take a share if there is room for it; return whether there was."""
        if not self.has(tokens, logit_rows, rows, limit):
            return False
        if limit is not None:
            limit.take(tokens)
        self.tokens -= tokens
        self.logit_rows -= logit_rows
        self.rows -= rows
        self.empty = False
        return True


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """Bytes of each part; they add up to ``planned``.

    Attributes:
        total: bytes of the device.
        free: bytes that nobody else used when the plan was made.
        utilization: share of ``total`` that the engine may use.
        weights, activations, logits, tables, graphs, history, pages: bytes of each part;
            ``history`` is what rules keep of logits.
        measured: True if activations and graphs were measured, not worked out.
    """

    total: int
    free: int
    utilization: float
    weights: int
    activations: int
    logits: int
    tables: int
    pages: int
    graphs: int = 0
    history: int = 0
    measured: bool = False

    @property
    def fixed(self) -> int:
        """Everything but the pages, in bytes."""
        steps = self.activations + self.logits + self.graphs
        return self.weights + steps + self.tables + self.history

    @property
    def planned(self) -> int:
        """Sum of all parts in bytes."""
        return self.fixed + self.pages

    @property
    def allowed(self) -> int:
        """Bytes that the engine may use: its share, or what others have left."""
        return min(self._share, self.free)

    @property
    def _share(self) -> int:
        return int(self.total * self.utilization)

    def equation(self) -> str:
        """The budget as one line for people."""
        parts = (
            ("weights", self.weights),
            ("activations", self.activations),
            ("logits", self.logits),
            ("tables", self.tables),
            *([("history", self.history)] if self.history else []),
            *([("graphs", self.graphs)] if self.graphs else []),
            ("K,V pages", self.pages),
        )
        left = " + ".join(f"{name} {size_text(size)}" for name, size in parts)
        right = f"{size_text(self.total)} x {self.utilization:g}"
        if self.free < self._share:
            right = f"free memory of {size_text(self.total)}"
        return f"{left} = {size_text(self.planned)} of {right} = {size_text(self.allowed)}"


def size_text(size: int) -> str:
    """Bytes as text with a unit.

    Example:
        >>> size_text(3 * 1024**2)
        '3.0 MiB'
    """
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    return f"{size / 1024**2:.1f} MiB"
