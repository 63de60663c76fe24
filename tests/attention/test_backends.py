"""Every attention backend against the naive span, for every write mode and shape."""

import random
from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest

from dllmserve.catalog import BACKENDS
from dllmserve.core.plan import Store
from dllmserve.core.rows import RowSelect
from tests.attention.bench import (
    HEADS,
    LAYERS,
    LENGTH,
    Bench,
    ahead_and_blind,
    mixed_plans,
    span,
    windows,
)

Setup = tuple[str, int, int]  # backend, logit_shift, page size
SETUPS: list[Setup] = [(b, s, p) for b in BACKENDS for s, p in ((0, 1), (1, 5), (0, 32))]


def share(cases: Iterable[tuple[Any, ...]], every: int) -> list[tuple[Any, ...]]:
    """All cases (setup, ...), but of triton one in ``every``: on a CPU each takes a second."""
    listed = list(cases)
    slow = [case for case in listed if case[0][0] == "triton"]
    return [case for case in listed if case not in slow] + slow[::every]


@pytest.fixture(params=SETUPS, ids=lambda made: "{}-shift{}-page{}".format(*made))
def setup(request: pytest.FixtureRequest) -> Setup:
    made: Setup = request.param
    return made


@pytest.mark.parametrize(("setup", "heads"), share(product(SETUPS, HEADS), 4))
def test_all_modes_in_one_ragged_plan(setup: Setup, heads: tuple[int, int, int]) -> None:
    bench = Bench(heads, *setup)
    mixed_plans(bench)


@pytest.mark.parametrize(("setup", "heads"), share(product(SETUPS, HEADS), 3))
def test_stored_ahead_and_blind(setup: Setup, heads: tuple[int, int, int]) -> None:
    ahead_and_blind(Bench(heads, *setup))


@pytest.mark.parametrize(("setup", "heads"), share(product(SETUPS, HEADS[:3]), 4))
def test_stairs(setup: Setup, heads: tuple[int, int, int]) -> None:
    bench = Bench(heads, *setup)
    bench.fill(1, 9)
    bench.fill(2, 20)
    bench.check(
        [
            span(0, 0, 11, 0, Store.POSITIONS, stair=4),
            span(1, 9, 6, 9, Store.NONE, stair=5),
            span(2, 4, 8, 20, Store.POSITIONS, stair=4),
        ],
        {},
    )


@pytest.mark.parametrize(("setup", "heads"), share(product(SETUPS, HEADS[:3]), 4))
def test_three_geometries_in_one_plan(setup: Setup, heads: tuple[int, int, int]) -> None:
    """Full attention, block-causal and autoregressive requests, in every state that they have."""
    bench = Bench(heads, *setup)
    for row, count in ((1, 20), (2, 8), (3, 8), (4, 9), (5, 14)):
        bench.fill(row, count)
    bench.check(
        [
            span(0, 0, 13, 13, Store.POSITIONS),  # full: a refresh
            span(1, 8, 4, 20, Store.POSITIONS),  # full: a block beside the rest of its canvas
            span(2, 8, 8, 8, Store.POSITIONS, stair=4),  # block-causal: a chunk, or a block and
            span(3, 8, 4, 8, Store.NONE),  # ... the next; a block against what is stored
            span(4, 9, 5, 9, Store.POSITIONS, stair=1),  # autoregressive: a chunk
            span(5, 14, 1, 14, Store.POSITIONS, stair=1),  # the next token
        ],
        {},
    )


