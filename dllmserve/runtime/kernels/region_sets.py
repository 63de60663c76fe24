"""Sets of states swept over the slots of constrained regions.

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

from dllmserve.kernels.pages import BLK_LEN, BLK_OFF, FIELDS, Q_START, ROW


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
    #: the state in which a text has ended, and the id that stands behind its end; -1 for none
    OVER = 15
    OVER_ID = 16


#: regions of a row; a power of two, as a tile takes them all
REGIONS = 16

STATES = tl.constexpr(int(Field.STATES))
CLASSES = tl.constexpr(int(Field.CLASSES))
START = tl.constexpr(int(Field.START))
SLOTS = tl.constexpr(int(Field.SLOTS))
FIRST = tl.constexpr(int(Field.FIRST))
DELTA = tl.constexpr(int(Field.DELTA))
CLASS_OF = tl.constexpr(int(Field.CLASS_OF))
EDGES = tl.constexpr(int(Field.EDGES))
EDGE_COUNT = tl.constexpr(int(Field.EDGE_COUNT))
LEAST = tl.constexpr(int(Field.LEAST))
ONLY = tl.constexpr(int(Field.ONLY))
ORDER = tl.constexpr(int(Field.ORDER))
SETS = tl.constexpr(int(Field.SETS))
HELD = tl.constexpr(int(Field.HELD))
TAIL = tl.constexpr(int(Field.TAIL))
OVER = tl.constexpr(int(Field.OVER))
OVER_ID = tl.constexpr(int(Field.OVER_ID))
REGION_FIELDS = tl.constexpr(len(Field))
REGIONS_OF = tl.constexpr(REGIONS)


@triton.jit
def block_of(packed: tl.tensor, entry: tl.tensor) -> Any:
    """An entry's row (int64), and its block's first position and length."""
    span = packed + entry * FIELDS
    first = tl.load(span + Q_START) + tl.load(span + BLK_OFF)
    return tl.load(span + ROW).to(tl.int64), first, tl.load(span + BLK_LEN)


@triton.jit
def window_of(region: tl.tensor, first: tl.tensor, length: tl.tensor, LOOK: tl.constexpr) -> Any:
    """Slots ``low .. high - 1`` of a region in a block and what is looked at behind it."""
    start = tl.load(region + START).to(tl.int32)
    low = tl.maximum(first - start, 0)
    high = first + length + tl.maximum(length, LOOK) - start
    return low, tl.minimum(high, tl.load(region + SLOTS).to(tl.int32))


@triton.jit
def region_at(fields: tl.tensor, row: tl.tensor, position: tl.tensor) -> Any:
    """Pointer to the region of a row that a position is in, and whether there is one."""
    index = tl.arange(0, REGIONS_OF)
    own = fields + (row * REGIONS_OF + index) * REGION_FIELDS
    start = tl.load(own + START)
    inside = (tl.load(own + STATES) > 0) & (position >= start)
    inside &= position < start + tl.load(own + SLOTS)
    which = tl.max(tl.where(inside, index, -1), 0)
    return fields + (row * REGIONS_OF + tl.maximum(which, 0)) * REGION_FIELDS, which >= 0


@triton.jit
def _clear(states: tl.tensor, count: tl.tensor, TILE: tl.constexpr) -> None:
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
    held: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """States ``then`` that the class ``held``, or any if it is negative, leads to from ``now``."""
    states = tl.load(region + STATES).to(tl.int32)
    _clear(then, states + 1, TILE)
    tl.debug_barrier()
    one = tl.full([TILE], 1, tl.uint8)
    if held < 0:
        edges, count = wide + tl.load(region + EDGES), tl.load(region + EDGE_COUNT).to(tl.int32)
        for low in range(0, count, TILE):
            place = low + tl.arange(0, TILE)
            pair = tl.load(edges + place, mask=place < count, other=0)
            on = tl.load(now + (pair & 0xFFFF), mask=place < count, other=0) > 0
            tl.store(then + (pair >> 16), one, mask=on)
    else:
        classes = tl.load(region + CLASSES)
        delta = small + tl.load(region + DELTA) + held
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
    held: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """States ``now`` from which the class ``held``, or any if it is negative, leads to ``then``."""
    states = tl.load(region + STATES).to(tl.int32)
    _clear(now, states + 1, TILE)
    tl.debug_barrier()
    one = tl.full([TILE], 1, tl.uint8)
    if held < 0:
        edges, count = wide + tl.load(region + EDGES), tl.load(region + EDGE_COUNT).to(tl.int32)
        for low in range(0, count, TILE):
            place = low + tl.arange(0, TILE)
            pair = tl.load(edges + place, mask=place < count, other=0)
            on = tl.load(then + (pair >> 16), mask=place < count, other=0) > 0
            tl.store(now + (pair & 0xFFFF), one, mask=on)
    else:
        classes = tl.load(region + CLASSES)
        delta = small + tl.load(region + DELTA) + held
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
    slots, class_of = tl.load(region + SLOTS).to(tl.int32), small + tl.load(region + CLASS_OF)
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
    first: tl.tensor,
    last: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Sets of boundaries ``first .. last`` behind which all slots are open."""
    states, slots = tl.load(region + STATES).to(tl.int32), tl.load(region + SLOTS).to(tl.int32)
    least = wide + tl.load(region + LEAST)
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
    row, first, length = block_of(packed, entry)
    region = fields + (row * REGIONS_OF + tl.program_id(1)) * REGION_FIELDS
    states = tl.load(region + STATES).to(tl.int32)
    if (states > 0) & (length > 0):
        tl.store(entry_of + row, entry)
        low, high = window_of(region, first, length, LOOK)
        if high > low:
            slots = tl.load(region + SLOTS).to(tl.int32)
            held, stride = wide + tl.load(region + HELD), (states + 1).to(tl.int64)
            reached = sets + tl.load(region + SETS)
            leads = reached + (slots + 1) * stride
            at = row * width + tl.load(region + START)
            last = _hold(region, small, held, tokens + at, masked + at, TILE)
            _clear(reached, stride, TILE)
            tl.debug_barrier()
            tl.store(reached + tl.load(region + FIRST), tl.full([], 1, tl.uint8))
            tl.debug_barrier()
            for i in range(high):
                now = reached + i * stride
                _after(region, small, wide, now, now + stride, tl.load(held + i), TILE)
            top = tl.where(tl.load(region + TAIL) > 0, last + 1, slots)
            _end_sets(region, wide, leads, tl.maximum(top, low), tl.maximum(top, high), TILE)
            tl.debug_barrier()
            for k in range(top - low):
                now = leads + (top - 1 - k) * stride
                _before(region, small, wide, now, now + stride, tl.load(held + top - 1 - k), TILE)


@triton.jit
def write_slot(
    region: tl.tensor,
    small: tl.tensor,
    wide: tl.tensor,
    sets: tl.tensor,
    slot: tl.tensor,
    held: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Renew the sets of boundaries ``low .. high`` after a slot was written."""
    states, slots = tl.load(region + STATES).to(tl.int32), tl.load(region + SLOTS).to(tl.int32)
    stride, classes = (states + 1).to(tl.int64), wide + tl.load(region + HELD)
    tl.store(classes + slot, held)
    tl.debug_barrier()
    reached = sets + tl.load(region + SETS)
    leads = reached + (slots + 1) * stride
    for i in range(slot, high):
        now = reached + i * stride
        _after(region, small, wide, now, now + stride, tl.load(classes + i), TILE)
    for k in range(slot + 1 - low):
        now = leads + (slot - k) * stride
        _before(region, small, wide, now, now + stride, tl.load(classes + slot - k), TILE)
