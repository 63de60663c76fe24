"""The attention kernel against the naive loops, where shapes are hard."""

import pytest
import torch
from torch import Tensor

from dllmserve.core.plan import Span
from dllmserve.core.plan import Store as How
from dllmserve.kernels import attention
from tests.attention.naive import attend
from tests.kernels.store import Store, span

EXACT = {"atol": 1e-5, "rtol": 1e-5}


def expected(
    store: Store, spans: list[Span], fresh: tuple[Tensor, Tensor, Tensor], window: int = 0
) -> Tensor:
    """What the loops make of the plan, in float64; the store's known slots are updated."""
    outs, low = [], 0
    for one in spans:
        q, k, v = (x[low : low + one.q_len] for x in fresh)
        low += one.q_len
        slots = store.rows.setdefault(one.row, {})
        wide = {slot: (k.double(), v.double()) for slot, (k, v) in slots.items()}
        outs.append(attend(one, q.double(), k.double(), v.double(), wide, window, store.scale))
        if one.store == How.POSITIONS:
            slots.update({one.q_start + i: (k[i], v[i]) for i in range(one.q_len)})
    return torch.cat(outs).to(fresh[0].dtype)


def check(
    store: Store,
    spans: list[Span],
    tolerance: dict[str, float] = EXACT,
    window: int = 0,
    **options: bool,
) -> None:
    fresh = store.fresh(sum(s.q_len for s in spans))
    out = store.attend(spans, fresh, window=window, **options)
    torch.testing.assert_close(out, expected(store, spans, fresh, window), **tolerance)
    store.check_slots()


