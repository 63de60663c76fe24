"""Kernels of constraints: what may stand at a position, what is struck off, what goes together."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from dllmserve.core.plan import OPEN, WRITTEN, Part
from dllmserve.core.rows import IntField
from dllmserve.kernels.pages import FIELDS, HEAD
from dllmserve.runtime.kernels.begin import INTS
from dllmserve.runtime.kernels.region_sets import (
    CLASS_OF,
    CLASSES,
    DELTA,
    ONLY,
    ORDER,
    OVER,
    OVER_ID,
    REGION_FIELDS,
    REGIONS_OF,
    SETS,
    SLOTS,
    START,
    STATES,
    block_of,
    region_at,
    window_of,
    write_slot,
)
from dllmserve.runtime.shape import ENTRY_FIELDS, EntryField

_LAST_ID = tl.constexpr(2**31 - 1)
_LOWEST = tl.constexpr(-(2**63))
_QUOTA = tl.constexpr(int(EntryField.QUOTA))
_ENTRY = tl.constexpr(ENTRY_FIELDS)
_LENGTH = tl.constexpr(int(IntField.LENGTH))
_ANSWER = tl.constexpr(int(IntField.START))
_WRITTEN = tl.constexpr(WRITTEN)
_OPEN = tl.constexpr(OPEN)
_BLOCK_PART = tl.constexpr(int(Part.BLOCK))


@triton.jit
def _allowed_tile(
    region: tl.tensor,
    small: tl.tensor,
    sets: tl.tensor,
    slot: tl.tensor,
    column: tl.tensor,  # [CT] classes
    few: tl.tensor,
    ST: tl.constexpr,
    CT: tl.constexpr,
) -> tl.tensor:
    """Which of some classes a slot may hold: [CT] int32, 0 or 1.

    When it has more than ``few`` of them it stops looking for others.
    """
    states, slots = tl.load(region + STATES).to(tl.int32), tl.load(region + SLOTS).to(tl.int32)
    classes, stride = tl.load(region + CLASSES), (states + 1).to(tl.int64)
    reached = sets + tl.load(region + SETS) + slot * stride
    leads = sets + tl.load(region + SETS) + (slots + 2 + slot) * stride
    delta = small + tl.load(region + DELTA)
    found = tl.zeros([CT], tl.int32)
    low = states * 0
    while (low < states) & (tl.sum(found, 0) <= few):
        place = low + tl.arange(0, ST)
        on = tl.load(reached + place, mask=place < states, other=0) > 0
        if tl.max(on.to(tl.int32), 0) > 0:
            both = on[:, None] & (column < classes)[None, :]
            to = tl.load(delta + place[:, None] * classes + column[None, :], mask=both, other=0)
            ends = tl.load(leads + to.to(tl.int32), mask=both, other=0).to(tl.int32)
            found = tl.maximum(found, tl.max(ends, 0))
        low += ST
    return found


@triton.jit
def _classes_in(classes: tl.tensor, low: tl.tensor, CT: tl.constexpr) -> Any:
    """Classes of a tile that may be allowed: not what lies behind the last, nor class 0."""
    return tl.minimum(classes - low, CT) - tl.where(low == 0, 1, 0)


@triton.jit(do_not_specialize=["columns", "width"])
def allowed_classes(
    packed: tl.tensor,
    masked: tl.tensor,
    fields: tl.tensor,
    small: tl.tensor,
    sets: tl.tensor,
    allowed: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    MOST: tl.constexpr,
    ST: tl.constexpr,
    CT: tl.constexpr,
) -> None:
    """Classes that a position of a block may hold, into ``allowed`` [n, W, MOST] uint8."""
    entry, column = tl.program_id(0), tl.program_id(1)
    row, first, length = block_of(packed, entry)
    if column < length:
        scored = tl.load(packed + entry * FIELDS + HEAD) == _BLOCK_PART
        wanted = (tl.load(masked + row * width + first + column) != 0) | scored
        region, there = region_at(fields, row, first + column)
        if wanted & there:
            slot = first + column - tl.load(region + START)
            classes = tl.load(region + CLASSES).to(tl.int32)
            own = allowed + (entry.to(tl.int64) * columns + column) * MOST
            for low in range(0, classes, CT):
                place = low + tl.arange(0, CT)
                most = _classes_in(classes, low, CT)
                found = _allowed_tile(region, small, sets, slot, place, most - 1, ST, CT)
                tl.store(own + place, found.to(tl.uint8), mask=place < classes)


@triton.jit
def _cell(
    packed: tl.tensor, fields: tl.tensor, entry_of: tl.tensor, row: tl.tensor, column: tl.tensor
) -> Any:
    """An LM-head row's entry, region, and whether there is one."""
    entry = tl.load(entry_of + row).to(tl.int64)
    _, first, _ = block_of(packed, entry)
    region, there = region_at(fields, row, first + column)
    return entry, region, there


