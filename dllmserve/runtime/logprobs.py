"""Log-probabilities of a step, on their way from the LM-head rows to the answers of requests."""

from __future__ import annotations

import torch
from torch import Tensor

from dllmserve.core.plan import StepPlan
from dllmserve.decoding.logprobs import Wanted
from dllmserve.decoding.rule import Update
from dllmserve.runtime.inputs import entry_fields
from dllmserve.runtime.platform import host_room, to_host
from dllmserve.runtime.shape import ENTRY_FIELDS, SPAN_FIELDS, EntryField, Packing, StepShape
from dllmserve.runtime.state_table import StateTable
from dllmserve.runtime.tensors import HeadCells, StepOutputs


def head_rows_of(packing: Packing, entry: int) -> tuple[int, int]:
    """The first LM-head row of an entry of the layout, and their number."""
    start = packing.shape.spans * SPAN_FIELDS + entry * ENTRY_FIELDS
    return packing.ints[start + EntryField.FIRST_ROW], packing.ints[start + EntryField.ROWS]


def candidate_ids(
    plan: StepPlan, packing: Packing, table: StateTable, cells: HeadCells | None
) -> Tensor | None:
    """Ids whose log-probabilities are wanted of each LM-head row: [M, C] int64, -1 for none.

    Put together entry by entry, so such steps are no CUDA graphs. None if nobody wants any.
    """
    shape = packing.shape
    if not shape.candidates or cells is None:
        return None
    size = (shape.rows, shape.candidates)
    found = torch.full(size, -1, dtype=torch.int64, device=table.device)
    for index, entry in zip(packing.indices, plan.entries, strict=False):
        row, (first, count) = entry.span.row, head_rows_of(packing, index)
        own = table.candidates.get(row)
        if own is not None and count:
            # blocks may begin with given tokens, before the first position to fill
            place = cells.column[first : first + count] + entry.span.blk_start
            place = (place - table.host[row].start).clamp(0, len(own) - 1)
            found[first : first + count, : own.shape[1]] = own[place]
    return found


def tokens_of(update: Update, packed: Tensor, shape: StepShape, cells: HeadCells) -> Tensor:
    """The token that a rule leaves at the position of each LM-head row: [M] int64."""
    first = entry_fields(packed, shape)[:, EntryField.FIRST_ROW].contiguous()
    index = torch.arange(shape.rows, dtype=first.dtype, device=first.device)
    # of entries that begin at the same row all but the last are empty
    entry = torch.searchsorted(first, index, right=True) - 1
    return update.tokens[entry, cells.column.clamp(max=update.tokens.shape[1] - 1)]


class LogprobReport:
    """What a step finds out of log-probabilities, copied to the host beside its report.

    Made before the step is launched, like :class:`dllmserve.runtime.runner.StepHandle`.
    """

    def __init__(self, packing: Packing, device: torch.device) -> None:
        self._packing = packing
        shape = packing.shape
        #: of each segment that wants some: its first row, and what it wants
        self._segments: list[tuple[int, int, Wanted]] = []
        first = 0
        for segment in shape.segments:
            if segment.wanted is not None:
                self._segments.append((first, segment.rows, segment.wanted))
            first += segment.rows
        self._rooms = [
            host_room(torch.empty(n, wanted.columns, dtype=torch.float64, device="meta"), device)
            for _, n, wanted in self._segments
        ]
        like = torch.empty(shape.entries, shape.width, dtype=torch.int8, device="meta")
        self._heads_room = host_room(like, device) if self._segments else None
        self._values: list[Tensor] = []
        self._heads: Tensor | None = None

    def launched(self, outputs: StepOutputs) -> None:
        """Start the copies."""
        pairs = zip(outputs.logprobs, self._rooms, strict=True)
        self._values = [to_host(values, room) for values, room in pairs]
        if outputs.heads is not None:
            self._heads = to_host(outputs.heads, self._heads_room)

    def of(self, entry: int) -> tuple[Tensor, Tensor, Wanted] | None:
        """What the step has to say of an entry of the layout; the host has waited for it.

        Returns:
            The columns [k] int64 of its block that were masked, what is known of each:
            [k, columns] float64 as in :func:`dllmserve.decoding.logprobs.row_logprobs`, and what
            the columns are. None if the entry decides nothing, or nobody asked.
        """
        row, count = head_rows_of(self._packing, entry)
        for (first, rows, wanted), values in zip(self._segments, self._values, strict=True):
            if self._heads is not None and count and first <= row < first + rows:
                heads = self._heads[entry]
                columns = heads.nonzero()[:count, 0]
                masked = heads[columns] == 1
                own = values[row - first : row - first + len(columns)]
                return columns[masked], own[masked], wanted
        return None
