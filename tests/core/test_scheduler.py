"""The scheduler under drawn requests, with a device that is simulated by a few lines."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmserve.catalog import CACHES
from dllmserve.core.limits import Limits
from dllmserve.core.plan import EntryReport, Span, Store
from dllmserve.core.request import Request, Status
from dllmserve.core.scheduler import HEAD_CHUNKS, MAX_LOOKED_PAST, MAX_SKIPS, Scheduler
from dllmserve.errors import CapacityError, EngineError
from dllmserve.sampling_params import SamplingParams
from dllmserve.sparse.state import SparseConfig
from tests.helpers import PLAIN, prompt_request
from tests.paged import frontier, paged_request

LIMITS = {
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 150,
    "max_logit_rows": 40,
    "page_size": 8,
    "num_pages": 20,
}


def scheduler(**changes: Any) -> Scheduler:
    policies = {name: CACHES[name].load()() for name in CACHES}
    return Scheduler(PLAIN, Limits(**{**LIMITS, **changes}), policies.__getitem__)


def request(
    number: int,
    prompt: int = 5,
    gen: int = 8,
    cache: str = "none",
    cfg: float = 0.0,
    block: int | None = None,
    unmask: str = "steps",
    fork: int = 90,
) -> Request:
    """Prompts are alike up to ``fork``."""
    ids = ([1] * fork + [2] * prompt)[:prompt]
    sparse = SparseConfig(default_block_len=4) if cache == "sparse" else None
    params = SamplingParams(
        gen_length=gen,
        steps=gen,
        block_length=block,
        cfg_scale=cfg,
        unmask=unmask,
        cache="none" if cache in ("sparse", "paged", "framed") else cache,
        sparse=sparse,
        sub_block_length=(block or 2) // 2 or 1 if cache == "sub_block" else None,
    )
    if cache == "framed" or CACHES[cache].windowed:
        return paged_request(number, ids, params, framed=cache == "framed")
    return prompt_request(number, ids, params)


REQUESTS = st.lists(
    st.builds(
        request,
        st.just(0),
        prompt=st.integers(1, 60),
        gen=st.integers(1, 20),
        cache=st.sampled_from(sorted(n for n, info in CACHES.items() if not info.windowed)),
        cfg=st.sampled_from([0.0, 0.0, 1.0]),
        block=st.sampled_from([None, 3, 8]),
        unmask=st.sampled_from(["steps", "threshold"]),
    ),
    min_size=1,
    max_size=25,
)


class Device:
    """Runs plans: each step writes the quota, or one token."""

    def __init__(self, under_test: Scheduler) -> None:
        self.scheduler = under_test
        self.steps = 0
        self.order: list[int] = []  # ids by admission
        self.last_seen: dict[int, int] = {}
        self.longest_wait = 0
        self.stored = 0
        #: pages of each row; what stands in each slot of the store, see :meth:`kept`
        self.table: dict[int, dict[int, int]] = {}
        self.slots: dict[int, tuple[object, int]] = {}

    def step(self) -> list[Request]:
        plan, requests, admitted = self.scheduler.schedule()
        limits = self.scheduler.limits
        plan.validate(limits.max_model_len)
        assert plan.entries
        assert plan.tokens <= limits.max_num_batched_tokens
        assert len(plan.spans) <= limits.max_num_seqs
        rows = sum(e.logit_rows for e in plan.entries)
        assert rows <= limits.max_logit_rows * HEAD_CHUNKS or len(plan.entries) == 1
        self.order += [r.id for r in admitted]
        for r in requests:
            since = self.last_seen.get(r.id, self.steps - 1)
            self.longest_wait = max(self.longest_wait, self.steps - since)
            self.last_seen[r.id] = self.steps
        for r in admitted:
            self.last_seen.setdefault(r.id, self.steps)
        for new in plan.pages:
            self.table.setdefault(new.row, {})[new.column] = new.page
        for r, entry in zip(requests, plan.entries, strict=True):
            for span in (entry.span, entry.uncond):
                if span is not None and r.policy != "sparse":  # which keeps what it selects
                    self.attend(r, span)
        self.steps += 1
        finished = self.scheduler.commit(requests, [report(r) for r in requests])
        for r in finished:
            self.scheduler.learn(r, self.answer(r))
            self.scheduler.release(r)
        self.scheduler.check_integrity()
        return finished

    def answer(self, r: Request) -> list[int]:
        """What it is: the same of all requests that are alike."""
        return [1] * r.canvas.answer_len

    def kept(self, r: Request, position: int, final: int) -> tuple[object, int]:
        """K and V of a position: final ones follow from the tokens that it sees, others from r."""
        if position >= final:
            return r.id, position
        seen = -(-(position + 1) // r.canvas.window) * r.canvas.window
        return tuple([*r.canvas.ids, *self.answer(r)][:seen]), position

    def slot(self, row: int, position: int) -> int:
        size = self.scheduler.limits.page_size
        return self.table[row][position // size] * size + position % size

    def attend(self, r: Request, span: Span) -> None:
        """Every slot that a span reads holds what its request's position has; it may store."""
        queries = range(span.q_start, span.q_start + span.reach)
        stores = span.store in (Store.POSITIONS, Store.AHEAD)
        for position in range(span.ctx_len):
            if not (stores and position in queries):
                kept = self.kept(r, position, r.progress.stored)
                assert self.slots[self.slot(span.row, position)] == kept
        if stores:
            self.slots |= {self.slot(span.row, p): self.kept(r, p, span.final) for p in queries}
        self.stored += max(span.final - span.q_start, 0)


