"""Kernels of constraints: sets of states swept over slots, and what follows from them.

A region is a row of integers, see :class:`Field`, that says where its grammar and its sets lie in
three pools: ``small`` int16, ``wide`` int32, ``sets`` uint8, a byte for each state of a boundary. A
sweep is the work of one program, whose threads meet at a barrier after each slot.

::

    small   | delta [Q + 1, C] | class_of [V] |
    wide    | edges, source and 2**16 * target | least [Q + 1] | only id of a class [C]
            | ids by class [V] |                               and, per row, classes [slots]
    sets    | reached [slots + 1, Q + 1] | leads [slots + 1, Q + 1] |            per row
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import triton
import triton.language as tl

from dllmserve.core.plan import OPEN, WRITTEN, Part
from dllmserve.core.rows import IntField
from dllmserve.kernels.pages import BLK_LEN, BLK_OFF, FIELDS, HEAD, Q_START, ROW
from dllmserve.runtime.kernels.begin import INTS
from dllmserve.runtime.shape import ENTRY_FIELDS, EntryField


class Field(IntEnum):
    """Columns of a region: sizes, and where its parts begin in the pools."""

    #: states, without the dead one; 0: there is no region
    STATES = 0
    CLASSES = 1
    #: canvas position of its first slot, and slots
    START = 2
    SLOTS = 3
    #: state of an empty text
    FIRST = 4
    DELTA = 5
    CLASS_OF = 6
    EDGES = 7
    EDGE_COUNT = 8
    LEAST = 9
    ONLY = 10
    ORDER = 11
    SETS = 12
    HELD = 13
    #: 1 if a text that may end may also end later: there are end ids
    TAIL = 14


#: regions of a row; a power of two, as a tile takes them all
REGIONS = 16

_STATES = tl.constexpr(int(Field.STATES))
_CLASSES = tl.constexpr(int(Field.CLASSES))
_START = tl.constexpr(int(Field.START))
_SLOTS = tl.constexpr(int(Field.SLOTS))
_FIRST = tl.constexpr(int(Field.FIRST))
_DELTA = tl.constexpr(int(Field.DELTA))
_CLASS_OF = tl.constexpr(int(Field.CLASS_OF))
_EDGES = tl.constexpr(int(Field.EDGES))
_EDGE_COUNT = tl.constexpr(int(Field.EDGE_COUNT))
_LEAST = tl.constexpr(int(Field.LEAST))
_ONLY = tl.constexpr(int(Field.ONLY))
_ORDER = tl.constexpr(int(Field.ORDER))
_SETS = tl.constexpr(int(Field.SETS))
_HELD = tl.constexpr(int(Field.HELD))
_TAIL = tl.constexpr(int(Field.TAIL))
_FIELDS = tl.constexpr(len(Field))
_REGIONS = tl.constexpr(REGIONS)
_BLOCK_PART = tl.constexpr(int(Part.BLOCK))
_OPEN = tl.constexpr(OPEN)
_WRITTEN = tl.constexpr(WRITTEN)
_ANSWER = tl.constexpr(int(IntField.START))
_LENGTH = tl.constexpr(int(IntField.LENGTH))
_ENTRY = tl.constexpr(ENTRY_FIELDS)
_QUOTA = tl.constexpr(int(EntryField.QUOTA))
_LOWEST = tl.constexpr(-(2**63))
_LAST_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _block_of(packed: tl.tensor, entry: Any) -> Any:
    """An entry's row (int64), and its block's first position and length."""
    span = packed + entry * FIELDS
    first = tl.load(span + Q_START) + tl.load(span + BLK_OFF)
    return tl.load(span + ROW).to(tl.int64), first, tl.load(span + BLK_LEN)


@triton.jit
def _window(region: tl.tensor, first: Any, length: Any, LOOK: tl.constexpr) -> Any:
    """Slots ``low .. high - 1`` of a region in a block and what is looked at behind it."""
    start = tl.load(region + _START).to(tl.int32)
    low = tl.maximum(first - start, 0)
    high = first + length + tl.maximum(length, LOOK) - start
    return low, tl.minimum(high, tl.load(region + _SLOTS).to(tl.int32))


@triton.jit
def _region_at(fields: tl.tensor, row: Any, position: Any) -> Any:
    """Pointer to the region of a row that a position is in, and whether there is one."""
    index = tl.arange(0, _REGIONS)
    own = fields + (row * _REGIONS + index) * _FIELDS
    start = tl.load(own + _START)
    inside = (tl.load(own + _STATES) > 0) & (position >= start)
    inside &= position < start + tl.load(own + _SLOTS)
    which = tl.max(tl.where(inside, index, -1), 0)
    return fields + (row * _REGIONS + tl.maximum(which, 0)) * _FIELDS, which >= 0


@triton.jit
def _clear(states: tl.tensor, count: Any, TILE: tl.constexpr) -> None:
    for low in range(0, count, TILE):
        place = low + tl.arange(0, TILE)
        tl.store(states + place, tl.zeros([TILE], tl.uint8), mask=place < count)


@triton.jit
def _after(
    region: tl.tensor,
    small: tl.tensor,
    wide: tl.tensor,
    now: tl.tensor,
    then: tl.tensor,
    held: Any,
    TILE: tl.constexpr,
) -> None:
    """States ``then`` that the class ``held``, or any if it is negative, leads to from ``now``."""
    states = tl.load(region + _STATES).to(tl.int32)
    _clear(then, states + 1, TILE)
    tl.debug_barrier()
    one = tl.full([TILE], 1, tl.uint8)
    if held < 0:
        edges, count = wide + tl.load(region + _EDGES), tl.load(region + _EDGE_COUNT).to(tl.int32)
        for low in range(0, count, TILE):
            place = low + tl.arange(0, TILE)
            pair = tl.load(edges + place, mask=place < count, other=0)
            on = tl.load(now + (pair & 0xFFFF), mask=place < count, other=0) > 0
            tl.store(then + (pair >> 16), one, mask=on)
    else:
        classes = tl.load(region + _CLASSES)
        delta = small + tl.load(region + _DELTA) + held
        for low in range(0, states, TILE):
            place = low + tl.arange(0, TILE)
            on = tl.load(now + place, mask=place < states, other=0) > 0
            to = tl.load(delta + place.to(tl.int64) * classes, mask=on, other=0).to(tl.int32)
            tl.store(then + to, one, mask=on & (to < states))
    tl.debug_barrier()


@triton.jit
def _before(
    region: tl.tensor,
    small: tl.tensor,
    wide: tl.tensor,
    now: tl.tensor,
    then: tl.tensor,
    held: Any,
    TILE: tl.constexpr,
) -> None:
    """States ``now`` from which the class ``held``, or any if it is negative, leads to ``then``."""
    states = tl.load(region + _STATES).to(tl.int32)
    _clear(now, states + 1, TILE)
    tl.debug_barrier()
    one = tl.full([TILE], 1, tl.uint8)
    if held < 0:
        edges, count = wide + tl.load(region + _EDGES), tl.load(region + _EDGE_COUNT).to(tl.int32)
        for low in range(0, count, TILE):
            place = low + tl.arange(0, TILE)
            pair = tl.load(edges + place, mask=place < count, other=0)
            on = tl.load(then + (pair >> 16), mask=place < count, other=0) > 0
            tl.store(now + (pair & 0xFFFF), one, mask=on)
    else:
        classes = tl.load(region + _CLASSES)
        delta = small + tl.load(region + _DELTA) + held
        for low in range(0, states, TILE):
            place = low + tl.arange(0, TILE)
            inside = place < states
            to = tl.load(delta + place.to(tl.int64) * classes, mask=inside, other=0).to(tl.int32)
            on = tl.load(then + to, mask=inside, other=0)
            tl.store(now + place, on, mask=inside)
    tl.debug_barrier()


@triton.jit
def _hold(
    region: tl.tensor,
    small: tl.tensor,
    held: tl.tensor,
    tokens: tl.tensor,
    masked: tl.tensor,
    TILE: tl.constexpr,
) -> Any:
    """Note the class that each slot holds, -1 where it is open; the last slot that is written."""
    slots, class_of = tl.load(region + _SLOTS).to(tl.int32), small + tl.load(region + _CLASS_OF)
    last = slots * 0 - 1
    for low in range(0, slots, TILE):
        place = low + tl.arange(0, TILE)
        inside = place < slots
        written = inside & (tl.load(masked + place, mask=inside, other=1) == 0)
        token = tl.load(tokens + place, mask=written, other=0)
        found = tl.load(class_of + token, mask=written, other=-1).to(tl.int32)
        tl.store(held + place, tl.where(written, found, -1), mask=inside)
        last = tl.maximum(last, tl.max(tl.where(written, place, -1), 0))
    return last


@triton.jit
def _end_sets(
    region: tl.tensor,
    wide: tl.tensor,
    leads: tl.tensor,
    first: Any,
    last: Any,
    TILE: tl.constexpr,
) -> None:
    """Sets of boundaries ``first .. last`` behind which all slots are open."""
    states, slots = tl.load(region + _STATES).to(tl.int32), tl.load(region + _SLOTS).to(tl.int32)
    least = wide + tl.load(region + _LEAST)
    for boundary in range(first, last + 1):
        own = leads + boundary * (states + 1).to(tl.int64)
        for low in range(0, states + 1, TILE):
            place = low + tl.arange(0, TILE)
            far = tl.load(least + place, mask=place <= states, other=0)
            tl.store(own + place, (far <= slots - boundary).to(tl.uint8), mask=place <= states)


@triton.jit(do_not_specialize=["width"])
def sweep(
    packed: tl.tensor,
    tokens: tl.tensor,
    masked: tl.tensor,
    fields: tl.tensor,
    small: tl.tensor,
    wide: tl.tensor,
    sets: tl.tensor,
    entry_of: tl.tensor,
    width: tl.tensor,
    LOOK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Sets of a region of an entry, from what its row holds: all of those that a step looks at."""
    entry = tl.program_id(0)
    row, first, length = _block_of(packed, entry)
    region = fields + (row * _REGIONS + tl.program_id(1)) * _FIELDS
    states = tl.load(region + _STATES).to(tl.int32)
    if (states > 0) & (length > 0):
        tl.store(entry_of + row, entry)
        low, high = _window(region, first, length, LOOK)
        if high > low:
            slots = tl.load(region + _SLOTS).to(tl.int32)
            held, stride = wide + tl.load(region + _HELD), (states + 1).to(tl.int64)
            reached = sets + tl.load(region + _SETS)
            leads = reached + (slots + 1) * stride
            at = row * width + tl.load(region + _START)
            last = _hold(region, small, held, tokens + at, masked + at, TILE)
            _clear(reached, stride, TILE)
            tl.debug_barrier()
            tl.store(reached + tl.load(region + _FIRST), tl.full([], 1, tl.uint8))
            tl.debug_barrier()
            for i in range(0, high):
                now = reached + i * stride
                _after(region, small, wide, now, now + stride, tl.load(held + i), TILE)
            top = tl.where(tl.load(region + _TAIL) > 0, last + 1, slots)
            _end_sets(region, wide, leads, tl.maximum(top, low), tl.maximum(top, high), TILE)
            tl.debug_barrier()
            for k in range(0, top - low):
                now = leads + (top - 1 - k) * stride
                _before(region, small, wide, now, now + stride, tl.load(held + top - 1 - k), TILE)


