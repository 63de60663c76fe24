"""From packed spans to token ids, positions and LM-head rows, without a host sync.

Everything here has a size that the step's shape fixes, so it can be part of a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllmserve.core.plan import Mask, Part, SpanField
from dllmserve.decoding.rule import rank_of
from dllmserve.runtime.shape import ENTRY_FIELDS, SPAN_FIELDS, EntryField, StepShape
from dllmserve.runtime.state_table import StateTable
from dllmserve.runtime.tensors import HeadCells, StepTensors

_QUERIES = (SpanField.ROW, SpanField.Q_START, SpanField.Q_LEN)


@dataclass(frozen=True)
class StepInputs:
    """Device tensors of one step: n entries, S spans, N tokens, M LM-head rows, blocks up to W.

    Attributes:
        starts: [S] int64, first packed token of each span.
        ids, positions: [N] int64.
        owners: [N] int64, span of each token; S for padding.
        rows: [n] int64, row of each entry; the trash row for padding.
        uncond_rows: [g] int64, unconditional rows of the last g entries.
        block: [n, W] int64, canvas positions of the block; the trash column where the
            block is shorter than W.
        eligible: [n, W] bool, masked block positions.
        step: [n] int64, forwards that the block has had.
        quota: [n] int64, tokens that a schedule writes.
        fills: [n] bool, whether the forward decides tokens.
        scored: [n, W] bool, written block positions whose tokens are scored.
        editable: [n, W] bool, written block positions for which another token is proposed; None if
            the step has no entry that may edit.
        head_rows: [M] int64, index into ids of the hidden state of each LM-head row.
        head_uncond: [m] int64, the same on the unconditional side, for the last m rows.
        head_cells: [M] int64, index into the flattened [n, W] block of each LM-head row.
            Padding rows repeat the first cell of their segment.
        head_real: [M] bool, False for padding rows.
    """

    starts: Tensor
    ids: Tensor
    positions: Tensor
    owners: Tensor
    rows: Tensor
    uncond_rows: Tensor
    block: Tensor
    eligible: Tensor
    step: Tensor
    quota: Tensor
    fills: Tensor
    scored: Tensor
    editable: Tensor | None
    head_rows: Tensor
    head_uncond: Tensor
    head_cells: Tensor
    head_real: Tensor


def span_fields(packed: Tensor, shape: StepShape) -> Tensor:
    """[S, len(SpanField)] int32, the spans at the start of a packing."""
    return packed[: shape.spans * SPAN_FIELDS].view(shape.spans, SPAN_FIELDS)


def entry_fields(packed: Tensor, shape: StepShape) -> Tensor:
    """[n, len(EntryField)] int32, the entries behind the spans of a packing."""
    start = shape.spans * SPAN_FIELDS
    return packed[start : start + shape.entries * ENTRY_FIELDS].view(-1, ENTRY_FIELDS)


def build_inputs(
    packed: Tensor,  # [..] int32, Packing.ints; it may be longer
    shape: StepShape,
    table: StateTable,
    mask_id: int | None,
    logit_shift: int,
) -> StepInputs:
    """Gather a step's inputs from the state table; see :func:`_fed` for the mask id."""
    wide, entries = span_fields(packed, shape).long(), entry_fields(packed, shape)
    row, q_start, q_len = (wide[:, column] for column in _QUERIES)
    ends = q_len.cumsum(0)
    starts = ends - q_len  # first packed token of each span
    token = torch.arange(shape.tokens, device=table.device)
    owner = torch.searchsorted(ends, token, right=True)  # spans of length 0 own nothing
    padding = owner >= shape.spans
    owner = owner.clamp(max=shape.spans - 1)
    offset = token - starts[owner]
    order = choose_queries(wide, shape, table, logit_shift) if shape.pick else None
    if order is not None:
        offset = order.offset_of(owner, offset)
    positions = (offset + q_start[owner]).masked_fill(padding, 0)
    source = row[owner].masked_fill(padding, table.trash_row)
    blind = wide[owner, SpanField.MASK] == Mask.BLIND
    ids = _fed(table, source, positions, blind, mask_id)
    count = shape.entries
    block, eligible, scored, editable = _blocks(wide[:count], shape, table)
    read = eligible | scored if editable is None else eligible | scored | editable
    cells, real = _head_cells(read, shape)
    entry = cells // shape.width
    offset = _read_at(wide[entry], cells % shape.width, logit_shift)
    first_twin = len(cells) - shape.twins
    pair, above = entry[first_twin:] + shape.guided, offset[first_twin:]
    if order is not None:
        offset, above = order.query_of(entry, offset), order.query_of(pair, above)
    head_rows = starts[entry] + offset
    if shape.blind:
        # the position that is read
        position = block.flatten()[cells] - logit_shift
        blind = _blind_rows(wide, starts, entry, position, shape)
        head_rows = torch.where(scored.flatten()[cells], blind, head_rows)
    return StepInputs(
        starts=starts,
        ids=ids,
        positions=positions,
        owners=owner.masked_fill(padding, shape.spans),
        rows=row[:count],
        uncond_rows=row[count : count + shape.guided],
        block=block,
        eligible=eligible,
        step=entries[:, EntryField.STEP].long(),
        quota=entries[:, EntryField.QUOTA].long(),
        fills=wide[:count, SpanField.HEAD] != Part.NONE,
        scored=scored,
        editable=editable,
        head_rows=head_rows,
        head_uncond=starts[pair] + above,
        head_cells=cells,
        head_real=real,
    )


