"""From packed spans to token ids, positions and LM-head rows, without a host sync.

Everything here has a size that the step's shape fixes, so it can be part of a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllmserve.runtime.shape import StepShape
from dllmserve.runtime.state_table import StateTable


@dataclass(frozen=True)
class StepInputs:
    """Device tensors of one step: n entries, S spans, N tokens, M LM-head rows, blocks up to W.

    Attributes:
        starts: [S] int64, first packed token of each span.
        ids, positions: [N] int64.
        rows: [n] int64, row of each entry; the trash row for padding.
        uncond_rows: [g] int64, unconditional rows of the last g entries.
        block: [n, W] int64, canvas positions of the block; the trash column where the
            block is shorter than W.
        eligible: [n, W] bool, masked block positions.
        head_rows: [M] int64, index into ids of the hidden state of each LM-head row.
        head_uncond: [m] int64, the same on the unconditional side, for the last m rows.
        head_cells: [M] int64, index into the flattened [n, W] block of each LM-head row.
            Padding rows repeat the first cell of their segment.
    """

    starts: Tensor
    ids: Tensor
    positions: Tensor
    rows: Tensor
    uncond_rows: Tensor
    block: Tensor
    eligible: Tensor
    head_rows: Tensor
    head_uncond: Tensor
    head_cells: Tensor


def build_inputs(
    spans: Tensor,  # [S, 9] int32
    shape: StepShape,
    table: StateTable,
    mask_id: int,
    logit_shift: int,
) -> StepInputs:
    """Gather a step's inputs from the state table."""
    device = table.device
    wide = spans.long()
    row, q_start, q_len = wide[:, 0], wide[:, 1], wide[:, 2]
    ends = q_len.cumsum(0)
    starts = ends - q_len  # first packed token of each span
    place = torch.arange(shape.tokens, device=device)
    owner = torch.searchsorted(ends, place, right=True)  # spans of length 0 own nothing
    padding = owner >= shape.spans
    owner = owner.clamp(max=shape.spans - 1)
    positions = (place - starts[owner] + q_start[owner]).masked_fill(padding, 0)
    source = row[owner].masked_fill(padding, table.trash_row)
    ids = table.tokens[source, positions].masked_fill(table.masked[source, positions], mask_id)

    count = shape.entries
    column = torch.arange(shape.width, device=device)
    inside = column < wide[:count, 7:8]  # blk_len
    first = (q_start + wide[:, 6])[:count, None]  # blk_off
    block = torch.where(inside, first + column, table.max_len)
    eligible = table.masked[row[:count, None], block] & inside
    cells = _head_cells(eligible, shape)
    entry = cells // shape.width
    offset = (wide[entry, 6] + cells % shape.width - logit_shift).clamp(min=0)
    twins = shape.twins
    pair = entry[len(cells) - twins :] + shape.guided
    return StepInputs(
        starts=starts,
        ids=ids,
        positions=positions,
        rows=row[:count],
        uncond_rows=row[count:],
        block=block,
        eligible=eligible,
        head_rows=starts[entry] + offset,
        head_uncond=starts[pair] + offset[len(cells) - twins :],
        head_cells=cells,
    )


def _head_cells(eligible: Tensor, shape: StepShape) -> Tensor:
    """Cells of the LM-head rows, segment after segment: [M] int64."""
    parts = []
    start = 0
    for segment in shape.segments:
        end = start + segment.entries
        parts.append(compact(eligible[start:end].flatten(), segment.rows) + start * shape.width)
        start = end
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def compact(flags: Tensor, count: int) -> Tensor:
    """Indices of the True flags [n] bool, of which the host knows there are at most ``count``.

    The same as ``flags.nonzero()``, which would wait for the device. Places without a flag
    hold 0.

    Returns:
        [count] int64.
    """
    target = (flags.cumsum(0) - 1).masked_fill(~flags, count)
    out = torch.zeros(count + 1, dtype=torch.int64, device=flags.device)
    out.scatter_(0, target, torch.arange(len(flags), device=flags.device))
    return out[:count]
