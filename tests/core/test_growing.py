"""Requests that grow, under a load that does not end: nobody waits for ever for pages."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from dllmserve.core.canvas import template_canvas
from dllmserve.core.plan import Span, Store
from dllmserve.core.request import Request, Status
from dllmserve.core.scheduler import Scheduler
from dllmserve.core.work import work_of
from dllmserve.errors import CapacityError, ContextLengthError
from dllmserve.sampling_params import SamplingParams
from tests.core.test_scheduler import Device, add_all, report, request, scheduler


def steps_until(
    under_test: Scheduler, wanted: list[Request], more: Callable[[int], Request], waiting: int = 2
) -> int:
    """Steps until some requests have ended, while others arrive so that some always wait."""
    device, number = Device(under_test), 1000
    while any(r.status is not Status.FINISHED for r in wanted):
        while len(under_test.waiting) < waiting:
            number += 1
            one = more(number)
            one.id = number
            under_test.add(one)
        device.step()
        assert device.steps < 500, "it waits for ever"
    return device.steps


def test_who_runs_gets_pages_before_who_waits() -> None:
    """Requests that reserve take all that is free as they are admitted, one after the other."""
    under_test = scheduler(num_pages=6, max_num_seqs=8, max_num_batched_tokens=1000)
    (grows,) = add_all(under_test, [request(0, prompt=8, gen=40, cache="paged", block=8)])
    steps_until(under_test, [grows], lambda n: request(n, 2, 3 + n % 4, "dual"), waiting=8)


OWNERS: list[dict[str, Any]] = [{"phases": "separate"}, {"cheap_tokens": 16}]


@pytest.mark.parametrize("options", OWNERS)
def test_who_waits_for_pages_holds_up_nobody(options: dict[str, Any]) -> None:
    """Neither by the phase that it would have, nor by its owner's tokens."""
    under_test = scheduler(num_pages=18, max_num_seqs=6, **options)
    made = [request(0, prompt=1, gen=72, cache="paged", block=8) for _ in range(4)]

    def other(number: int) -> Request:
        one = request(number, prompt=1, gen=6)
        one.owner = "b" if "cheap_tokens" in options else ""
        return one

    if "cheap_tokens" in options:
        for one, owner in zip(made, "caaa", strict=True):
            one.owner = owner
    steps_until(under_test, add_all(under_test, made), other)


def test_what_a_stair_sees_together_has_to_fit_a_step() -> None:
    """The answer's block is shorter than those of the prompt."""
    under_test = scheduler(max_num_batched_tokens=20)
    long = request(0, prompt=32, gen=5, cache="paged", block=32)
    with pytest.raises(CapacityError, match=r"64 tokens in one step.*raise it to 64 or shorten"):
        under_test.add(long)
    enough = scheduler(max_num_batched_tokens=64)
    enough.add(long)
    device = Device(enough)
    while enough.has_work:
        device.step()


def test_no_more_start_than_there_are_pages_for_their_prompts() -> None:
    under_test = scheduler(num_pages=9, max_num_seqs=4, max_num_batched_tokens=1000)
    add_all(under_test, [request(0, prompt=32, gen=8, cache="paged", block=8) for _ in range(4)])
    _, _, admitted = under_test.schedule()
    assert [r.id for r in admitted] == [0, 1]  # of four pages each


def test_pages_that_others_hold_too_are_not_gained_by_taking_them() -> None:
    under_test = scheduler(num_pages=4)
    old, young = add_all(under_test, [request(0, 1, 15, "paged", block=8) for _ in range(2)])
    under_test.schedule()
    storage = under_test.storage
    young.pages = storage.pages.reserve(4)
    storage.pages.share(young.pages[:3])
    stores = Span(old.row, 0, 8, 0, Store.POSITIONS)
    assert storage.grow(old, storage.missing(old, stores._replace(q_len=16)), [young]) is False
    assert len(young.pages) == 4
    assert storage.grow(old, storage.missing(old, stores), [young])
    assert len(old.pages) == 1 and not young.pages


def test_who_is_dropped_waits_for_no_pages() -> None:
    under_test = scheduler(num_pages=6, max_num_seqs=2)
    made = [request(0, 1, 40, "paged", block=8), *(request(0, 2, 30, "dual") for _ in range(2))]
    grows, holds, last = add_all(under_test, made)
    device = Device(under_test)
    while not under_test._short:
        device.step()
    under_test.abort(grows)
    under_test.abort(holds)
    assert under_test.schedule()[2] == [last]


