"""4x4 sudoku with a single solution."""

from __future__ import annotations

import random
from functools import cache
from itertools import permutations, product

from training.tasks.base import Item


@cache
def solutions() -> tuple[str, ...]:
    """All 288 full grids, as 16 digits."""
    rows = ["".join(p) for p in permutations("1234")]
    grids = []
    for grid in product(rows, repeat=4):
        if any(len(set(column)) != 4 for column in zip(*grid, strict=True)):
            continue
        boxes = (grid[r][c : c + 2] + grid[r + 1][c : c + 2] for r in (0, 2) for c in (0, 2))
        if all(len(set(box)) == 4 for box in boxes):
            grids.append("".join(grid))
    return tuple(grids)


@cache
def _matching() -> tuple[tuple[int, ...], ...]:
    """For each cell and digit, the set of solutions with that digit there, as bits of one
    integer.
    """
    grids = solutions()
    return tuple(
        tuple(
            sum(1 << k for k, grid in enumerate(grids) if grid[cell] == str(digit))
            for digit in range(5)
        )
        for cell in range(16)
    )


def _lines(grid: str) -> str:
    """Break 16 digits into four lines."""
    return "\n".join(grid[k : k + 4] for k in range(0, 16, 4))


def sudoku(rng: random.Random, level: int) -> Item:
    """Blank 4 to 10 cells, keeping the solution unique."""
    solution = rng.choice(solutions())
    goal = rng.randrange(4, 11)
    shown = list(solution)
    match = _matching()
    for cell in rng.sample(range(16), 16):
        if shown.count("0") == goal:
            break
        shown[cell] = "0"
        fits = -1
        for place, digit in enumerate(shown):
            if digit != "0":
                fits &= match[place][int(digit)]
        if fits.bit_count() != 1:
            shown[cell] = solution[cell]
    prompt = f"Solve this 4x4 sudoku:\n{_lines(''.join(shown))}"
    # Only 288 solutions exist, so the split is by puzzle: held-out puzzles share solutions with
    # training ones.
    return Item("sudoku", prompt, _lines(solution), prompt)
