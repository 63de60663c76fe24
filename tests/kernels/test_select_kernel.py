"""The selection kernels against the slow twin, ties by position."""

import pytest
import torch
from torch import Tensor

from dllmserve.core.plan import Span
from dllmserve.core.plan import Store as How
from dllmserve.core.rows import RowSelect
from dllmserve.kernels.select import keep_best, plan_selection
from tests.attention.naive import keep
from tests.kernels.store import Store, span

PER_HEAD, SHARED = How.SELECT_PER_HEAD, How.SELECT_SHARED


def run(
    store: Store,
    spans: list[Span],
    selects: dict[int, RowSelect],
    fresh: tuple[Tensor, Tensor, Tensor],
    shift: int,
) -> None:
    """The launches for the selecting spans of a plan."""
    chosen = [(i, s, selects[s.row]) for i, s in enumerate(spans) if s.store >= PER_HEAD]
    plan = plan_selection(chosen, (store.heads, store.kv_heads, store.dim), shift, store.device)
    q, k, v = (x.to(store.device) for x in fresh)
    fields, starts = store.packed(spans)
    keep_best(plan, q, k, v, store.k, store.v, fields, starts, store.table, store.page)


def check(
    store: Store,
    spans: list[Span],
    selects: dict[int, RowSelect],
    shift: int = 0,
    fresh: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    fresh = fresh or store.fresh(sum(s.q_len for s in spans))
    run(store, spans, selects, fresh, shift)
    low = 0
    for one in spans:
        q, k, v = (x[low : low + one.q_len].float() for x in fresh)
        low += one.q_len
        if one.store >= PER_HEAD:
            kept = keep(one, q, k, v, selects[one.row], shift, "position")
            same = {slot: (a.to(store.dtype), b.to(store.dtype)) for slot, (a, b) in kept.items()}
            store.rows.setdefault(one.row, {}).update(same)
    store.check_slots()


@pytest.mark.parametrize("heads", [(7, 1, 6), (4, 2, 8)])
@pytest.mark.parametrize("shift", [0, 1])
def test_mixed_plan(heads: tuple[int, int, int], shift: int, device: torch.device) -> None:
    """Both modes, blocks at either end, every kind of window, between spans that do not select."""
    store = Store(heads, device, page=7)
    check(
        store,
        [
            span(0, 0, 63, 0, PER_HEAD, keep=20, blk_off=17, blk_len=5),
            span(1, 4, 3, 0, How.NONE),
            span(2, 0, 100, 0, SHARED, keep=49, blk_off=0, blk_len=1),
            span(3, 0, 17, 0, PER_HEAD, keep=0, blk_off=15, blk_len=2),
        ],
        {0: RowSelect(3, 0), 2: RowSelect(4, 32), 3: RowSelect(1, 100)},
        shift,
    )


@pytest.mark.parametrize("kernel", [1, 2, 3, 8, 41, 1000])
def test_pooling_and_its_ties(kernel: int, device: torch.device) -> None:
    """A wide pool makes all scores equal, so only the position decides."""
    store = Store((2, 2, 8), device, page=4, rows=2)
    plan = [
        span(0, 0, 25, 0, PER_HEAD, keep=8, blk_off=9, blk_len=4),
        span(1, 0, 25, 0, SHARED, keep=8, blk_off=9, blk_len=4),
    ]
    check(store, plan, {0: RowSelect(kernel, 0), 1: RowSelect(kernel, 0)})


@pytest.mark.parametrize("count", [0, 1, 12, 13])
def test_every_number_of_kept_tokens(count: int, device: torch.device) -> None:
    store = Store((2, 1, 8), device)
    one = span(0, 0, 17, 0, PER_HEAD, keep=count, blk_off=5, blk_len=4)
    check(store, [one], {0: RowSelect(3, 0)})


def test_equal_keys_of_either_sign(device: torch.device) -> None:
    """Scores of 0, -0, equal ones and infinities: the lower position wins."""
    store = Store((1, 1, 2), device)
    first = [0.0, -0.0, 1.0, 0.0, 1.0, -torch.inf, -3.0, -0.0, 1e-40, torch.inf, 1.0, -3.0]
    k = torch.zeros(14, 1, 2)
    k[2:, 0, 0] = torch.tensor(first)
    q, v = torch.zeros(14, 1, 2), store.random(14, 1)
    q[:, 0, 0] = 1.0
    k[2:, 0, 1] = 0.0
    for row, count in enumerate((3, 5, 8, 11)):
        one = span(row, 0, 14, 0, PER_HEAD, keep=count, blk_off=0, blk_len=2)
        check(store, [one], {row: RowSelect(1, 0)}, fresh=(q, k, v))


def test_no_candidates(device: torch.device) -> None:
    store = Store((2, 1, 8), device)
    one = span(0, 0, 9, 0, PER_HEAD, keep=0, blk_off=0, blk_len=9)
    check(store, [one], {0: RowSelect(3, 32)})


def test_scores_that_are_not_numbers_still_fill_all_slots(device: torch.device) -> None:
    store = Store((2, 2, 8), device)
    q, k, v = store.fresh(30)
    k[[3, 20], 0] = torch.nan
    one = span(0, 0, 30, 0, PER_HEAD, keep=9, blk_off=10, blk_len=4)
    run(store, [one], {0: RowSelect(2, 0)}, (q, k, v), 0)
    places = store.places(0, 100)
    written = ~store.v[places].isnan().all(dim=-1)  # [100, Hkv]
    assert written[:9].all() and not written[9:].any()


def test_bfloat16(device: torch.device) -> None:
    store = Store((4, 2, 16), device, dtype=torch.bfloat16)
    one = span(0, 0, 80, 0, PER_HEAD, keep=30, blk_off=20, blk_len=9)
    check(store, [one], {0: RowSelect(3, 16)})
