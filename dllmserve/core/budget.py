"""Limits: what one step may hold, and what the device's memory is spent on."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1024**3


@dataclass
class StepBudget:
    """What is left of one step while the scheduler packs it.

    Attributes:
        tokens: query tokens (max_num_batched_tokens).
        logit_rows: LM-head rows, soft: one entry always fits an empty step, because the
            head runs in chunks whatever the number of rows.
        rows: rows of the state table.
    """

    tokens: int
    logit_rows: int
    rows: int
    empty: bool = True

    def take(self, tokens: int, logit_rows: int, rows: int) -> bool:
        """Take a share if it fits; return whether it did."""
        fits = tokens <= self.tokens and rows <= self.rows
        if not fits or (logit_rows > self.logit_rows and not self.empty):
            return False
        self.tokens -= tokens
        self.logit_rows -= logit_rows
        self.rows -= rows
        self.empty = False
        return True


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """Bytes of each part: ``weights + activations + logits + tables + pages = planned``.

    Attributes:
        total: bytes of the device.
        free: bytes that nobody else used when the plan was made.
        utilization: share of ``total`` that the engine may use.
        weights, activations, logits, tables, pages: bytes of each part.
    """

    total: int
    free: int
    utilization: float
    weights: int
    activations: int
    logits: int
    tables: int
    pages: int

    @property
    def planned(self) -> int:
        """Sum of all parts in bytes."""
        return self.weights + self.activations + self.logits + self.tables + self.pages

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