def report(r: Request) -> EntryReport:
    if not r.progress.deciding:
        return EntryReport(0, frontier=0, eos=-1)
    wrote = 1
    if r.quotas:
        wrote = r.quotas[r.progress.block][r.progress.step_in_block]
    left = r.progress.masks_left - wrote
    return EntryReport(left, frontier=frontier(r, left), eos=-1)


def add_all(under_test: Scheduler, requests: Sequence[Request]) -> list[Request]:
    """Queue what can ever fit, numbered in order."""
    accepted = []
    for r in requests:
        r.id = len(accepted)
        try:
            under_test.add(r)
        except CapacityError:
            assert not fits(under_test, r)
            continue
        assert fits(under_test, r)
        accepted.append(r)
    return accepted


def fits(under_test: Scheduler, r: Request) -> bool:
    limits = under_test.limits
    rows = 2 if r.params.cfg_scale else 1
    pages = under_test.storage.most_pages(r) * rows
    length = min(r.canvas.frame or 2 * r.canvas.window or r.canvas_len, r.canvas_len)
    tokens = length * rows
    return (
        tokens <= limits.max_num_batched_tokens
        and rows <= limits.max_num_seqs
        and pages <= limits.num_pages
    )


@settings(max_examples=200)
@given(
    REQUESTS,
    st.integers(1, 6),
    st.integers(70, 300),
    st.integers(2, 60),
    st.integers(4, 30),
    st.sampled_from(["auto", "mixed", "separate"]),
    st.sampled_from([1, 40, 10**6]),
)
def test_everything_ends_and_nothing_starves(
    requests: list[Request],
    rows: int,
    tokens: int,
    logit_rows: int,
    pages: int,
    phases: str,
    refresh_tokens: int,
) -> None:
    under_test = scheduler(
        max_num_seqs=rows,
        max_num_batched_tokens=tokens,
        max_logit_rows=logit_rows,
        num_pages=pages,
        phases=phases,
        max_refresh_tokens=refresh_tokens,
    )
    accepted = add_all(under_test, requests)
    device = Device(under_test)
    while under_test.has_work:
        device.step()
    assert sorted(device.order) == [r.id for r in accepted]
    assert all(r.status is Status.FINISHED for r in accepted)
    assert all(r.finish_reason == "length" for r in accepted)
    assert device.longest_wait <= rows  # at worst, one running request a step
    assert under_test.storage.pages.num_free == pages
    for r in accepted:
        younger = device.order[: device.order.index(r.id)]
        # once it has been skipped MAX_SKIPS times, nobody passes it any more
        assert sum(other > r.id for other in younger) <= MAX_SKIPS
        expected = sum(len(q) for q in r.quotas) if r.quotas else r.params.gen_length
        assert r.progress.forwards == expected


GROWING = st.builds(
    request,
    st.just(0),
    prompt=st.integers(1, 90),
    gen=st.integers(1, 30),
    cache=st.sampled_from(["paged", "paged", "framed", "framed", "sub_block", "dual", "none"]),
    cfg=st.sampled_from([0.0, 0.0, 1.0]),
    block=st.sampled_from([1, 3, 8]),
    unmask=st.sampled_from(["steps", "threshold"]),
    fork=st.sampled_from([0, 21, 90]),
)


