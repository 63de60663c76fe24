"""Requests that begin alike: nobody waits for ever, nothing is computed twice."""

import pytest

from dllmserve.core.canvas import framed_canvas, window_canvas
from dllmserve.core.plan import EntryReport, Kind
from dllmserve.core.request import Request, Status
from dllmserve.core.scheduler import Scheduler
from dllmserve.sampling_params import SamplingParams
from tests.core.test_scheduler import add_all, report, request, scheduler

ROOMY = {
    "max_model_len": 5000,
    "page_size": 32,
    "num_pages": 2000,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 64,
    "max_logit_rows": 1000,
}


def step(under_test: Scheduler) -> dict[int, tuple[Kind, int]]:
    """What was in a step, and how many tokens, by request."""
    plan, requests, _ = under_test.schedule()
    assert plan.entries or not under_test.running
    for one in under_test.commit(requests, [report(r) for r in requests]):
        under_test.release(one)
    under_test.check_integrity()
    pairs = zip(requests, plan.entries, strict=True)
    return {r.id: (entry.kind, entry.tokens) for r, entry in pairs}


def test_pages_that_two_share_are_free_when_both_let_them_go() -> None:
    """An older request takes them from both; it would wait for ever for what neither has alone."""
    sizes = {"max_model_len": 400, "page_size": 1, "num_pages": 214}
    under_test = scheduler(**sizes, max_num_batched_tokens=1000)
    first = request(1, prompt=32, gen=8, cache="paged", block=8)
    add_all(under_test, [first])
    while first.status is not Status.FINISHED:
        step(under_test)
    large = request(2, prompt=64, gen=128, cache="paged", block=64, fork=0)
    under_test.add(large)
    for _ in range(62):
        step(under_test)
    for number in (3, 4):
        under_test.add(request(number, prompt=32, gen=64, cache="paged", block=8))
    while under_test.has_work:
        assert step(under_test)


def shifted(number: int, prompt: int, window: int, framed: bool) -> Request:
    ids, params = [1] * prompt, SamplingParams(gen_length=20, block_length=window)
    canvas = framed_canvas(ids, 20, window) if framed else window_canvas(ids, 20, window, 1)
    return Request(number, canvas, params, 0)


@pytest.mark.parametrize("prompt", [319, 320, 321])
@pytest.mark.parametrize(("window", "framed"), [(1, False), (32, False), (8, True)])
def test_equal_prompts_start_together(prompt: int, window: int, framed: bool) -> None:
    """All but the first wait one step, also where the first token is read inside a last page."""
    under_test = scheduler(**ROOMY)
    add_all(under_test, [shifted(i, prompt, window, framed) for i in range(32)])
    step(under_test)
    assert len(step(under_test)) == 32


@pytest.mark.parametrize(("prompt", "others"), [(4080, 0), (810, 20), (3000, 20)])
def test_equal_prompts_are_computed_once(prompt: int, others: int) -> None:
    """Whatever the chunks: the rest of a step is no page, chunks beside others end anywhere."""
    under_test = scheduler(**ROOMY, cheap_tokens=30)
    for number in range(others):
        under_test.add(request(100 + number, prompt=3, gen=200, cache="paged", block=1, fork=0))
    step(under_test)
    pair = [request(n, prompt=prompt, gen=4, cache="paged", block=1, fork=9999) for n in (0, 1)]
    for one in pair:
        under_test.add(one)
    tokens = 0
    while any(one.status is not Status.FINISHED for one in pair):
        tokens += sum(count for number, (_, count) in step(under_test).items() if number < 2)
    assert tokens < 1.1 * prompt + 100


def test_a_window_may_be_larger_than_the_share_of_prompts() -> None:
    """A chunk is one window at least; others that come and go do not hold it up for ever."""
    sizes = {**ROOMY, "page_size": 8, "max_num_batched_tokens": 1000}
    under_test, number = scheduler(**sizes), 100
    late = request(0, prompt=1500, gen=4, cache="paged", block=256, fork=0)
    for steps in range(60):
        while len(under_test.running) + len(under_test.waiting) < 45:
            number += 1
            under_test.add(request(number, prompt=3, gen=40, cache="paged", block=2, fork=0))
        if steps == 1:
            under_test.add(late)
        step(under_test)
    assert late.status is Status.FINISHED


def test_pages_with_broken_numbers_are_not_found_again() -> None:
    under_test = scheduler(**ROOMY)
    one, other = (request(n, prompt=320, cache="paged", block=1, fork=999) for n in (1, 2))
    under_test.add(one)
    step(under_test)
    _, requests, _ = under_test.schedule()
    broken = EntryReport(masks_left=0, frontier=1, eos=-1, broken=1)
    assert under_test.commit(requests, [broken]) == [one]
    under_test.release(one)
    under_test.add(other)
    step(under_test)
    assert other.prefix is not None and other.prefix.cached == 0