def _fed(
    table: StateTable, row: Tensor, position: Tensor, blind: Tensor, mask_id: int | None
) -> Tensor:
    """What the model is given [N] int64 at positions of rows: masked ones as the mask.

    Without a mask id it is given what they hold.
    """
    ids = table.tokens[row, position]
    if mask_id is None:
        return ids
    return ids.masked_fill(table.masked[row, position] | blind, mask_id)


def _blocks(
    spans: Tensor, shape: StepShape, table: StateTable
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``block``, ``eligible``, ``scored`` and ``editable`` of :class:`StepInputs`."""
    column = torch.arange(shape.width, device=table.device)
    row, head = spans[:, SpanField.ROW, None], spans[:, SpanField.HEAD, None]
    first = spans[:, SpanField.Q_START, None] + spans[:, SpanField.BLK_OFF, None]
    inside = column < spans[:, SpanField.BLK_LEN, None]
    block = torch.where(inside, first + column, table.max_len)
    eligible = table.masked[row, block] & inside
    written = inside & ~eligible
    editable = None
    if shape.replaces:
        editable = table.open[row, block] & written & (head == Part.OPEN)
    return block, eligible, written & (head == Part.BLOCK), editable


@dataclass(frozen=True)
class QueryOrder:
    """Which positions are the queries of spans that pick them; others keep theirs.

    Attributes:
        picks: [S, 1] bool, spans that pick.
        offsets: [S, C + 1] int64, offset from q_start of each query, in order.
        queries: [S, C] int64, number of the query at each offset.
    """

    picks: Tensor
    offsets: Tensor
    queries: Tensor

    def offset_of(self, span: Tensor, query: Tensor) -> Tensor:
        """Offsets from q_start [k] of queries number ``query`` [k] of spans [k]."""
        found = self.offsets[span, query.clamp(max=self.offsets.shape[1] - 1)]
        return torch.where(self.picks[span, 0], found, query)

    def query_of(self, span: Tensor, offset: Tensor) -> Tensor:
        """The inverse."""
        found = self.queries[span, offset.clamp(max=self.queries.shape[1] - 1)]
        return torch.where(self.picks[span, 0], found, offset)


def choose_queries(
    spans: Tensor,  # [S, len(SpanField)] int64
    shape: StepShape,
    table: StateTable,
    logit_shift: int,
) -> QueryOrder:
    """Choose the queries of spans with ``pick``: what they must compute, then the most stale."""
    row, q_start, q_len = (spans[:, column, None] for column in _QUERIES)
    start, pick = q_start + spans[:, SpanField.BLK_OFF, None], spans[:, SpanField.PICK, None]
    end = start + spans[:, SpanField.BLK_LEN, None]
    offset = torch.arange(shape.pick, device=table.device)
    valid = offset < pick
    position = torch.where(valid, q_start + offset, table.max_len)
    after = (position + logit_shift).clamp(max=table.max_len)
    inside = (position >= start) & (position < end)
    read = (after >= start) & (after < end)  # where a block position's logits come from
    masked = (table.masked[row, position] & inside) | (table.masked[row, after] & read)
    must = torch.where(spans[:, SpanField.MUST, None] == Part.BLOCK, inside | read, masked)
    key = torch.where(must, torch.inf, table.stale[row, position])
    key = torch.where(valid, key, -torch.inf)
    chosen = (rank_of(key) < q_len) & valid
    queries = chosen.cumsum(dim=-1) - 1
    offsets = torch.zeros(len(spans), shape.pick + 1, dtype=torch.int64, device=table.device)
    target = torch.where(chosen, queries, shape.pick)
    offsets.scatter_(1, target, offset.expand_as(target))
    return QueryOrder(pick > 0, offsets, queries.clamp(min=0))


def _read_at(spans: Tensor, column: Tensor, shift: int) -> Tensor:
    """Offsets from q_start [k] at which the logits of block columns [k] of spans [k] are read.

    What stands behind the last query is read at that one, whatever the shift.
    """
    last = torch.maximum(spans[:, SpanField.Q_LEN], spans[:, SpanField.PICK]) - 1
    return torch.minimum(spans[:, SpanField.BLK_OFF] + column - shift, last).clamp(min=0)


def _blind_rows(
    spans: Tensor, starts: Tensor, entry: Tensor, position: Tensor, shape: StepShape
) -> Tensor:
    """Packed tokens [k] of positions [k] in the blind spans of entries [k].

    Of an entry without a blind span it is some other token, which is not read.
    """
    span = (entry + 2 * shape.guided + shape.blind).clamp(max=shape.spans - 1)
    return starts[span] + (position - spans[span, SpanField.Q_START]).clamp(min=0)


def _head_cells(flags: Tensor, shape: StepShape) -> tuple[Tensor, Tensor]:
    """Cells of the LM-head rows, segment after segment, and which are real: [M] int64, [M] bool."""
    cells, real = [], []
    start = 0
    for segment in shape.segments:
        end = start + segment.entries
        own = flags[start:end].flatten()
        cells.append(compact(own, segment.rows) + start * shape.width)
        real.append(torch.arange(segment.rows, device=flags.device) < own.sum())
        start = end
    return torch.cat(cells), torch.cat(real)


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


def head_cells(
    packed: Tensor, shape: StepShape, table: StateTable, tensors: StepTensors, shift: int
) -> HeadCells:
    """Whose LM-head rows a step's are, from what the host knows of them."""
    spans, entries = span_fields(packed, shape).long(), entry_fields(packed, shape)
    index = torch.arange(shape.rows, dtype=torch.int32, device=packed.device)
    # of entries that begin at the same row all but the last are empty
    first = entries[:, EntryField.FIRST_ROW].contiguous()
    entry = torch.searchsorted(first, index, right=True) - 1
    last_row = (first + entries[:, EntryField.ROWS]).index_select(0, entry)
    real, own = index < last_row, spans.index_select(0, entry)
    block = own[:, SpanField.Q_START] + own[:, SpanField.BLK_OFF]
    row = own[:, SpanField.ROW].masked_fill(~real, table.trash_row)
    column = (tensors.positions[tensors.head_rows] + shift - block).clamp(min=0)
    if shift:  # position 0 has nothing before it: it is read where position 1 is
        at_start = (index == first.index_select(0, entry)) & (block == 0)
        edits = table.open[row, 0] & (own[:, SpanField.HEAD] == Part.OPEN)
        column = column.masked_fill(at_start & (table.masked[row, 0] | edits), 0)
    return HeadCells(
        row=row,
        column=column,
        step=entries[:, EntryField.STEP].index_select(0, entry).long().masked_fill(~real, 0),
        forward=table.forwards[row],
        real=real,
    )