@triton.jit(do_not_specialize=["columns", "ids", "stride", "start"])
def strike(
    z: tl.tensor,
    rows: tl.tensor,
    cells: tl.tensor,
    packed: tl.tensor,
    fields: tl.tensor,
    small: tl.tensor,
    entry_of: tl.tensor,
    allowed: tl.tensor,
    columns: tl.tensor,
    ids: tl.tensor,
    stride: tl.tensor,
    start: tl.tensor,
    MOST: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Logits of ids that may not stand at a position become -inf."""
    place = tl.program_id(0)
    row, column = tl.load(rows + place), tl.load(cells + place)
    if tl.load(fields + row * REGIONS_OF * REGION_FIELDS + STATES) > 0:
        entry, region, there = _cell(packed, fields, entry_of, row, column)
        if there:
            own = allowed + (entry * columns + column) * MOST
            token = tl.program_id(1) * TILE + tl.arange(0, TILE)
            class_of = small + tl.load(region + CLASS_OF) + start
            found = tl.load(class_of + token, mask=token < ids, other=0).to(tl.int32)
            banned = tl.load(own + found, mask=token < ids, other=1) == 0
            low = tl.full([TILE], float("-inf"), tl.float32).to(z.dtype.element_ty)
            tl.store(z + place.to(tl.int64) * stride + token, low, mask=banned & (token < ids))


@triton.jit
def _ordered(value: tl.tensor) -> tl.tensor:
    """float32 as int32 of the same order."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["columns", "ids", "stride", "start", "size"])
def note_best(
    z: tl.tensor,
    rows: tl.tensor,
    cells: tl.tensor,
    packed: tl.tensor,
    fields: tl.tensor,
    small: tl.tensor,
    wide: tl.tensor,
    entry_of: tl.tensor,
    best: tl.tensor,
    columns: tl.tensor,
    ids: tl.tensor,
    stride: tl.tensor,
    start: tl.tensor,
    size: tl.tensor,
    MOST: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Best value of each class, and its lowest id, into ``best`` [n, W, MOST] int64.

    Ids are taken by class, so most tiles have one class alone, and one thing to say.
    """
    place = tl.program_id(0)
    row, column = tl.load(rows + place), tl.load(cells + place)
    if tl.load(fields + row * REGIONS_OF * REGION_FIELDS + STATES) > 0:
        entry, region, there = _cell(packed, fields, entry_of, row, column)
        if there:
            own = best + (entry * columns + column) * MOST
            index = tl.program_id(1) * TILE + tl.arange(0, TILE)
            order = wide + tl.load(region + ORDER)
            token = tl.load(order + index, mask=index < size, other=-1) - start
            inside = (token >= 0) & (token < ids)
            at = z + place.to(tl.int64) * stride + token
            value = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
            inside &= value > float("-inf")
            class_of = small + tl.load(region + CLASS_OF) + start
            found = tl.load(class_of + token, mask=inside, other=0).to(tl.int32)
            key = (_ordered(value).to(tl.int64) << 32) | ((token + start) * -1 + _LAST_ID).to(
                tl.int64
            )
            low = tl.min(tl.where(inside, found, _LAST_ID), 0)
            high = tl.max(tl.where(inside, found, -1), 0)
            if low == high:
                tl.atomic_max(own + low, tl.max(tl.where(inside, key, _LOWEST), 0))
            else:
                tl.atomic_max(own + found, key, mask=inside)


@triton.jit
def _goes(
    region: tl.tensor,
    small: tl.tensor,
    sets: tl.tensor,
    slot: tl.tensor,
    held: tl.tensor,
    TILE: tl.constexpr,
) -> Any:
    """Whether a slot may hold a class."""
    states, slots = tl.load(region + STATES).to(tl.int32), tl.load(region + SLOTS).to(tl.int32)
    classes, stride = tl.load(region + CLASSES), (states + 1).to(tl.int64)
    reached = sets + tl.load(region + SETS) + slot * stride
    leads = sets + tl.load(region + SETS) + (slots + 2 + slot) * stride
    delta = small + tl.load(region + DELTA) + held
    found = states * 0
    for low in range(0, states, TILE):
        place = low + tl.arange(0, TILE)
        on = tl.load(reached + place, mask=place < states, other=0) > 0
        to = tl.load(delta + place.to(tl.int64) * classes, mask=on, other=0).to(tl.int32)
        ends = tl.load(leads + to, mask=on, other=0).to(tl.int32)
        found = tl.maximum(found, tl.max(ends, 0))
    return found > 0


@triton.jit
def _best_going(
    region: tl.tensor,
    small: tl.tensor,
    sets: tl.tensor,
    best: tl.tensor,
    slot: tl.tensor,
    ST: tl.constexpr,
    CT: tl.constexpr,
) -> Any:
    """Id of the best class that still goes at a slot; -1 if nothing was noted of any."""
    classes = tl.load(region + CLASSES).to(tl.int32)
    found = tl.full([], _LOWEST, tl.int64)
    for low in range(0, classes, CT):
        place = low + tl.arange(0, CT)
        most = _classes_in(classes, low, CT)
        goes = _allowed_tile(region, small, sets, slot, place, most - 1, ST, CT) > 0
        key = tl.load(best + place, mask=place < classes, other=_LOWEST)
        found = tl.maximum(found, tl.max(tl.where(goes, key, _LOWEST), 0))
    return tl.where(found == _LOWEST, -1, (found & 0xFFFFFFFF) * -1 + _LAST_ID).to(tl.int32)


@triton.jit(do_not_specialize=["columns", "spans"])
def settle(
    packed: tl.tensor,
    fields: tl.tensor,
    small: tl.tensor,
    wide: tl.tensor,
    sets: tl.tensor,
    confidence: tl.tensor,
    tokens: tl.tensor,
    write: tl.tensor,
    left: tl.tensor,
    best: tl.tensor,
    columns: tl.tensor,
    spans: tl.tensor,
    MOST: tl.constexpr,
    LOOK: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ST: tl.constexpr,
    CT: tl.constexpr,
) -> None:
    """Visit what a rule writes by falling confidence; ``left`` [n, W] uint8 is what is to do."""
    entry = tl.program_id(0)
    row, first, length = block_of(packed, entry)
    base = entry.to(tl.int64) * columns
    column = tl.arange(0, WIDTH)
    todo = tl.load(left + base + column, mask=column < length, other=0) > 0
    count = tl.sum(todo.to(tl.int32), 0)
    some = tl.load(fields + row * REGIONS_OF * REGION_FIELDS + STATES) > 0
    quota = tl.load(packed + spans * FIELDS + entry * _ENTRY + _QUOTA)
    if some & (count > 1):
        value = tl.load(confidence + base + column, mask=column < length, other=0.0)
        for _visit in range(count):
            tl.debug_barrier()
            todo = tl.load(left + base + column, mask=column < length, other=0) > 0
            top = tl.max(tl.where(todo, value, float("-inf")), 0)
            at = tl.min(tl.where(todo & (value == top), column, WIDTH), 0)
            at = tl.where(at < WIDTH, at, tl.min(tl.where(todo, column, WIDTH), 0))  # NaN
            tl.debug_barrier()
            tl.store(left + base + at, tl.full([], 0, tl.uint8))
            region, there = region_at(fields, row, first + at)
            if there:
                slot = first + at - tl.load(region + START).to(tl.int32)
                class_of = small + tl.load(region + CLASS_OF)
                token = tl.load(tokens + base + at)
                held = tl.load(class_of + token).to(tl.int32)
                goes = _goes(region, small, sets, slot, held, TILE)
                if (goes == 0) & (quota > 1):
                    own = best + (base + at) * MOST
                    other = _best_going(region, small, sets, own, slot, ST, CT)
                    goes = other >= 0
                    token = tl.maximum(other, 0).to(tl.int64)
                    held = tl.load(class_of + token).to(tl.int32)
                    tl.store(tokens + base + at, token)
                if goes == 0:
                    tl.store(write + base + at, tl.full([], 0, tl.uint8))
                else:
                    low, high = window_of(region, first, length, LOOK)
                    write_slot(region, small, wide, sets, slot, held, low, high, TILE)


@triton.jit
def _has_ended(region: tl.tensor, sets: tl.tensor, slot: tl.tensor, TILE: tl.constexpr) -> Any:
    """Whether the text has surely ended before a slot."""
    states = tl.load(region + STATES).to(tl.int32)
    reached = sets + tl.load(region + SETS) + slot * (states + 1).to(tl.int64)
    over, others = tl.load(region + OVER), states * 0
    for low in range(0, states, TILE):
        place = low + tl.arange(0, TILE)
        on = tl.load(reached + place, mask=(place < states) & (place != over), other=0)
        others = tl.maximum(others, tl.max(on.to(tl.int32), 0))
    return (over >= 0) & (others == 0)


@triton.jit(do_not_specialize=["columns", "width"])
def only_ids(
    packed: tl.tensor,
    masked: tl.tensor,
    ints: tl.tensor,
    fields: tl.tensor,
    small: tl.tensor,
    wide: tl.tensor,
    sets: tl.tensor,
    holds: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    LOOK: tl.constexpr,
    ST: tl.constexpr,
    CT: tl.constexpr,
) -> None:
    """What positions of an answer hold, into ``holds`` [n, A] int64."""
    entry, column = tl.program_id(0), tl.program_id(1)
    row, first, length = block_of(packed, entry)
    some = tl.load(fields + row * REGIONS_OF * REGION_FIELDS + STATES) > 0
    own = ints + row * INTS
    if some & (column < tl.load(own + _LENGTH)):
        position = (tl.load(own + _ANSWER) + column).to(tl.int32)
        result = tl.full([], _OPEN, tl.int64)
        if tl.load(masked + row * width + position) == 0:
            result = tl.full([], _WRITTEN, tl.int64)
        else:
            region, there = region_at(fields, row, position)
            near = position < first + length + tl.maximum(length, LOOK)
            if there & near & (position >= first) & (length > 0):
                slot = position - tl.load(region + START)
                classes = tl.load(region + CLASSES).to(tl.int32)
                total, which, low = classes * 0, classes * 0, classes * 0
                while (low < classes) & (total <= 1):
                    place = low + tl.arange(0, CT)
                    found = _allowed_tile(region, small, sets, slot, place, 1, ST, CT)
                    total += tl.sum(found, 0)
                    which = tl.maximum(which, tl.max(tl.where(found > 0, place, 0), 0))
                    low += CT
                if total == 1:
                    token = tl.load(wide + tl.load(region + ONLY) + which)
                    if (token < 0) & _has_ended(region, sets, slot, 1024):
                        token = tl.load(region + OVER_ID).to(tl.int32)
                    result = tl.where(token >= 0, token, _OPEN).to(tl.int64)
        tl.store(holds + entry.to(tl.int64) * columns + column, result)