@triton.jit
def _allowed_tile(
    region: tl.tensor,
    small: tl.tensor,
    sets: tl.tensor,
    slot: Any,
    column: tl.tensor,  # [CT] classes
    few: Any,
    ST: tl.constexpr,
    CT: tl.constexpr,
) -> tl.tensor:
    """Which of some classes a slot may hold: [CT] int32, 0 or 1.

    Beyond ``few`` of them it stops looking for more.
    """
    states, slots = tl.load(region + _STATES).to(tl.int32), tl.load(region + _SLOTS).to(tl.int32)
    classes, stride = tl.load(region + _CLASSES), (states + 1).to(tl.int64)
    reached = sets + tl.load(region + _SETS) + slot * stride
    leads = sets + tl.load(region + _SETS) + (slots + 2 + slot) * stride
    delta = small + tl.load(region + _DELTA)
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
    row, first, length = _block_of(packed, entry)
    if column < length:
        scored = tl.load(packed + entry * FIELDS + HEAD) == _BLOCK_PART
        wanted = (tl.load(masked + row * width + first + column) != 0) | scored
        region, there = _region_at(fields, row, first + column)
        if wanted & there:
            slot = first + column - tl.load(region + _START)
            classes = tl.load(region + _CLASSES).to(tl.int32)
            own = allowed + (entry.to(tl.int64) * columns + column) * MOST
            for low in range(0, classes, CT):
                place = low + tl.arange(0, CT)
                found = _allowed_tile(region, small, sets, slot, place, CT, ST, CT)
                tl.store(own + place, found.to(tl.uint8), mask=place < classes)


