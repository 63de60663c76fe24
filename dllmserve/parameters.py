"""FloatField: the order in which a request's numbers lie in device rows."""

from __future__ import annotations

from enum import IntEnum


class FloatField(IntEnum):
    """Columns of the float64 parameters, of which rules read their own."""

    TEMPERATURE = 0
    TOP_P = 1
    THRESHOLD = 2
    FACTOR = 3
    ENTROPY_BOUND = 4
    CFG_SCALE = 5
    LOW_THRESHOLD = 6
    KL_THRESHOLD = 7
    KL_HISTORY = 8
    THRESHOLD_BACK = 9
