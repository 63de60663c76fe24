"""What a step reads from the state table, in one launch: the twin of ``TorchStep.begin``.

The launch has programs of two kinds. One takes an entry, finds the positions of its block that
are masked, or may be edited, and writes their LM-head rows, whose places the host knows. The
other takes a tile of a span's tokens. Neither needs what the other writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllmserve import sampling_params
from dllmserve.core.plan import Part
from dllmserve.core.rows import IntField
from dllmserve.decoding.stats import RowParams
from dllmserve.kernels.noise import mix
from dllmserve.kernels.pages import BLK_LEN, BLK_OFF, FIELDS, HEAD, Q_LEN, Q_START, ROW
from dllmserve.runtime.shape import ENTRY_FIELDS, StepShape
from dllmserve.runtime.state_table import StateTable
from dllmserve.runtime.tensors import StepTensors

#: Columns of the state table.
FLOATS = tl.constexpr(len(sampling_params.FLOATS))
INTS = tl.constexpr(len(IntField))
_TEMPERATURE = tl.constexpr(sampling_params.FLOATS.index("temperature"))
_TOP_P = tl.constexpr(sampling_params.FLOATS.index("top_p"))
_CFG_SCALE = tl.constexpr(sampling_params.FLOATS.index("cfg_scale"))
_TOP_K = tl.constexpr(int(IntField.TOP_K))
_SEED = tl.constexpr(int(IntField.SEED))
_TEMPERED = tl.constexpr(int(IntField.TEMPERED))

_ENTRY = tl.constexpr(ENTRY_FIELDS)
OPEN_PART = tl.constexpr(int(Part.OPEN))

#: Tokens of one program, and spans whose lengths are added up at once.
_TOKENS, _SPANS = 256, 256


def block_tile(width: int) -> int:
    """Block positions that a program takes at once: of few sizes, since each is compiled."""
    return 128 if width <= 128 else 1024


@triton.jit
def head_rows_of(
    packed: tl.tensor, spans: tl.tensor, entry: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The entry's first LM-head row and their number, and the same of padding rows."""
    place = packed + spans * FIELDS + entry * _ENTRY
    return tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)