@triton.jit
def _cell(packed: tl.tensor, fields: tl.tensor, entry_of: tl.tensor, row: Any, column: Any) -> Any:
    """An LM-head row's entry, region, and whether there is one."""
    entry = tl.load(entry_of + row).to(tl.int64)
    _, first, _ = _block_of(packed, entry)
    region, there = _region_at(fields, row, first + column)
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
    if tl.load(fields + row * _REGIONS * _FIELDS + _STATES) > 0:
        entry, region, there = _cell(packed, fields, entry_of, row, column)
        if there:
            own = allowed + (entry * columns + column) * MOST
            token = tl.program_id(1) * TILE + tl.arange(0, TILE)
            class_of = small + tl.load(region + _CLASS_OF) + start
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
    if tl.load(fields + row * _REGIONS * _FIELDS + _STATES) > 0:
        entry, region, there = _cell(packed, fields, entry_of, row, column)
        if there:
            own = best + (entry * columns + column) * MOST
            index = tl.program_id(1) * TILE + tl.arange(0, TILE)
            order = wide + tl.load(region + _ORDER)
            token = tl.load(order + index, mask=index < size, other=-1) - start
            inside = (token >= 0) & (token < ids)
            at = z + place.to(tl.int64) * stride + token
            value = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
            inside &= value > float("-inf")
            class_of = small + tl.load(region + _CLASS_OF) + start
            found = tl.load(class_of + token, mask=inside, other=0).to(tl.int32)
            key = (_ordered(value).to(tl.int64) << 32) | ((token + start) * -1 + _LAST_ID).to(tl.int64)
            low = tl.min(tl.where(inside, found, _LAST_ID), 0)
            high = tl.max(tl.where(inside, found, -1), 0)
            if low == high:
                tl.atomic_max(own + low, tl.max(tl.where(inside, key, _LOWEST), 0))
            else:
                tl.atomic_max(own + found, key, mask=inside)


