"""Intervals against published values, and against the formulas spelled out."""

from __future__ import annotations

import math

import pytest

from dllmserve.tools.evaluation.figures import Z95, paired_difference, wilson


@pytest.mark.parametrize(
    ("hits", "items", "low", "high"),
    [
        # Newcombe (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # the model card
        (200, 200, 0.9812, 1.0),
        (199, 200, 0.9722, 0.9991),
    ],
)
def test_wilson(hits: int, items: int, low: float, high: float) -> None:
    assert wilson(hits, items) == pytest.approx((low, high), abs=6e-5)


def test_wilson_is_symmetric_and_stays_inside() -> None:
    for items in (1, 2, 7, 200):
        for hits in range(items + 1):
            low, high = wilson(hits, items)
            assert 0 <= low <= hits / items <= high <= 1 and low < high
            assert wilson(items - hits, items) == pytest.approx((1 - high, 1 - low))


def test_paired_difference_of_a_textbook() -> None:
    """Agresti, Categorical Data Analysis: approval fell by 4 points in 1600 pairs."""
    low, high = paired_difference(gained=86, lost=150, items=1600)
    assert (low, high) == pytest.approx((-0.0587, -0.0213), abs=3e-4)


@pytest.mark.parametrize(("gained", "lost", "items"), [(0, 0, 200), (3, 9, 40), (5, 0, 5)])
def test_paired_difference_is_the_mean_of_signs(gained: int, lost: int, items: int) -> None:
    """Half an item in each cell: the signs +1, -1 and 0, with those weights."""
    weights = {1.0: gained + 0.5, -1.0: lost + 0.5, 0.0: items - gained - lost + 1.0}
    total = sum(weights.values())
    mean = sum(sign * weight for sign, weight in weights.items()) / total
    spread = sum((sign - mean) ** 2 * weight for sign, weight in weights.items()) / total
    half = Z95 * math.sqrt(spread / total)
    expected = max(-1.0, mean - half), min(1.0, mean + half)
    assert paired_difference(gained, lost, items) == pytest.approx(expected)


def test_paired_difference_without_any_is_not_empty() -> None:
    low, high = paired_difference(0, 0, 100)
    assert low == -high and 0.018 < high < 0.020


def test_paired_difference_swaps() -> None:
    low, high = paired_difference(2, 11, 60)
    assert paired_difference(11, 2, 60) == pytest.approx((-high, -low))
