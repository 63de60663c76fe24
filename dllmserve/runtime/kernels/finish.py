"""What a step writes to the state table: the twin of ``TorchStep``'s second half.

One launch spreads the statistics of LM-head rows over the blocks, the rules say what is
written, and one launch writes it and reports. In both, a program takes one entry.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllmserve.core.rows import IntField
from dllmserve.decoding.rule import RuleView, Update
from dllmserve.decoding.stats import TokenStats
from dllmserve.kernels.pages import BLK_LEN, BLK_OFF, FIELDS, HEAD, Q_START, ROW
from dllmserve.kernels.stats import uniform
from dllmserve.runtime.kernels.begin import FLOATS, INTS, block_tile, find_masked, head_rows_of
from dllmserve.runtime.shape import ENTRY_FIELDS, EntryField, StepShape
from dllmserve.runtime.state_table import StateTable
from dllmserve.sampling_params import CONFIDENCE

_START = tl.constexpr(int(IntField.START))
_LENGTH = tl.constexpr(int(IntField.LENGTH))
_CONFIDENCE = tl.constexpr(int(IntField.CONFIDENCE))
_RANDOM = tl.constexpr(int(IntField.RANDOM_REMASKING))
_QUOTA = tl.constexpr(int(EntryField.QUOTA))
_ENTRY = tl.constexpr(ENTRY_FIELDS)
_RULE = tl.constexpr(int(IntField.RULE))
_EARLY_END = tl.constexpr(int(IntField.EARLY_END))
_ENDS_FROM = tl.constexpr(int(IntField.ENDS_FROM))
#: no fewer than the columns of floats; a power of two, as all tiles
_FLOATS_TILE = tl.constexpr(triton.next_power_of_2(FLOATS.value))
_MARGIN_KIND = tl.constexpr(CONFIDENCE.index("margin"))
_NEG_ENTROPY_KIND = tl.constexpr(CONFIDENCE.index("neg_entropy"))
_POSITION_SALT = tl.constexpr(0x5EED)  # of decoding.noise
_INF = tl.constexpr(float("inf"))
_HIGHEST = tl.constexpr(2**63 - 1)

#: Positions that a program ranks, and that it compares them with at once.
_RANKED, _COMPARED = 32, 128
#: Counting takes the square of the width; above, sorting is faster.
_MAX_RANKED = 1024


@triton.jit
def _block(packed: tl.tensor, entry: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """An entry's row (int64), and its block's first position and length."""
    fields = packed + entry * FIELDS
    start = tl.load(fields + Q_START) + tl.load(fields + BLK_OFF)
    return tl.load(fields + ROW).to(tl.int64), start, tl.load(fields + BLK_LEN)


@triton.jit
def _store_rule(
    floats: tl.tensor,  # pointers to the request's
    ints: tl.tensor,
    quota: tl.tensor,
    quota_out: tl.tensor,
    floats_out: tl.tensor,
    rule_out: tl.tensor,
    entry: tl.tensor,
) -> None:
    """The request's rule and what the rule reads."""
    tl.store(quota_out + entry, quota.to(tl.int64))
    field = tl.arange(0, _FLOATS_TILE)
    own = tl.load(floats + field, mask=field < FLOATS)
    tl.store(floats_out + entry * FLOATS + field, own, mask=field < FLOATS)
    tl.store(rule_out + entry, tl.load(ints + _RULE))