@settings(max_examples=200)
@given(
    st.lists(GROWING, min_size=1, max_size=20),
    st.integers(1, 6),
    st.integers(20, 200),
    st.integers(1, 30),
    st.sampled_from(["auto", "mixed", "separate"]),
    st.sampled_from([1, 40, 10**6]),
    st.booleans(),
    st.sampled_from([(False, False), (True, False), (True, True)]),
    st.dictionaries(st.integers(1, 60), st.integers(0, 19), max_size=3),
)
def test_requests_that_grow_end_beside_others_however_few_pages_there_are(
    requests: list[Request],
    rows: int,
    tokens: int,
    pages: int,
    phases: str,
    refresh_tokens: int,
    owned: bool,
    prefix: tuple[bool, bool],
    aborted: dict[int, int],
) -> None:
    """What an older request takes from a younger one is computed anew, and all come to an end.

    What is shared, is shared with those alone whose position has the same K and V.
    """
    under_test = scheduler(
        max_num_seqs=rows,
        max_num_batched_tokens=tokens,
        num_pages=pages,
        phases=phases,
        max_refresh_tokens=refresh_tokens,
        cheap_tokens=16 if owned else 0,
        prefix_caching=prefix[0],
        prefix_isolation=prefix[1],
    )
    for r in requests:
        r.owner = "ab"[r.prompt_len % 2] if owned else ""
    accepted = add_all(under_test, requests)
    device = Device(under_test)
    while under_test.has_work:
        device.step()
        assert device.steps < 100 * sum(len(r.canvas) for r in accepted)
        for r in accepted:
            if aborted.get(device.steps) == r.id:
                under_test.abort(r)
                under_test.check_integrity()
    accepted = [r for r in accepted if r.status is not Status.ABORTED]
    assert {r.id for r in accepted} <= {*device.order}
    assert len({*device.order}) == len(device.order)
    assert all(r.finish_reason == "length" for r in accepted)
    assert under_test.storage.pages.num_free == pages
    for r in accepted:
        expected = sum(len(q) for q in r.quotas) if r.quotas else sum(r.masks)
        assert r.progress.forwards == expected


@settings(max_examples=60)
@given(REQUESTS, st.lists(st.integers(0, 30), max_size=40))
def test_abort_in_every_state(requests: list[Request], victims: list[int]) -> None:
    under_test = scheduler()
    accepted = add_all(under_test, requests)
    device = Device(under_test)
    for victim in victims:
        if under_test.has_work:
            device.step()
        if victim < len(accepted):
            chosen = accepted[victim]
            before = chosen.status
            under_test.abort(chosen)
            ended = before in (Status.FINISHED, Status.ABORTED)
            assert chosen.status is (before if ended else Status.ABORTED)
            under_test.check_integrity()
    for r in accepted:
        under_test.abort(r)
        under_test.abort(r)  # a second time changes nothing
    assert not under_test.has_work
    under_test.check_integrity()
    assert under_test.storage.pages.num_free == LIMITS["num_pages"]


def test_first_come_first_served() -> None:
    under_test = scheduler(max_num_seqs=2)
    requests = add_all(under_test, [request(0) for _ in range(6)])
    device = Device(under_test)
    while under_test.has_work:
        device.step()
    assert device.order == [r.id for r in requests]


def test_a_large_request_is_skipped_a_bounded_number_of_times() -> None:
    """A guided request that needs both rows waits, but not for ever."""
    under_test = scheduler(max_num_seqs=2)
    small = [request(0, gen=4 + i % 3) for i in range(60)]
    add_all(under_test, [small[0], request(0, cfg=1.0), *small[1:]])
    device = Device(under_test)
    while under_test.has_work:
        device.step()
    assert device.order.index(1) == 1 + MAX_SKIPS


def test_skipped_requests_keep_their_place() -> None:
    under_test = scheduler(num_pages=4)
    requests = [request(0, 15, 8, "dual"), request(0, 20, 8, "dual"), request(0), request(0, 3)]
    add_all(under_test, requests)
    _, _, admitted = under_test.schedule()
    assert [r.id for r in admitted] == [0, 2, 3]
    assert [r.id for r in under_test.waiting] == [1]
    assert requests[1].skipped == 2


