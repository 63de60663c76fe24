"""What either twin of a step's work gives the model and the LM head, and leaves for the host."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dllmserve.decoding.stats import RowParams

#: columns of a report, the numbers of :class:`dllmserve.core.plan.EntryReport`
REPORT_FIELDS = 6


@dataclass(frozen=True)
class HeadCells:
    """Whose the M LM-head rows of a step are.

    Attributes:
        row: [M] int64, row of the state table; the trash row for padding.
        column: [M] int64, index in the block.
        step: [M] int64, forwards that the block has had; 0 for padding, of which nothing is kept.
        forward: [M] int64, forwards that the request has had.
        real: [M] bool, False for padding.
        left: [M] int64, what the model is given one place to the left, the mask id for a mask; None
            if no edit reads it.
    """

    row: Tensor
    column: Tensor
    step: Tensor
    forward: Tensor
    real: Tensor
    left: Tensor | None = None

    @property
    def entering(self) -> Tensor:
        """Whether this is the block's first forward: [M] bool."""
        return self.step == 0


@dataclass(frozen=True)
class StepTensors:
    """What the model and the LM head read: N tokens, S spans, M LM-head rows.

    Attributes:
        ids, positions: [N] int64.
        starts: [S] int32, first packed token of each span.
        head_rows: [M] int64, index into ids of the hidden state of each LM-head row.
        head_uncond: [m] int64, the same on the unconditional side, for the last m rows.
        cfg_scale: [M] float64.
        row_params: parameters of the M rows.
        cells: whose the M rows are; None if nothing of them is kept between forwards.
        owners: [N] int64, span of each token, S for padding; None likewise.
    """

    ids: Tensor
    positions: Tensor
    starts: Tensor
    head_rows: Tensor
    head_uncond: Tensor
    cfg_scale: Tensor
    row_params: RowParams
    cells: HeadCells | None = None
    owners: Tensor | None = None


@dataclass(frozen=True)
class StepOutputs:
    """What a step leaves on the device for the host.

    Attributes:
        report: [n, REPORT_FIELDS] int64, see :class:`dllmserve.core.plan.EntryReport`.
        tokens: [n, W] int64, proposals.
        confidence: [n, W] float64, -inf where nothing was proposed but what stands there.
        logprobs: [rows, columns] float64 of each segment that wants log-probabilities.
        heads: [n, W] int8, whose its LM-head rows are, in order: 1 a masked position's, 2 a written
            one's that is scored or stays, 0 none's; that of one that is edited counts as a masked
            one's. None if no segment wants log-probabilities.
        holds: [n, A] int64, what answers of constrained entries hold, see
            :class:`dllmserve.core.plan.EntryReport`; None if the step has none.
        edits: [n, W] bool, written tokens that were replaced; None if none may be.
    """

    report: Tensor
    tokens: Tensor
    confidence: Tensor
    logprobs: tuple[Tensor, ...] = ()
    heads: Tensor | None = None
    holds: Tensor | None = None
    edits: Tensor | None = None
