"""Names beside the points of a picture, where they cover neither each other nor a point."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

FONT_SIZE = 7.5
#: lengths in points of 1/72 inch: of a line of text, half a marker, half an error bar, and of
#: what stays free along the edge
_LINE, _MARKER, _BAR, _EDGE = 9.0, 5.0, 1.5, 4.0
#: points closer than this share a list of names
_SAME = 8.0
#: names further from their points than this get a line to them
_NEAR = 12.0
_DISTANCES = (7.0, 10.0, 14.0, 20.0, 28.0, 38.0, 50.0, 64.0, 80.0)
_DIRECTIONS = 16
_GREY = "#b5b5b5"


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


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    @property
    def area(self) -> float:
        """Pixels of it."""
        return max(self.right - self.left, 0.0) * max(self.top - self.bottom, 0.0)

    def overlap(self, other: Box) -> float:
        """Pixels that both cover."""
        return Box(
            max(self.left, other.left),
            max(self.bottom, other.bottom),
            min(self.right, other.right),
            min(self.top, other.top),
        ).area


@dataclass(frozen=True)
class _Place:
    """Where a list of names could stand: its pixels, and their distance in points."""

    box: Box
    distance: float


def place_labels(figure: Any, axes: Any, spots: Sequence[Spot]) -> None:
    """Write each name near its spot; spots that nearly coincide share one list of names.

    The picture must have its scales, legend and title already, as they decide where pixels are.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    renderer = canvas.get_renderer()
    unit = renderer.points_to_pixels(1.0)
    extent = axes.get_window_extent(renderer)
    edge = _EDGE * unit
    frame = Box(extent.x0 + edge, extent.y0 + edge, extent.x1 - edge, extent.y1 - edge)
    pixels = {spot: tuple(axes.transData.transform((spot.x, spot.y))) for spot in spots}
    bars = [_bar(axes, spot, unit) for spot in spots]
    half = _MARKER * unit
    markers = [Box(x - half, y - half, x + half, y + half) for x, y in pixels.values()]
    taken: list[Box] = []
    # the longest lists first, as they are the hardest to place
    for group in sorted(_groups(pixels, _SAME * unit), key=len, reverse=True):
        width = max(_width(axes, spot, renderer) for spot in group)
        height = len(group) * _LINE * unit
        middle = _middle([pixels[spot] for spot in group])
        best = min(
            _candidates(middle, width, height, unit),
            key=lambda found: _cost(found, markers, bars, taken, frame),
        )
        taken.append(best.box)
        _write(axes, group, middle, best, unit)


def _groups(pixels: dict[Spot, tuple[float, float]], radius: float) -> list[list[Spot]]:
    """Spots that are within a radius of the first one of their group, from left to right."""
    groups: list[list[Spot]] = []
    for spot in sorted(pixels, key=lambda s: s.x):
        near = (g for g in groups if math.dist(pixels[g[0]], pixels[spot]) <= radius)
        if (group := next(near, None)) is None:
            groups.append([spot])
        else:
            group.append(spot)
    return groups


def _candidates(
    place: tuple[float, float], width: float, height: float, unit: float
) -> Iterator[_Place]:
    """Around the point, the nearest first; right, above, left and below before the rest."""
    order = sorted(range(_DIRECTIONS), key=lambda n: (n % 4 != 0, n % 2 != 0, n))
    for distance in _DISTANCES:
        for direction in order:
            angle = 2 * math.pi * direction / _DIRECTIONS
            across, up = math.cos(angle), math.sin(angle)
            x = place[0] + across * (distance * unit + width / 2)
            y = place[1] + up * (distance * unit + height / 2)
            box = Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            yield _Place(box, distance)


def _cost(
    found: _Place,
    markers: Sequence[Box],
    bars: Sequence[Box],
    taken: Sequence[Box],
    frame: Box,
) -> float:
    """How bad a place is: what it covers first, then how far away it is."""
    box = found.box
    covered = sum(3 * box.overlap(other) for other in (*taken, *markers))
    covered += sum(box.overlap(bar) for bar in bars)
    covered += 6 * (box.area - box.overlap(frame))
    return 10 * covered / max(box.area, 1.0) + found.distance / _DISTANCES[-1]


def _write(
    axes: Any, group: Sequence[Spot], middle: tuple[float, float], place: _Place, unit: float
) -> None:
    """The names below each other, and a line to their points if they are far away."""
    box = place.box
    left = box.right <= middle[0]
    anchor = box.right if left else box.left
    if place.distance > _NEAR:
        _line(axes, middle, box)
    for number, spot in enumerate(group):
        y = box.top - (number + 0.5) * _LINE * unit
        axes.annotate(
            spot.name,
            _fraction(axes, anchor, y),
            xycoords="figure fraction",
            ha="right" if left else "left",
            va="center",
            fontsize=FONT_SIZE,
            color=spot.color,
            bbox={"facecolor": "white", "alpha": 0.8, "pad": 0.4, "linewidth": 0},
            zorder=5,
        )


def _line(axes: Any, middle: tuple[float, float], box: Box) -> None:
    """From the points to the nearest spot of the names' edge."""
    x = min(max(middle[0], box.left), box.right)
    y = min(max(middle[1], box.bottom), box.top)
    axes.annotate(
        "",
        _fraction(axes, *middle),
        xytext=_fraction(axes, x, y),
        xycoords="figure fraction",
        textcoords="figure fraction",
        arrowprops={"arrowstyle": "-", "color": _GREY, "linewidth": 0.7, "shrinkA": 0},
    )


def _fraction(axes: Any, x: float, y: float) -> tuple[float, float]:
    """A place in the picture, whatever number of pixels it is saved with."""
    whole = axes.figure.bbox
    return x / whole.width, y / whole.height


def _bar(axes: Any, spot: Spot, unit: float) -> Box:
    x, bottom = axes.transData.transform((spot.x, spot.low))
    _, top = axes.transData.transform((spot.x, spot.high))
    return Box(x - _BAR * unit, bottom, x + _BAR * unit, top)


def _width(axes: Any, spot: Spot, renderer: Any) -> float:
    text = axes.annotate(spot.name, (spot.x, spot.y), fontsize=FONT_SIZE)
    width = float(text.get_window_extent(renderer).width)
    text.remove()
    return width


def _middle(places: Sequence[tuple[float, float]]) -> tuple[float, float]:
    count = len(places)
    return sum(x for x, _ in places) / count, sum(y for _, y in places) / count