@triton.jit
def find_read(
    masked: tl.tensor,  # pointers to the block's first
    open_flags: tl.tensor,
    fields: tl.tensor,  # pointer to the span
    column: tl.tensor,
    length: tl.tensor,
    found: tl.tensor,
    REPLACES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Which columns are masked, and which have LM-head rows; of these, how many are before each.

    And how many there are so far.
    """
    hidden = tl.load(masked + column, mask=column < length, other=0) != 0
    read = hidden
    if REPLACES:
        may = tl.where(tl.load(fields + HEAD) == OPEN_PART, length, 0)
        read = hidden | (tl.load(open_flags + column, mask=column < may, other=0) != 0)
    ones = read.to(tl.int32)
    return hidden, read, found + tl.cumsum(ones, 0) - 1, found + tl.sum(ones, 0)


@triton.jit
def _start_of(packed: tl.tensor, span: tl.tensor, SPANS: tl.constexpr) -> tl.tensor:
    """First packed token of a span."""
    total = tl.zeros([SPANS], dtype=tl.int32)
    for low in range(0, span, SPANS):
        before = low + tl.arange(0, SPANS)
        total += tl.load(packed + before * FIELDS + Q_LEN, mask=before < span, other=0)
    return tl.sum(total, axis=0)


@triton.jit
def _gather_tokens(
    packed: tl.tensor,
    tokens: tl.tensor,
    masked: tl.tensor,
    ids: tl.tensor,
    positions: tl.tensor,
    starts: tl.tensor,
    span: tl.tensor,
    tile: tl.tensor,
    tiles: tl.tensor,
    spans: tl.tensor,
    total: tl.tensor,
    width: tl.tensor,
    trash_row: tl.tensor,
    mask_id: tl.tensor,
    BLOCK: tl.constexpr,
    SPANS: tl.constexpr,
) -> None:
    """Every tiles-th tile of a span's tokens; behind the last span comes the padding."""
    real = span < spans
    first = _start_of(packed, span, SPANS)
    fields = packed + span * FIELDS
    row = tl.where(real, tl.load(fields + ROW, mask=real, other=0), trash_row).to(tl.int64)
    q_start = tl.load(fields + Q_START, mask=real, other=0)
    count = tl.where(real, tl.load(fields + Q_LEN, mask=real, other=0), total - first)
    tl.store(starts + span, first, mask=real & (tile == 0))
    for low in range(tile * BLOCK, count, tiles * BLOCK):
        place = low + tl.arange(0, BLOCK)
        valid = place < count
        position = tl.where(real, q_start + place, 0).to(tl.int64)
        source = row * width + position
        token = tl.load(tokens + source, mask=valid, other=0)
        hidden = tl.load(masked + source, mask=valid, other=0) != 0
        tl.store(ids + first + place, tl.where(hidden, mask_id, token), mask=valid)
        tl.store(positions + first + place, position, mask=valid)


@triton.jit
def _store_params(
    floats: tl.tensor,  # pointers to the request's
    ints: tl.tensor,
    temperature: tl.tensor,
    top_p: tl.tensor,
    top_k: tl.tensor,
    tempered: tl.tensor,
    cfg_scale: tl.tensor,
    to: tl.tensor,
    valid: tl.tensor,
) -> None:
    """The request's parameters for its LM-head rows ``to``."""
    tl.store(temperature + to, tl.load(floats + _TEMPERATURE), mask=valid)
    tl.store(top_p + to, tl.load(floats + _TOP_P), mask=valid)
    tl.store(cfg_scale + to, tl.load(floats + _CFG_SCALE), mask=valid)
    tl.store(top_k + to, tl.load(ints + _TOP_K), mask=valid)
    tl.store(tempered + to, tl.load(ints + _TEMPERED) > 0, mask=valid)


@triton.jit
def _list_rows(
    packed: tl.tensor,
    masked: tl.tensor,
    open_flags: tl.tensor,
    floats: tl.tensor,
    ints: tl.tensor,
    forwards: tl.tensor,
    head_rows: tl.tensor,
    head_uncond: tl.tensor,
    keys: tl.tensor,
    temperature: tl.tensor,
    top_p: tl.tensor,
    top_k: tl.tensor,
    tempered: tl.tensor,
    cfg_scale: tl.tensor,
    entry: tl.tensor,
    spans: tl.tensor,
    entries: tl.tensor,
    first_twin: tl.tensor,
    width: tl.tensor,
    shift: tl.tensor,
    BLOCK: tl.constexpr,
    SPANS: tl.constexpr,
    REPLACES: tl.constexpr,
) -> None:
    """LM-head rows of an entry's block, and the padding rows that follow its segment."""
    fields = packed + entry * FIELDS
    row, last = tl.load(fields + ROW).to(tl.int64), tl.load(fields + Q_LEN) - 1
    blk_off, blk_len = tl.load(fields + BLK_OFF), tl.load(fields + BLK_LEN)
    # padding lies in the trash column
    place = tl.where(blk_len > 0, tl.load(fields + Q_START) + blk_off, width - 1)
    first, count, pad_first, pad_count = head_rows_of(packed, spans, entry)
    start = _start_of(packed, entry, SPANS)
    # guided entries come last, their twins in the same order
    twin = tl.where(entry >= 2 * entries - spans, entry + spans - entries, 0)
    twin_start = _start_of(packed, twin, SPANS)
    key = mix(tl.load(ints + row * INTS + _SEED).to(tl.uint64))
    forward = tl.load(forwards + row).to(tl.uint64)
    floats, ints = floats + row * FLOATS, ints + row * INTS
    masked, open_flags = masked + row * width + place, open_flags + row * width + place
    # items are the block's positions, then room for rows that the host counted but which
    # are not masked any more (they must point somewhere), then the padding rows
    found, items = blk_len * 0, blk_len + count + pad_count
    for low in range(0, items, BLOCK):
        item = low + tl.arange(0, BLOCK)
        _, read, rank, found = find_read(masked, open_flags, fields, item, blk_len, found, REPLACES)
        spare = item - blk_len
        unused = (spare >= tl.minimum(found, count)) & (item < items)
        valid = (read & (rank < count)) | unused
        filler = tl.where(spare < count, first + spare, pad_first + spare - count)
        to = tl.where(read, first + rank, filler)
        column = tl.where(read, item, 0)
        offset = tl.maximum(tl.minimum(blk_off + column - shift, last), 0).to(tl.int64)
        tl.store(head_rows + to, start + offset, mask=valid)
        tl.store(
            head_uncond + to - first_twin, twin_start + offset, mask=valid & (to >= first_twin)
        )
        noise = mix(mix(key + (place + column).to(tl.uint64)) + forward)
        tl.store(keys + to, noise.to(tl.int64), mask=valid)
        _store_params(floats, ints, temperature, top_p, top_k, tempered, cfg_scale, to, valid)


_SIZES = ["tiles", "spans", "entries", "total", "first_twin", "width"]
_MODEL = ["trash_row", "mask_id", "shift"]


# sizes change from step to step, and no value of theirs is worth a compilation
@triton.jit(do_not_specialize=_SIZES + _MODEL)
def _begin(
    packed: tl.tensor,
    tokens: tl.tensor,
    masked: tl.tensor,
    open_flags: tl.tensor,
    floats: tl.tensor,
    ints: tl.tensor,
    forwards: tl.tensor,
    ids: tl.tensor,
    positions: tl.tensor,
    starts: tl.tensor,
    head_rows: tl.tensor,
    head_uncond: tl.tensor,
    keys: tl.tensor,
    temperature: tl.tensor,
    top_p: tl.tensor,
    top_k: tl.tensor,
    tempered: tl.tensor,
    cfg_scale: tl.tensor,
    tiles: tl.tensor,
    spans: tl.tensor,
    entries: tl.tensor,
    total: tl.tensor,
    first_twin: tl.tensor,
    width: tl.tensor,
    trash_row: tl.tensor,
    mask_id: tl.tensor,
    shift: tl.tensor,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPANS: tl.constexpr,
    REPLACES: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    if program < entries:
        _list_rows(
            *(packed, masked, open_flags, floats, ints, forwards, head_rows, head_uncond),
            *(keys, temperature, top_p, top_k, tempered, cfg_scale),
            *(program, spans, entries, first_twin, width, shift),
            BLOCK,
            SPANS,
            REPLACES,
        )
    else:
        tile = program - entries
        _gather_tokens(
            *(packed, tokens, masked, ids, positions, starts),
            *(tile // tiles, tile % tiles, tiles, spans, total, width, trash_row, mask_id),
            TOKENS,
            SPANS,
        )


def begin_step(
    packed: Tensor,  # [..] int32
    shape: StepShape,
    table: StateTable,
    mask_id: int,
    logit_shift: int,
) -> StepTensors:
    """Gather a step's inputs from the state table.

    Nothing waits for the device, and all memory comes from torch's allocator, so the call
    may be captured in a CUDA graph.

    Args:
        packed: ``Packing.ints`` on the device.
        shape: the packing's.
        table: state rows.
        mask_id: id at masked positions.
        logit_shift: 1 for models that read the logits of position p at p - 1.
    """
    rows = shape.rows

    def room(count: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(count, dtype=dtype, device=table.device)

    params = RowParams(
        temperature=room(rows, torch.float64),
        top_p=room(rows, torch.float64),
        top_k=room(rows),
        tempered=room(rows, torch.bool),
        keys=room(rows),
    )
    out = StepTensors(
        ids=room(shape.tokens),
        positions=room(shape.tokens),
        starts=room(shape.spans, torch.int32),
        head_rows=room(rows),
        head_uncond=room(shape.twins),
        cfg_scale=room(rows, torch.float64),
        row_params=params,
    )
    tiles = triton.cdiv(shape.max_q, _TOKENS)
    _begin[(shape.entries + (shape.spans + 1) * tiles,)](
        *(packed, table.tokens, table.masked, table.open),
        *(table.floats, table.ints, table.forwards),
        *(out.ids, out.positions, out.starts, out.head_rows, out.head_uncond),
        *(params.keys, params.temperature, params.top_p, params.top_k, params.tempered),
        out.cfg_scale,
        *(tiles, shape.spans, shape.entries, shape.tokens, rows - shape.twins),
        *(table.tokens.shape[1], table.trash_row, mask_id, logit_shift),
        TOKENS=_TOKENS,
        BLOCK=block_tile(shape.width),
        SPANS=_SPANS,
        REPLACES=shape.replaces,
    )
    return out