@triton.jit
def _goes(
    region: tl.tensor, small: tl.tensor, sets: tl.tensor, slot: Any, held: Any, TILE: tl.constexpr
) -> Any:
    """Whether a slot may hold a class."""
    states, slots = tl.load(region + _STATES).to(tl.int32), tl.load(region + _SLOTS).to(tl.int32)
    classes, stride = tl.load(region + _CLASSES), (states + 1).to(tl.int64)
    reached = sets + tl.load(region + _SETS) + slot * stride
    leads = sets + tl.load(region + _SETS) + (slots + 2 + slot) * stride
    delta = small + tl.load(region + _DELTA) + held
    found = states * 0
    for low in range(0, states, TILE):
        place = low + tl.arange(0, TILE)
        on = tl.load(reached + place, mask=place < states, other=0) > 0
        to = tl.load(delta + place.to(tl.int64) * classes, mask=on, other=0).to(tl.int32)
        ends = tl.load(leads + to, mask=on, other=0).to(tl.int32)
        found = tl.maximum(found, tl.max(ends, 0))
    return found > 0


@triton.jit
def _write_slot(
    region: tl.tensor,
    small: tl.tensor,
    wide: tl.tensor,
    sets: tl.tensor,
    slot: Any,
    held: Any,
    low: Any,
    high: Any,
    TILE: tl.constexpr,
) -> None:
    """Renew the sets of boundaries ``low .. high`` after a slot was written."""
    states, slots = tl.load(region + _STATES).to(tl.int32), tl.load(region + _SLOTS).to(tl.int32)
    stride, classes = (states + 1).to(tl.int64), wide + tl.load(region + _HELD)
    tl.store(classes + slot, held)
    tl.debug_barrier()
    reached = sets + tl.load(region + _SETS)
    leads = reached + (slots + 1) * stride
    for i in range(slot, high):
        now = reached + i * stride
        _after(region, small, wide, now, now + stride, tl.load(classes + i), TILE)
    for k in range(0, slot + 1 - low):
        now = leads + (slot - k) * stride
        _before(region, small, wide, now, now + stride, tl.load(classes + slot - k), TILE)


