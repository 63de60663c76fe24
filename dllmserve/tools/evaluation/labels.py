"""Names beside the points of a picture, where they cover neither each other nor a point.

All lengths are points of 1/72 inch, so that the picture may be saved with any number of pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

FONT_SIZE = 7.5
#: of a line of text, half a marker, half an error bar, and of what stays free along the edge
_LINE, _MARKER, _BAR, _EDGE = 9.0, 5.0, 1.5, 4.0
#: points closer than this share a list of names
_SAME = 8.0
#: names further from their points than this get a line to them
_NEAR = 12.0
_DISTANCES = (7.0, 10.0, 14.0, 20.0, 28.0, 38.0, 50.0, 64.0, 80.0)
_DIRECTIONS = 16
_LOOK = {"fontsize": FONT_SIZE, "va": "center", "zorder": 5}
_BOX = {"facecolor": "white", "alpha": 0.8, "pad": 0.4, "linewidth": 0}
_ARROW = {"arrowstyle": "-", "color": "#b5b5b5", "linewidth": 0.7, "shrinkA": 0}


@dataclass(frozen=True)
class Spot:
    """A point with a name.

    Attributes:
        x, y: in data.
        low, high: ends of its error bar.
        name, color: of the text.
    """

    x: float
    y: float
    low: float
    high: float
    name: str
    color: str


def place_labels(axes: Any, spots: Sequence[Spot]) -> None:
    """Write each name near its spot; spots that nearly coincide share one list of names.

    The picture must have its scales, legend and title already, as they decide where spots are.
    """
    axes.figure.draw_without_rendering()
    scale = 72 / axes.figure.dpi

    def place(spot: Spot, y: float) -> Any:
        return axes.transData.transform((spot.x, y)) * scale

    extent = axes.get_window_extent()
    frame = _box(*(extent.min * scale + _EDGE), *(extent.max * scale - _EDGE))
    at = {spot: tuple(place(spot, spot.y)) for spot in spots}
    # what should stay visible, with how much that weighs
    taken = [(3, _box(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER)) for x, y in at.values()]
    for spot in spots:
        (x, bottom), (_, top) = place(spot, spot.low), place(spot, spot.high)
        taken.append((1, _box(x - _BAR, bottom, x + _BAR, top)))
    # the longest lists first, as they are the hardest to place
    for group in sorted(_groups(at), key=len, reverse=True):
        width = max(_width(axes, spot) * scale for spot in group)
        middle = tuple(sum(side) / len(group) for side in zip(*(at[s] for s in group), strict=True))
        found = _candidates(middle, width, len(group) * _LINE)
        distance, box = min(found, key=lambda it: _cost(it[0], it[1], taken, frame))
        taken.append((3, box))
        _write(axes, group, at[group[0]], box, line=distance > _NEAR)


def _box(left: float, bottom: float, right: float, top: float) -> Any:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(left, bottom, right, top)


def _groups(at: dict[Spot, Any]) -> list[list[Spot]]:
    """Spots that are near the first one of their group, from left to right."""
    groups: list[list[Spot]] = []
    for spot in sorted(at, key=lambda s: s.x):
        near = (g for g in groups if math.dist(at[g[0]], at[spot]) <= _SAME)
        if (group := next(near, None)) is None:
            groups.append([spot])
        else:
            group.append(spot)
    return groups


def _candidates(middle: Any, width: float, height: float) -> Iterator[tuple[float, Any]]:
    """Distances and boxes, the nearest first; right, above, left and below before the rest."""
    order = sorted(range(_DIRECTIONS), key=lambda n: (n % 4 != 0, n % 2 != 0, n))
    for distance in _DISTANCES:
        for direction in order:
            angle = 2 * math.pi * direction / _DIRECTIONS
            x = middle[0] + math.cos(angle) * (distance + width / 2) - width / 2
            y = middle[1] + math.sin(angle) * (distance + height / 2) - height / 2
            yield distance, _box(x, y, x + width, y + height)


def _cost(distance: float, box: Any, taken: Sequence[tuple[int, Any]], frame: Any) -> float:
    """How bad a place is: what it covers first, then how far away it is."""
    area = float(box.width * box.height)
    covered = sum(weight * _overlap(box, other) for weight, other in taken)
    covered += 6 * (area - _overlap(box, frame))
    return 10 * covered / area + distance / _DISTANCES[-1]


def _overlap(one: Any, other: Any) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(width, 0.0) * max(height, 0.0))


def _write(axes: Any, group: Sequence[Spot], at: Any, box: Any, *, line: bool) -> None:
    """The names below each other, and a line to their points if they are far away."""
    left = box.x1 <= at[0]
    for number, spot in enumerate(group):
        axes.annotate(
            spot.name,
            (group[0].x, group[0].y),
            xytext=((box.x1 if left else box.x0) - at[0], box.y1 - (number + 0.5) * _LINE - at[1]),
            textcoords="offset points",
            ha="right" if left else "left",
            color=spot.color,
            bbox=_BOX,
            arrowprops=_ARROW if line and not number else None,
            **_LOOK,
        )


def _width(axes: Any, spot: Spot) -> float:
    text = axes.annotate(spot.name, (spot.x, spot.y), **_LOOK)
    width = float(text.get_window_extent().width)
    text.remove()
    return width
