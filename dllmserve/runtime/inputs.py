"""From a plan to packed token ids, positions and LM-head rows, without a host sync."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllmserve.attention.backend import host_to_device
from dllmserve.core.plan import StepPlan
from dllmserve.runtime.state_table import StateTable


@dataclass(frozen=True)
class StepInputs:
    """Device tensors of one step: n entries, N tokens, M LM-head rows, blocks up to W.

    Attributes:
        ids, positions: [N] int64.
        rows: [n] int64, row of each entry.
        uncond_rows: [g] int64, unconditional rows of the last g entries.
        block: [n, W] int64, canvas positions of the block; the trash column where the
            block is shorter than W.
        eligible: [n, W] bool, masked block positions.
        head_rows: [M] int64, index into ids of the hidden state of each LM-head row.
        head_uncond: [m] int64, the same on the unconditional side, for the last m rows.
        head_cells: [M] int64, index into the flattened [n, W] block of each LM-head row.
    """

    ids: Tensor
    positions: Tensor
    rows: Tensor
    uncond_rows: Tensor
    block: Tensor
    eligible: Tensor
    head_rows: Tensor
    head_uncond: Tensor
    head_cells: Tensor


def build_inputs(plan: StepPlan, table: StateTable, mask_id: int, logit_shift: int) -> StepInputs:
    """Gather a step's inputs from the state table."""
    device = table.device
    spans = host_to_device(plan.pack(), device).view(-1, 9)  # the step's one copy
    row, q_start, q_len = spans[:, 0], spans[:, 1], spans[:, 2]
    total = plan.tokens
    starts = q_len.cumsum(0) - q_len  # first packed token of each span
    owner = torch.repeat_interleave(
        torch.arange(len(plan.spans), device=device), q_len, output_size=total
    )
    positions = torch.arange(total, device=device) - starts[owner] + q_start[owner]
    ids = table.tokens[row[owner], positions]
    ids = ids.masked_fill(table.masked[row[owner], positions], mask_id)

    count, guided = len(plan.entries), plan.guided
    width = max(e.span.blk_len for e in plan.entries)
    column = torch.arange(width, device=device)
    inside = column < spans[:count, 7:8]  # blk_len
    first = (q_start + spans[:, 6])[:count, None]  # blk_off
    block = torch.where(inside, first + column, table.max_len)
    eligible = table.masked[row[:count, None], block] & inside
    masks = [e.masks for e in plan.entries]
    cells = compact(eligible.flatten(), sum(masks))
    entry = cells // width
    offset = (spans[entry, 6] + cells % width - logit_shift).clamp(min=0)
    head_uncond = cells[:0]
    if guided:
        tail = sum(masks[count - guided :])
        pair = entry[len(cells) - tail :] + guided
        head_uncond = starts[pair] + offset[len(cells) - tail :]
    return StepInputs(
        ids=ids,
        positions=positions,
        rows=row[:count],
        uncond_rows=row[count:],
        block=block,
        eligible=eligible,
        head_rows=starts[entry] + offset,
        head_uncond=head_uncond,
        head_cells=cells,
    )


def compact(flags: Tensor, count: int) -> Tensor:
    """Indices of the True flags [n] bool, of which the host knows there are ``count``.

    The same as ``flags.nonzero()``, which would wait for the device.

    Returns:
        [count] int64.
    """
    target = (flags.cumsum(0) - 1).masked_fill(~flags, count)
    out = torch.zeros(count + 1, dtype=torch.int64, device=flags.device)
    out.scatter_(0, target, torch.arange(len(flags), device=flags.device))
    return out[:count]