@triton.jit
def _best_going(
    region: tl.tensor,
    small: tl.tensor,
    sets: tl.tensor,
    best: tl.tensor,
    slot: Any,
    ST: tl.constexpr,
    CT: tl.constexpr,
) -> Any:
    """Id of the best class that still goes at a slot; -1 if nothing was noted of any."""
    classes = tl.load(region + _CLASSES).to(tl.int32)
    found = tl.full([], _LOWEST, tl.int64)
    for low in range(0, classes, CT):
        place = low + tl.arange(0, CT)
        goes = _allowed_tile(region, small, sets, slot, place, CT, ST, CT) > 0
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
    row, first, length = _block_of(packed, entry)
    base = entry.to(tl.int64) * columns
    column = tl.arange(0, WIDTH)
    todo = tl.load(left + base + column, mask=column < length, other=0) > 0
    count = tl.sum(todo.to(tl.int32), 0)
    some = tl.load(fields + row * _REGIONS * _FIELDS + _STATES) > 0
    quota = tl.load(packed + spans * FIELDS + entry * _ENTRY + _QUOTA)
    if some & (count > 1):
        value = tl.load(confidence + base + column, mask=column < length, other=0.0)
        for visit in range(0, count):
            tl.debug_barrier()
            todo = tl.load(left + base + column, mask=column < length, other=0) > 0
            top = tl.max(tl.where(todo, value, float("-inf")), 0)
            at = tl.min(tl.where(todo & (value == top), column, WIDTH), 0)
            at = tl.where(at < WIDTH, at, tl.min(tl.where(todo, column, WIDTH), 0))  # NaN
            tl.debug_barrier()
            tl.store(left + base + at, tl.full([], 0, tl.uint8))
            region, there = _region_at(fields, row, first + at)
            if there:
                slot = first + at - tl.load(region + _START).to(tl.int32)
                class_of = small + tl.load(region + _CLASS_OF)
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
                    low, high = _window(region, first, length, LOOK)
                    _write_slot(region, small, wide, sets, slot, held, low, high, TILE)


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
    row, first, length = _block_of(packed, entry)
    some = tl.load(fields + row * _REGIONS * _FIELDS + _STATES) > 0
    own = ints + row * INTS
    if some & (column < tl.load(own + _LENGTH)):
        position = (tl.load(own + _ANSWER) + column).to(tl.int32)
        result = tl.full([], _OPEN, tl.int64)
        if tl.load(masked + row * width + position) == 0:
            result = tl.full([], _WRITTEN, tl.int64)
        else:
            region, there = _region_at(fields, row, position)
            near = position < first + length + tl.maximum(length, LOOK)
            if there & near & (position >= first) & (length > 0):
                slot = position - tl.load(region + _START)
                classes = tl.load(region + _CLASSES).to(tl.int32)
                total, which, low = classes * 0, classes * 0, classes * 0
                while (low < classes) & (total <= 1):
                    place = low + tl.arange(0, CT)
                    found = _allowed_tile(region, small, sets, slot, place, 1, ST, CT)
                    total += tl.sum(found, 0)
                    which = tl.maximum(which, tl.max(tl.where(found > 0, place, 0), 0))
                    low += CT
                if total == 1:
                    token = tl.load(wide + tl.load(region + _ONLY) + which)
                    result = tl.where(token >= 0, token, _OPEN).to(tl.int64)
        tl.store(holds + entry.to(tl.int64) * columns + column, result)