def test_a_long_queue_costs_no_more_than_a_short_one() -> None:
    under_test = scheduler(num_pages=4)
    add_all(under_test, [request(0, 20, 8, "dual") for _ in range(500)])
    under_test.schedule()
    looked_at: list[int] = []
    fits_ = under_test.storage.fits

    def counted(r: Request) -> bool:
        looked_at.append(r.id)
        return fits_(r)

    under_test.storage.fits = counted  # type: ignore[method-assign]
    under_test.schedule()
    assert looked_at == list(range(1, 1 + MAX_LOOKED_PAST))
    assert [r.id for r in under_test.waiting] == list(range(1, 500))


def test_whoever_was_left_out_comes_first() -> None:
    under_test = scheduler(max_num_batched_tokens=30)
    add_all(under_test, [request(0, prompt=9, gen=9) for _ in range(3)])
    seen = []
    for _ in range(6):
        _, requests, _ = under_test.schedule()
        seen.append([r.id for r in requests])
        under_test.commit(requests, [report(r) for r in requests])
    assert seen == [[0], [1], [2], [0], [1], [2]]


@pytest.mark.parametrize(
    ("changes", "options", "parts"),
    [
        (
            {"max_num_batched_tokens": 30},
            {"prompt": 25, "gen": 10},
            ["35 tokens in one step", "max_num_batched_tokens=30", "raise it to 35"],
        ),
        (
            {"max_num_batched_tokens": 60},
            {"prompt": 25, "gen": 10, "cfg": 0.5},
            ["70 tokens", "max_num_batched_tokens=60"],
        ),
        ({"max_num_seqs": 1}, {"cfg": 1.0}, ["cfg_scale > 0 takes 2 rows", "max_num_seqs=1"]),
        (
            {"num_pages": 2},
            {"prompt": 20, "cache": "dual"},
            ["needs 4 K,V pages of 8 tokens", "kv_pages=2", "raise kv_pages to 4", "cache='none'"],
        ),
        ({"num_pages": 7}, {"prompt": 20, "cache": "prefix", "cfg": 2.0}, ["8 K,V pages"]),
    ],
)
def test_what_can_never_fit(
    changes: dict[str, int], options: dict[str, int], parts: list[str]
) -> None:
    under_test = scheduler(**changes)
    with pytest.raises(CapacityError) as caught:
        under_test.add(request(0, **options))  # type: ignore[arg-type]
    assert all(part in str(caught.value) for part in parts)
    assert not under_test.has_work


def test_no_cache_needs_no_pages() -> None:
    under_test = scheduler(num_pages=0)
    under_test.add(request(0))
    Device(under_test).step()


def test_end_of_sequence_frees_the_request() -> None:
    under_test = scheduler()
    under_test.add(request(7))
    _, (one,), _ = under_test.schedule()
    assert under_test.commit([one], [EntryReport(masks_left=5, frontier=3, eos=2)]) == [one]
    assert (one.finish_reason, one.status) == ("stop", Status.RUNNING)  # its tokens can be read
    under_test.release(one)
    assert not under_test.has_work


def test_a_step_without_progress_is_an_engine_error() -> None:
    under_test = scheduler()
    under_test.add(request(7))
    _, (one,), _ = under_test.schedule()
    with pytest.raises(EngineError, match="request 7 made no progress"):
        under_test.commit([one], [EntryReport(masks_left=8, frontier=0, eos=-1)])


def test_entries_are_packed_by_kind() -> None:
    """Guided entries last; then sampled behind greedy, equal shapes side by side."""
    under_test = scheduler(max_num_seqs=8, max_num_batched_tokens=1000)
    add_all(under_test, [request(0, cfg=1.0), request(0, 7), request(0, 5), request(0, 7)])
    plan, requests, _ = under_test.schedule()
    assert [r.id for r in requests] == [2, 1, 3, 0]
    assert plan.guided == 1


@pytest.mark.parametrize("damage", ["row", "page"])
def test_check_integrity_sees_leaks(damage: str) -> None:
    under_test = scheduler()
    under_test.add(request(0, cache="dual"))
    under_test.schedule()
    if damage == "row":
        under_test.storage.rows.pop()
    else:
        under_test.storage.pages._holders.popitem()
    with pytest.raises(ValueError, match=r"rows|pages"):
        under_test.check_integrity()
