"""95 % intervals of shares, and of differences between two shares of the same items."""

from __future__ import annotations

import math
from statistics import NormalDist

#: standard deviations on either side of a normal distribution's mean that hold 95 %
Z95 = NormalDist().inv_cdf(0.975)


def wilson(hits: int, items: int) -> tuple[float, float]:
    """Interval of a share (Wilson, 1927): never empty, and never outside 0 and 1.

    Args:
        hits: items that were right.
        items: all of them, at least one.

    Example:
        >>> low, high = wilson(199, 200)
        >>> f"{low:.3f} to {high:.3f}"
        '0.972 to 0.999'
    """
    share, square = hits / items, Z95 * Z95
    middle = (share + square / (2 * items)) / (1 + square / items)
    spread = math.sqrt(share * (1 - share) / items + square / (4 * items * items))
    half = Z95 * spread / (1 + square / items)
    # the ends are exact where everything or nothing was right, but for rounding
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == items else middle + half)


def paired_difference(gained: int, lost: int, items: int) -> tuple[float, float]:
    """Interval of the difference between two shares, both of the same items.

    Only items on which the two disagree tell them apart, as in McNemar's test. This is the
    normal interval of the paired difference with half an item added to each of the four
    cells (Agresti and Min, 2005). Without that it would be empty where the two never disagree.

    Args:
        gained: items that the second has right and the first wrong.
        lost: items that the first has right and the second wrong.
        items: all items, at least one.

    Example:
        >>> low, high = paired_difference(gained=0, lost=28, items=200)
        >>> f"{100 * low:.1f} to {100 * high:.1f} points"
        '-18.7 to -9.0 points'
    """
    total = items + 2
    middle = (gained - lost) / total
    variance = (gained + lost + 1 - (gained - lost) ** 2 / total) / total**2
    half = Z95 * math.sqrt(variance)
    return max(-1.0, middle - half), min(1.0, middle + half)