@pytest.mark.parametrize("layer", [0, 1])
def test_layers_that_attend_in_their_own_ways(setup: Setup, layer: int) -> None:
    how: dict[str, Any] = {"attention": LAYERS, "layer": layer, "length": 220}
    windows(Bench((4, 2, 16), *setup, **how, scale=1.0 if setup[1] else 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_window_does_not_know(backend: str) -> None:
    bench = Bench((4, 2, 16), backend, 0, 4, attention=LAYERS)
    bench.fill(0, 20)
    for wrong in (
        span(0, 0, 9, 0, Store.SELECT_SHARED, keep=2, blk_len=4),
        span(0, 4, 9, 20, Store.AHEAD),
        span(0, 4, 9, 20, Store.NONE, blind=0),
    ):
        with pytest.raises(ValueError, match="cannot attend"):
            bench.check([wrong], {0: RowSelect(1, 4)})


@pytest.mark.parametrize(
    ("setup", "store", "kernel", "window"),
    share(
        product(
            SETUPS,
            [Store.SELECT_PER_HEAD, Store.SELECT_SHARED],
            [1, 2, 3, 4, 5, 41],
            [0, 3, 6, 100],
        ),
        11,
    ),
)
def test_selection_windows(setup: Setup, store: Store, kernel: int, window: int) -> None:
    bench = Bench((4, 2, 8), *setup)
    offset, width, total = 8, 3, 19
    until = min(offset + max(width, window), total)
    candidates = total - (until - offset) - setup[1]
    for place, count in enumerate(sorted({0, 1, candidates // 2, candidates})):
        how = {place: RowSelect(kernel, window)}
        one = span(place, 0, total, 0, store, keep=count, blk_off=offset, blk_len=width)
        bench.check([one], how)
        bench.check([span(place, offset, width, count, Store.NONE)], how)


@pytest.mark.parametrize("heads", HEADS[:3])
def test_selection_by_attention(setup: Setup, heads: tuple[int, int, int]) -> None:
    bench = Bench(heads, *setup)
    both = {"keep": 5, "blk_off": 6, "blk_len": 4}
    selects = {0: RowSelect(1, 4, True), 1: RowSelect(1, 4, True), 3: RowSelect(3, 7, True)}
    bench.check(
        [
            span(0, 0, 16, 0, Store.SELECT_PER_HEAD, **both),
            span(1, 0, 16, 0, Store.SELECT_PER_HEAD, **both),
            span(2, 0, 16, 0, Store.SELECT_PER_HEAD, **both),
            span(4, 0, 9, 0, Store.NONE),
            span(3, 0, 18, 0, Store.SELECT_SHARED, keep=7, blk_off=3, blk_len=2),
        ],
        {**selects, 2: RowSelect(1, 4)},
    )
    bench.check([span(3, 3, 4, 7, Store.NONE), span(1, 6, 4, 5, Store.NONE)], {})


def test_equal_shapes_with_other_settings_are_kept_apart(setup: Setup) -> None:
    bench = Bench((4, 2, 8), *setup)
    both = {"keep": 4, "blk_off": 6, "blk_len": 4}
    bench.check(
        [
            span(0, 0, 16, 0, Store.SELECT_PER_HEAD, **both),
            span(1, 0, 16, 0, Store.SELECT_PER_HEAD, **both),
            span(2, 0, 16, 0, Store.SELECT_SHARED, **both),
        ],
        {0: RowSelect(1, 4), 1: RowSelect(3, 4), 2: RowSelect(3, 4)},
    )


def test_random_plans(setup: Setup) -> None:
    """Rows that refresh and reuse in any order, as mixed requests do."""
    rng = random.Random(str(setup))
    bench = Bench((6, 2, 4), *setup)
    for _ in range(3 if setup[0] == "triton" else 12):  # see share()
        spans = []
        for row in rng.sample(range(8), rng.randint(1, 6)):
            known = len(bench.rows.get(row, {}))
            if known == LENGTH and rng.random() < 0.7:
                start = rng.randrange(LENGTH)
                length = rng.randint(1, LENGTH - start)
                mode = rng.choice([Store.NONE, Store.POSITIONS])
                ctx = LENGTH if mode == Store.POSITIONS else start
                spans.append(span(row, start, length, ctx, mode))
            else:
                spans.append(span(row, 0, LENGTH, 0, Store.POSITIONS))
        bench.check(spans, {})