def test_a_canvas_may_be_longer_than_what_was_asked_for() -> None:
    """Blocks that are cut from 0 on end behind the answer; all of them have to have room."""
    canvas = template_canvas([1] * 120, [(120, 136)], 8)
    with pytest.raises(ContextLengthError, match="136 tokens, over max_model_len=128"):
        scheduler().add(Request(0, canvas, SamplingParams(gen_length=8), 0))


def test_an_older_request_takes_the_pages_of_a_younger_one() -> None:
    under_test = scheduler(num_pages=6, max_num_seqs=3)
    made = [request(0, prompt=15, gen=30, cache="paged", block=8, fork=n) for n in (0, 90)]
    old, young = add_all(under_test, made)
    device = Device(under_test)
    taken = 0
    while under_test.has_work:
        before = len(young.pages)
        device.step()
        taken += len(young.pages) < before and young.status is Status.RUNNING
    assert taken
    assert device.stored > old.blocks[-1][0] + young.blocks[-1][0]  # some of it twice
    assert device.order == [0, 1]


def test_pages_are_taken_as_they_are_needed() -> None:
    under_test = scheduler()
    (one,) = add_all(under_test, [request(0, prompt=20, gen=30, cache="paged", block=8)])
    device, held = Device(under_test), []
    while under_test.has_work:
        device.step()
        held.append(len(one.pages))
    assert held[0] == 3  # those of the prompt and the first block
    assert max(held) == 7 and held[:-1] == sorted(held[:-1])


def test_a_long_prompt_is_stored_in_chunks_that_end_at_blocks() -> None:
    under_test = scheduler(max_num_batched_tokens=37, num_pages=20)
    add_all(under_test, [request(0, prompt=90, gen=8, cache="paged", block=8)])
    chunks = []
    while under_test.has_work:
        plan, requests, _ = under_test.schedule()
        chunks += [(e.span.q_start, e.span.q_len) for e in plan.entries if not e.head_rows]
        for r in under_test.commit(requests, [report(r) for r in requests]):
            under_test.release(r)
    assert chunks == [(0, 32), (32, 32)]  # the rest is stored with the first block


def test_a_long_prompt_does_not_stall_those_that_decode() -> None:
    """Eight decode; a ninth stores its prompt in chunks that are no larger than their own share."""
    big = {"max_model_len": 900, "max_num_batched_tokens": 900, "num_pages": 300}
    under_test = scheduler(**big, max_num_seqs=9, cheap_tokens=30)
    add_all(under_test, [request(i, prompt=3, gen=80, cache="paged", block=4) for i in range(8)])
    device = Device(under_test)
    device.step()
    late = request(8, prompt=800, gen=4, cache="paged", block=4)
    add_all(under_test, [late])
    chunks = []
    while late.progress.stored < 792:
        plan, requests, _ = under_test.schedule()
        under_test.commit(requests, [report(r) for r in requests])
        assert len(requests) == 9
        chunks.append(
            next(e.tokens for r, e in zip(requests, plan.entries, strict=True) if r is late)
        )
    # what eight decode is at least 8 * 4 tokens and at most 8 * 8
    assert all(28 <= tokens <= 64 for tokens in chunks[:-1])


def test_many_prompts_are_not_held_up_by_one_that_decodes() -> None:
    big = {"max_model_len": 900, "max_num_batched_tokens": 900, "num_pages": 900}
    under_test = scheduler(**big, max_num_seqs=9, cheap_tokens=30)
    add_all(under_test, [request(0, prompt=3, gen=80, cache="paged", block=4)])
    Device(under_test).step()
    add_all(under_test, [request(i, prompt=800, cache="paged", block=4, fork=i) for i in range(8)])
    plan, _, _ = under_test.schedule()
    assert plan.tokens >= 900 * 8 // 12


def computed(under_test: Scheduler, made: list[Request]) -> float:
    """Tokens computed, in units of those that are needed."""
    tokens, needed = 0, sum(map(work_of, add_all(under_test, made)))
    while under_test.has_work:
        plan, requests, _ = under_test.schedule()
        tokens += plan.tokens
        for one in under_test.commit(requests, [report(r) for r in requests]):
            under_test.release(one)
    return tokens / needed


def test_little_is_computed_anew_where_pages_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that start, or come back, leave some pages to those that run."""
    dice = random.Random(1)
    lengths = [dice.randint(5, 250) for _ in range(64)]

    def made() -> list[Request]:
        return [request(0, prompt=50, gen=gen, cache="paged", block=1) for gen in lengths]

    sizes: dict[str, Any] = {
        "num_pages": 250,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 1000,
        "prefix_caching": False,
    }
    spared = computed(scheduler(**sizes, max_model_len=300), made())
    monkeypatch.setattr(Scheduler, "_may_begin", lambda *_: True)
    assert spared < 1.2 < 1.7 < computed(scheduler(**sizes, max_model_len=300), made())
