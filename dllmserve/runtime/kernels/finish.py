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
from dllmserve.decoding.rule import Edits, RuleView, Update
from dllmserve.decoding.stats import TokenStats
from dllmserve.kernels.noise import uniform
from dllmserve.kernels.pages import BLK_LEN, BLK_OFF, FIELDS, HEAD, Q_START, ROW
from dllmserve.runtime.kernels.begin import FLOATS, INTS, block_tile, find_read, head_rows_of
from dllmserve.runtime.kernels.pick import MAX_RANKED, pick_best
from dllmserve.runtime.shape import ENTRY_FIELDS, EntryField, StepShape
from dllmserve.runtime.state_table import StateTable
from dllmserve.runtime.tensors import REPORT_FIELDS
from dllmserve.sampling_params import CONFIDENCE

_START = tl.constexpr(int(IntField.START))
_LENGTH = tl.constexpr(int(IntField.LENGTH))
_CONFIDENCE = tl.constexpr(int(IntField.CONFIDENCE))
_RANDOM = tl.constexpr(int(IntField.RANDOM_REMASKING))
_QUOTA = tl.constexpr(int(EntryField.QUOTA))
_ENTRY = tl.constexpr(ENTRY_FIELDS)
_REPORT = tl.constexpr(REPORT_FIELDS)
_RULE = tl.constexpr(int(IntField.RULE))
_EARLY_END = tl.constexpr(int(IntField.EARLY_END))
_ENDS_FROM = tl.constexpr(int(IntField.ENDS_FROM))
#: no fewer than the columns of floats; a power of two, as all tiles
_FLOATS_TILE = tl.constexpr(triton.next_power_of_2(FLOATS.value))
_MARGIN_KIND = tl.constexpr(CONFIDENCE.index("margin"))
_NEG_ENTROPY_KIND = tl.constexpr(CONFIDENCE.index("neg_entropy"))
_POSITION_SALT = tl.constexpr(0x5EED)  # of decoding.noise
_INF = tl.constexpr(float("inf"))


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


@triton.jit
def _confidence(
    value: tl.tensor,
    margin: tl.tensor,
    entropy: tl.tensor,
    entropy_out: tl.tensor,  # pointers to the tile's
    kind: tl.tensor,
    there: tl.tensor,
    valid: tl.tensor,
    inside: tl.tensor,
    MARGIN: tl.constexpr,
    ENTROPY: tl.constexpr,
) -> tl.tensor:
    """What a request's confidence is made of, in place of the probability; spreads entropies."""
    if MARGIN:
        other = tl.load(margin + there, mask=valid, other=0.0)
        value = tl.where(kind == _MARGIN_KIND, other, value)
    if ENTROPY:
        spread = tl.load(entropy + there, mask=valid, other=_INF)
        value = tl.where(kind == _NEG_ENTROPY_KIND, spread * -1.0, value)
        tl.store(entropy_out, spread, mask=inside)
    return value


