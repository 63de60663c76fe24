"""StepTensors: what either twin of a step's work gives the model and the LM head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dllmserve.decoding.stats import RowParams
from dllmserve.runtime.decide import HeadCells


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