@triton.jit(do_not_specialize=["spans", "columns", "width"])
def _spread(
    packed: tl.tensor,
    masked: tl.tensor,
    floats: tl.tensor,
    ints: tl.tensor,
    token: tl.tensor,
    prob: tl.tensor,
    margin: tl.tensor,
    entropy: tl.tensor,
    keys: tl.tensor,
    eligible_out: tl.tensor,
    token_out: tl.tensor,
    confidence_out: tl.tensor,
    entropy_out: tl.tensor,
    quota_out: tl.tensor,
    floats_out: tl.tensor,
    rule_out: tl.tensor,
    spans: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    MARGIN: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    entry = tl.program_id(0)
    row, start, length = _block(packed, entry)
    first, count, _, _ = head_rows_of(packed, spans, entry)
    ints += row * INTS
    quota = tl.load(packed + spans * FIELDS + entry * _ENTRY + _QUOTA)
    _store_rule(floats + row * FLOATS, ints, quota, quota_out, floats_out, rule_out, entry)
    masked += row * width + start
    kind = tl.load(ints + _CONFIDENCE)
    random = tl.load(ints + _RANDOM) > 0
    found = length * 0
    for low in range(0, columns, BLOCK):
        column = low + tl.arange(0, BLOCK)
        hidden, rank, found = find_masked(masked, column, length, found)
        valid = hidden & (rank < count)
        there = first + rank
        value = tl.load(prob + there, mask=valid, other=0.0)
        to = entry.to(tl.int64) * columns + column
        if MARGIN:
            other = tl.load(margin + there, mask=valid, other=0.0)
            value = tl.where(kind == _MARGIN_KIND, other, value)
        if ENTROPY:
            spread = tl.load(entropy + there, mask=valid, other=_INF)
            value = tl.where(kind == _NEG_ENTROPY_KIND, spread * -1.0, value)
            tl.store(entropy_out + to, spread, mask=column < columns)
        key = tl.load(keys + there, mask=valid, other=0) ^ _POSITION_SALT
        value = tl.where(random, uniform(key, column * 0), value)
        tl.store(confidence_out + to, tl.where(valid, value, -_INF), mask=column < columns)
        tl.store(token_out + to, tl.load(token + there, mask=valid, other=0), mask=column < columns)
        tl.store(eligible_out + to, hidden, mask=column < columns)


def spread_stats(
    packed: Tensor,  # [..] int32
    shape: StepShape,
    table: StateTable,
    stats: TokenStats,
    keys: Tensor,  # [M] int64
) -> tuple[RuleView, Tensor]:
    """Spread the [M] statistics over the [n, W] block cells.

    Returns:
        What the rules see, and each entry's rule, [n] int64.
    """
    count, columns = shape.entries, shape.width

    def room(*sizes: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=table.device)

    view = RuleView(
        eligible=room(count, columns, dtype=torch.bool),
        tokens=room(count, columns, dtype=torch.int64),
        confidence=room(count, columns),
        entropy=None if stats.entropy is None else room(count, columns),
        quota=room(count, dtype=torch.int64),
        floats=room(count, FLOATS.value),
        pick=pick_best if columns <= _MAX_RANKED else None,
    )
    kind = room(count, dtype=torch.int64)
    _spread[(count,)](
        *(packed, table.masked, table.floats, table.ints),
        *(stats.token, stats.prob),
        stats.prob if stats.margin is None else stats.margin,
        stats.prob if stats.entropy is None else stats.entropy,
        *(keys, view.eligible, view.tokens, view.confidence),
        view.confidence if view.entropy is None else view.entropy,
        *(view.quota, view.floats, kind),
        *(shape.spans, columns, table.masked.shape[1]),
        MARGIN=stats.margin is not None,
        ENTROPY=stats.entropy is not None,
        BLOCK=block_tile(columns),
    )
    return view, kind


@triton.jit
def _write_block(
    packed: tl.tensor,
    tokens: tl.tensor,
    masked: tl.tensor,
    steps: tl.tensor,
    open_flags: tl.tensor,
    new: tl.tensor,  # pointers to the entry's [W]
    write: tl.tensor,
    forward: tl.tensor,
    entry: tl.tensor,
    spans: tl.tensor,
    entries: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Write an entry's block to its row, and what is not given to the twin's; masks left."""
    row, start, length = _block(packed, entry)
    guided = spans - entries
    twin = entry >= entries - guided
    other = tl.load(packed + (entry + tl.where(twin, guided, 0)) * FIELDS + ROW).to(tl.int64)
    shared = tl.where(twin, length, 0)
    left = length * 0
    for low in range(0, length, BLOCK):
        column = low + tl.arange(0, BLOCK)
        inside = column < length
        place = row * width + start + column
        chosen = tl.load(write + column, mask=inside, other=0) != 0
        fresh = tl.load(new + column, mask=inside, other=0)
        token = tl.where(chosen, fresh, tl.load(tokens + place, mask=inside, other=0))
        hidden = (tl.load(masked + place, mask=inside, other=0) != 0) & (chosen == 0)
        left += tl.sum(hidden.to(tl.int32), 0)
        tl.store(tokens + place, token, mask=chosen)
        tl.store(masked + place, hidden, mask=chosen)
        tl.store(steps + place, column * 0 + forward, mask=chosen)
        place = other * width + start + column
        own = tl.load(open_flags + place, mask=column < shared, other=0) != 0
        tl.store(tokens + place, token, mask=own)
        tl.store(masked + place, hidden, mask=own)
    return left


@triton.jit
def _open_places(
    masked: tl.tensor,
    write: tl.tensor,  # pointer to the entry's [W]
    source: tl.tensor,  # where the answer's places lie in the state table
    column: tl.tensor,  # and in the block
    inside: tl.tensor,
    blk_len: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Which of an answer's places are in the block, were written now, and are masked after that.

    What the program itself has just written is laid over what is read, so it does not
    matter whether a load sees it.
    """
    recent = inside & (column >= 0) & (column < blk_len)
    chosen = tl.load(write + column, mask=recent, other=0) != 0
    hidden = (tl.load(masked + source, mask=inside, other=0) != 0) & (chosen == 0)
    return recent, chosen, hidden


@triton.jit
def _frontier(
    packed: tl.tensor,
    tokens: tl.tensor,
    masked: tl.tensor,
    open_flags: tl.tensor,
    ints: tl.tensor,  # pointer to the row's
    new: tl.tensor,
    write: tl.tensor,
    eos: tl.tensor,  # pointer to the row's
    ends: tl.tensor,
    entry: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Answer places unmasked without a gap; the first end id written, or the length; its token."""
    row, start, blk_len = _block(packed, entry)
    answer = tl.load(ints + _START).to(tl.int32)
    length = tl.load(ints + _LENGTH).to(tl.int32)
    ends_from = tl.load(ints + _ENDS_FROM).to(tl.int32)
    frontier = length
    first = length
    token_there = tl.load(eos)
    for low in range(0, length, BLOCK):
        place = low + tl.arange(0, BLOCK)
        inside = place < length
        source = row * width + answer + place
        column = answer + place - start
        _, chosen, hidden = _open_places(masked, write, source, column, inside, blk_len)
        fresh = tl.load(new + column, mask=chosen, other=0)
        token = tl.where(chosen, fresh, tl.load(tokens + source, mask=inside, other=0))
        frontier = tl.minimum(frontier, tl.min(tl.where(hidden, place, length), 0))
        end = place < 0
        for i in range(ends):
            end = end | (token == tl.load(eos + i))
        # a masked position's token is left over from before, and a given one ends nothing
        filled = tl.load(open_flags + source, mask=inside, other=0) != 0
        end = end & filled & (hidden == 0) & (place >= ends_from)
        found = tl.min(tl.where(end, place, length), 0)
        here = tl.sum(tl.where(end & (place == found), token, 0), 0)
        token_there = tl.where(found < first, here, token_there)
        first = tl.minimum(first, found)
    return frontier, first, token_there


@triton.jit
def _fill(
    packed: tl.tensor,
    tokens: tl.tensor,
    masked: tl.tensor,
    open_flags: tl.tensor,
    steps: tl.tensor,
    ints: tl.tensor,  # pointer to the row's
    new: tl.tensor,
    write: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    forward: tl.tensor,
    entry: tl.tensor,
    spans: tl.tensor,
    entries: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Fill what is masked behind the end id with it, or all; masks left, and the frontier."""
    row, start, blk_len = _block(packed, entry)
    guided = spans - entries
    twin = entry >= entries - guided
    other = tl.load(packed + (entry + tl.where(twin, guided, 0)) * FIELDS + ROW).to(tl.int64)
    answer = tl.load(ints + _START).to(tl.int32)
    length = tl.load(ints + _LENGTH).to(tl.int32)
    shared = tl.where(twin, length, 0)
    over = tl.where(tl.load(ints + _EARLY_END) > 1, first, length)  # behind it all is filled
    left = length * 0
    frontier = length
    for low in range(0, length, BLOCK):
        place = low + tl.arange(0, BLOCK)
        source = row * width + answer + place
        column = answer + place - start
        inside = place < length
        recent, chosen, hidden = _open_places(masked, write, source, column, inside, blk_len)
        token = tl.load(tokens + source, mask=inside, other=0)
        token = tl.where(chosen, tl.load(new + column, mask=chosen, other=0), token)
        own = tl.load(open_flags + source, mask=inside, other=0) != 0
        fill = (hidden & (place > first)) | (own & (token != end) & (place > over))
        tl.store(tokens + source, place.to(tl.int64) * 0 + end, mask=fill)
        tl.store(masked + source, fill == 0, mask=fill)
        tl.store(steps + source, place * 0 + forward, mask=fill)
        source = other * width + answer + place
        tl.store(tokens + source, place.to(tl.int64) * 0 + end, mask=fill & (place < shared))
        tl.store(masked + source, fill == 0, mask=fill & (place < shared))
        open_ = hidden & (fill == 0)
        left += tl.sum((open_ & recent).to(tl.int32), 0)
        frontier = tl.minimum(frontier, tl.min(tl.where(open_, place, length), 0))
    return left, frontier


@triton.jit
def _count_nan(
    values: tl.tensor, low: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for i in range(0, count, BLOCK):
        place = i + tl.arange(0, BLOCK)
        value = tl.load(values + low + place, mask=place < count, other=0.0)
        total += (value != value).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["ends", "spans", "entries", "columns", "width", "trash_row"])
def _commit(
    packed: tl.tensor,
    tokens: tl.tensor,
    masked: tl.tensor,
    open_flags: tl.tensor,
    ints: tl.tensor,
    forwards: tl.tensor,
    steps: tl.tensor,
    new: tl.tensor,
    write: tl.tensor,
    prob: tl.tensor,
    eos: tl.tensor,
    report: tl.tensor,
    ends: tl.tensor,
    spans: tl.tensor,
    entries: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    trash_row: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    entry = tl.program_id(0)
    row = tl.load(packed + entry * FIELDS + ROW).to(tl.int64)
    new += entry.to(tl.int64) * columns
    write += entry.to(tl.int64) * columns
    forward = (tl.load(forwards + row) + 1).to(tl.int32)
    left = _write_block(
        *(packed, tokens, masked, steps, open_flags, new, write, forward),
        *(entry, spans, entries, width, BLOCK),
    )
    ints += row * INTS
    frontier, end, token = _frontier(
        *(packed, tokens, masked, open_flags, ints, new, write),
        *(eos + row * ends, ends, entry, width, BLOCK),
    )
    length = tl.load(ints + _LENGTH).to(tl.int32)
    if (tl.load(ints + _EARLY_END) > 0) & (end < length) & (row != trash_row):
        tl.debug_barrier()  # the twin's block was written whole, and some of it is filled now
        left, frontier = _fill(
            *(packed, tokens, masked, open_flags, steps),
            *(ints, new, write, end, token, forward),
            *(entry, spans, entries, width, BLOCK),
        )
    first, count, _, _ = head_rows_of(packed, spans, entry)
    broken = _count_nan(prob, first, count, BLOCK)
    # all padding entries lie on the trash row, and programs must not share what they write
    fills = tl.load(packed + entry * FIELDS + HEAD) != 0
    tl.store(forwards + row, forward.to(tl.int64), mask=fills & (row != trash_row))
    report += entry * 5
    tl.store(report, left.to(tl.int64))
    tl.store(report + 1, frontier.to(tl.int64))
    tl.store(report + 2, tl.where(end < frontier, end, -1).to(tl.int64))
    tl.store(report + 3, broken.to(tl.int64))
    tl.store(report + 4, tl.where(end < length, end, -1).to(tl.int64))


def commit_step(
    packed: Tensor,  # [..] int32
    shape: StepShape,
    table: StateTable,
    update: Update,
    prob: Tensor,  # [M] float64
    before: Callable[[], None] | None = None,
) -> Tensor:
    """Write the update to the state table, after ``before`` and without taking memory for it.

    Returns:
        [n, 5] int64, see :class:`dllmserve.core.plan.EntryReport`.
    """
    count = shape.entries
    report = torch.empty((count, 5), dtype=torch.int64, device=table.device)
    tokens, write = update.tokens.contiguous(), update.write.contiguous()
    if before is not None:
        before()
    _commit[(count,)](
        *(packed, table.tokens, table.masked, table.open, table.ints, table.forwards, table.steps),
        *(tokens, write, prob, table.ends, report),
        *(
            table.ends.shape[1],
            shape.spans,
            count,
            shape.width,
            table.tokens.shape[1],
            table.trash_row,
        ),
        BLOCK=block_tile(max(shape.width, shape.answer)),
    )
    return report


@triton.jit
def _ordered(keys: tl.tensor, place: tl.tensor, columns: tl.tensor) -> tl.tensor:
    """Keys as int64 of the same order; NaN is the greatest, as in torch's sort."""
    key = tl.load(keys + place, mask=place < columns, other=0.0).to(tl.float64)
    bits = tl.where(key == 0.0, 0.0, key).to(tl.int64, bitcast=True)  # -0 equals 0
    return tl.where(key != key, _HIGHEST, bits ^ ((bits >> 63) & _HIGHEST))


@triton.jit(do_not_specialize=["columns"])
def _pick_best(
    keys: tl.tensor,
    counts: tl.tensor,
    eligible: tl.tensor,
    write: tl.tensor,
    columns: tl.tensor,
    RANKED: tl.constexpr,
    COMPARED: tl.constexpr,
) -> None:
    """Rank a tile of positions: how many come before each, ties by position."""
    base = tl.program_id(0).to(tl.int64) * columns
    keys += base
    own = tl.program_id(1) * RANKED + tl.arange(0, RANKED)
    key = _ordered(keys, own, columns)[:, None]
    rank = tl.zeros([RANKED], dtype=tl.int32)
    for low in range(0, columns, COMPARED):
        place = low + tl.arange(0, COMPARED)
        other = _ordered(keys, place, columns)[None, :]
        earlier = place[None, :] < own[:, None]
        before = (other > key) | ((other == key) & earlier)
        rank += tl.sum((before & (place < columns)[None, :]).to(tl.int32), 1)
    count = tl.maximum(tl.load(counts + tl.program_id(0)), 1)
    can = tl.load(eligible + base + own, mask=own < columns, other=0) != 0
    tl.store(write + base + own, can & (rank < count), mask=own < columns)


def pick_best(
    key: Tensor,  # [n, W] floating
    count: Tensor,  # [n] int64
    eligible: Tensor,  # [n, W] bool
) -> Tensor:
    """The ``count`` (at least one) eligible positions with the largest key: [n, W] bool.

    Ties go to the lower position; see :func:`dllmserve.decoding.rule.write_best`.
    """
    rows, columns = key.shape
    write = torch.empty((rows, columns), dtype=torch.bool, device=key.device)
    _pick_best[(rows, triton.cdiv(columns, _RANKED))](
        *(key.contiguous(), count.contiguous(), eligible.contiguous(), write, columns),
        RANKED=_RANKED,
        COMPARED=_COMPARED,
    )
    return write