@triton.jit(do_not_specialize=["spans", "columns", "width"])
def _spread(
    packed: tl.tensor,
    tokens: tl.tensor,
    masked: tl.tensor,
    open_: tl.tensor,
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
    current_out: tl.tensor,
    edit_out: tl.tensor,
    quota_out: tl.tensor,
    floats_out: tl.tensor,
    rule_out: tl.tensor,
    spans: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    MARGIN: tl.constexpr,
    ENTROPY: tl.constexpr,
    REPLACES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    entry = tl.program_id(0)
    row, start, length = _block(packed, entry)
    first, count, _, _ = head_rows_of(packed, spans, entry)
    ints += row * INTS
    quota = tl.load(packed + spans * FIELDS + entry * _ENTRY + _QUOTA)
    _store_rule(floats + row * FLOATS, ints, quota, quota_out, floats_out, rule_out, entry)
    tokens += row * width + start
    masked, open_ = masked + row * width + start, open_ + row * width + start
    span, found = packed + entry * FIELDS, length * 0
    kind, random = tl.load(ints + _CONFIDENCE), tl.load(ints + _RANDOM) > 0
    for low in range(0, columns, BLOCK):
        column = low + tl.arange(0, BLOCK)
        hidden, read, rank, found = find_read(masked, open_, span, column, length, found, REPLACES)
        inside, has_row = column < columns, read & (rank < count)
        valid, there = hidden & has_row, first + rank
        to = entry.to(tl.int64) * columns + column
        value = tl.load(prob + there, mask=has_row, other=0.0)
        if REPLACES:
            stands = has_row & (hidden == 0)
            tl.store(edit_out + to, tl.where(stands, value, -_INF), mask=inside)
            tl.store(current_out + to, tl.load(tokens + column, mask=stands, other=0), mask=inside)
        value = _confidence(
            *(value, margin, entropy, entropy_out + to, kind, there, valid, inside),
            MARGIN,
            ENTROPY,
        )
        key = tl.load(keys + there, mask=valid, other=0) ^ _POSITION_SALT
        value = tl.where(random, uniform(key, column * 0), value)
        tl.store(confidence_out + to, tl.where(valid, value, -_INF), mask=inside)
        tl.store(token_out + to, tl.load(token + there, mask=has_row, other=0), mask=inside)
        tl.store(eligible_out + to, hidden, mask=inside)


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

    edits = None
    if shape.replaces:
        edits = Edits(room(count, columns, dtype=torch.int64), room(count, columns))
    view = RuleView(
        eligible=room(count, columns, dtype=torch.bool),
        tokens=room(count, columns, dtype=torch.int64),
        confidence=room(count, columns),
        entropy=None if stats.entropy is None else room(count, columns),
        quota=room(count, dtype=torch.int64),
        floats=room(count, FLOATS.value),
        pick=pick_best if columns <= MAX_RANKED else None,
        edits=edits,
    )
    kind = room(count, dtype=torch.int64)
    _spread[(count,)](
        *(packed, table.tokens, table.masked, table.open, table.floats, table.ints),
        *(stats.token, stats.prob),
        stats.prob if stats.margin is None else stats.margin,
        stats.prob if stats.entropy is None else stats.entropy,
        *(keys, view.eligible, view.tokens, view.confidence),
        view.confidence if view.entropy is None else view.entropy,
        *((view.tokens, view.confidence) if edits is None else (edits.current, edits.prob)),
        *(view.quota, view.floats, kind),
        *(shape.spans, columns, table.masked.shape[1]),
        MARGIN=stats.margin is not None,
        ENTROPY=stats.entropy is not None,
        REPLACES=shape.replaces,
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
) -> tuple[tl.tensor, tl.tensor]:
    """Write an entry's block to its row, and what is not given to the twin's.

    Returns:
        Masks left, and tokens that were replaced.
    """
    row, start, length = _block(packed, entry)
    guided = spans - entries
    twin = entry >= entries - guided
    other = tl.load(packed + (entry + tl.where(twin, guided, 0)) * FIELDS + ROW).to(tl.int64)
    shared = tl.where(twin, length, 0)
    left = length * 0
    edits = length * 0
    for low in range(0, length, BLOCK):
        column = low + tl.arange(0, BLOCK)
        inside = column < length
        place = row * width + start + column
        chosen = tl.load(write + column, mask=inside, other=0) != 0
        fresh = tl.load(new + column, mask=inside, other=0)
        token = tl.where(chosen, fresh, tl.load(tokens + place, mask=inside, other=0))
        before = tl.load(masked + place, mask=inside, other=0) != 0
        hidden = before & (chosen == 0)
        left += tl.sum(hidden.to(tl.int32), 0)
        edits += tl.sum((chosen & (before == 0)).to(tl.int32), 0)
        tl.store(tokens + place, token, mask=chosen)
        tl.store(masked + place, hidden, mask=chosen)
        tl.store(steps + place, column * 0 + forward, mask=chosen)
        place = other * width + start + column
        own = tl.load(open_flags + place, mask=column < shared, other=0) != 0
        tl.store(tokens + place, token, mask=own)
        tl.store(masked + place, hidden, mask=own)
    return left, edits


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
    left, edits = _write_block(
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
    report += entry * _REPORT
    tl.store(report, left.to(tl.int64))
    tl.store(report + 1, frontier.to(tl.int64))
    tl.store(report + 2, tl.where(end < frontier, end, -1).to(tl.int64))
    tl.store(report + 3, broken.to(tl.int64))
    tl.store(report + 4, tl.where(end < length, end, -1).to(tl.int64))
    tl.store(report + 5, edits.to(tl.int64))


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
        [n, REPORT_FIELDS] int64, see :class:`dllmserve.core.plan.EntryReport`.
    """
    count = shape.entries
    report = torch.empty((count, REPORT_FIELDS), dtype=torch.int64, device=table.device)
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