@pytest.mark.parametrize("length", [1, 17, 63, 100])
def test_odd_lengths(length: int, device: torch.device) -> None:
    """Refresh, then reuse behind, inside and instead of what is cached; pages of 5 and 7."""
    store = Store((2, 1, 8), device, page=5 if length % 2 else 7)
    check(store, [span(0, 0, length, 0, How.POSITIONS)])
    check(store, [span(0, length // 2, 1, length, How.POSITIONS)])
    check(store, [span(0, length // 2, length - length // 2, length // 2, How.NONE)])


@pytest.mark.parametrize("heads", [(7, 1, 6), (14, 2, 20), (3, 3, 5), (2, 1, 320)])
def test_ragged_batch_of_grouped_heads(heads: tuple[int, int, int], device: torch.device) -> None:
    store = Store(heads, device, page=3)
    for row, count in ((0, 70), (1, 9)):
        store.fill(row, count)
    plan = [
        span(0, 30, 9, 70, How.POSITIONS),  # keys before and behind what it overwrites
        span(1, 9, 3, 9, How.NONE),
        span(2, 0, 1, 0, How.NONE),  # sees itself only
        span(3, 0, 21, 0, How.POSITIONS),
    ]
    check(store, plan, padding=2, strided=True)


def test_overlaps_of_context_and_span(device: torch.device) -> None:
    """The context ends inside the span, at its start, before it, behind it."""
    store = Store((4, 2, 8), device, page=4, slots=40)
    for row in range(4):
        store.fill(row, 30)
    for mode in (How.NONE, How.POSITIONS):
        for start in (0, 5):
            ends = (start + 3, start, max(start - 2, 0), start + 20)
            check(store, [span(r, start, 7, ctx, mode) for r, ctx in enumerate(ends)])


def test_stairs(device: torch.device) -> None:
    store = Store((4, 2, 8), device, page=6)
    store.fill(1, 80)
    store.fill(2, 20)
    check(
        store,
        [
            span(0, 0, 70, 0, How.POSITIONS, stair=16),
            span(1, 3, 5, 80, How.POSITIONS, stair=4),  # whole tiles of keys that none may see
            span(2, 20, 9, 20, How.NONE, stair=7),
        ],
    )


def test_three_geometries_in_one_plan(device: torch.device) -> None:
    """Full attention, block-causal and autoregressive requests, in one launch."""
    store = Store((4, 2, 8), device, page=6, rows=6)
    for row, count in ((0, 60), (1, 24), (2, 24), (3, 33)):
        store.fill(row, count)
    check(
        store,
        [
            span(0, 20, 8, 60, How.POSITIONS),
            span(1, 24, 8, 24, How.POSITIONS, stair=4),
            span(2, 24, 4, 24, How.NONE),
            span(3, 33, 1, 33, How.POSITIONS, stair=1),
            span(4, 0, 40, 0, How.POSITIONS, stair=1),
            span(5, 0, 40, 40, How.POSITIONS),
        ],
    )


def test_windows(device: torch.device) -> None:
    """What no query of a tile sees is not read: it would poison the sums."""
    store, window = Store((4, 2, 8), device, page=6, slots=300), 20
    for row, count in ((0, 200), (1, 260), (2, 0), (3, 130)):
        store.fill(row, count)
    for row, count in ((0, 128), (1, 192), (3, 64)):  # steps of 64 keys before the windows
        places = store.places(row, count)
        store.k[places], store.v[places] = torch.nan, torch.nan
        for slot in range(count):
            nothing = torch.full((2, 8), torch.nan)
            store.rows[row][slot] = (nothing, nothing)
    plan = [
        span(0, 200, 30, 200, How.NONE),
        span(1, 260, 17, 260, How.POSITIONS, stair=1),
        span(2, 0, 120, 0, How.POSITIONS, stair=1),  # whole tiles of the span itself
        span(3, 130, 9, 130, How.POSITIONS, stair=4),
    ]
    fresh = store.fresh(sum(s.q_len for s in plan))
    low = plan[0].q_len + plan[1].q_len
    together = store.attend(plan, fresh, window=window, padding=1)
    torch.testing.assert_close(together, expected(store, plan, fresh, window), **EXACT)
    store.check_slots()
    mine = slice(low, low + plan[2].q_len)
    alone = store.attend([plan[2]], (fresh[0][mine], fresh[1][mine], fresh[2][mine]), window=window)
    assert torch.equal(alone, together[mine])


def test_whole_spans_are_left_to_others(device: torch.device) -> None:
    store = Store((2, 2, 8), device, page=3)
    for row, count in ((1, 12), (2, 8)):
        store.fill(row, count)
    plan = [
        span(0, 0, 33, 33, How.POSITIONS),
        span(1, 0, 12, 4, How.NONE),  # covers its context but must read it
        span(2, 0, 6, 8, How.POSITIONS),
        span(3, 0, 5, 0, How.NONE),
    ]
    assert [s.refresh for s in plan] == [True, False, False, True]
    fresh = store.fresh(sum(s.q_len for s in plan))
    out = store.attend(plan, fresh, skip_whole=True)
    wanted = expected(store, plan, fresh)
    assert bool(out[:33].isnan().all()) and bool(out[-5:].isnan().all())
    torch.testing.assert_close(out[33:-5], wanted[33:-5], **EXACT)
    store.check_slots()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(2, 2, 24), (7, 1, 64), (8, 1, 512)])
def test_half_precision(
    dtype: torch.dtype, heads: tuple[int, int, int], device: torch.device
) -> None:
    """Within rounding of a float64 reference; the context is split where that helps."""
    store = Store(heads, device, dtype=dtype, page=32, slots=700, rows=2)
    for row in range(2):
        store.fill(row, 650)
    step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    tolerance = {"atol": 2 * step, "rtol": 2 * step}
    check(store, [span(0, 100, 9, 650, How.POSITIONS), span(1, 0, 3, 0, How.NONE)], tolerance)
    check(store, [span(0, 640, 5, 640, How.NONE)], tolerance, window=400)


def test_when_the_context_is_split() -> None:
    parts = attention.parts_for
    assert parts(torch.float32, 4, 100_000) == 1
    assert parts(torch.bfloat16, 10_000, 100_000) == 1
    assert parts(torch.bfloat16, 4, 255) == 1
    assert parts(torch.bfloat16, 4, 256) == 2
    assert parts(torch.bfloat16, 4, 512) == 4
    assert parts(torch.bfloat16, 4, 100_000) == 16


def test_float32_does_not_depend_on_the_batch(device: torch.device) -> None:
    heads = (6, 2, 16)
    store = Store(heads, device, page=8)
    for row, count in ((0, 90), (1, 20), (2, 44)):
        store.fill(row, count)
    plan = [
        span(1, 20, 3, 20, How.NONE),
        span(0, 30, 13, 90, How.NONE),
        span(2, 0, 70, 44, How.NONE),
        span(3, 0, 5, 0, How.NONE),
    ]
    fresh = store.fresh(sum(s.q_len for s in plan))
    together, low = store.attend(plan, fresh, padding=3), 0
    for one in plan:
        mine = slice(low, low + one.q_len)
        low += one.q_len
        alone = store.attend([one], (fresh[0][mine], fresh[1][mine], fresh[2][mine]))
        assert torch.equal(alone, together[mine])
