"""Owners in turns: by the work done for them, whatever the others ask for."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmserve.core.fair import STAYS, TIMES_FREE, within_share
from dllmserve.core.request import Request, Status
from dllmserve.core.scheduler import MAX_LOOKED_PAST, MAX_SKIPS, Scheduler
from tests.core.test_scheduler import REQUESTS, Device, add_all, report, request, scheduler


def of(owner: str, made: Request) -> Request:
    made.owner = owner
    return made


class Clients(Device):
    """Adds requests while it runs, and counts what is computed for each owner.

    Attributes:
        served: tokens by owner.
        waits: steps from its arrival to its first forward, by request.
    """

    def __init__(self, under_test: Scheduler) -> None:
        super().__init__(under_test)
        self.ids = 0
        self.served: dict[str, int] = {}
        self.came: dict[int, int] = {}
        self.waits: dict[int, int] = {}

    def add(self, owner: str, made: Request) -> Request:
        made.id, made.owner = self.ids, owner
        self.ids += 1
        self.came[made.id] = self.steps
        self.scheduler.add(made)
        return made

    def step(self) -> list[Request]:
        plan, requests, admitted = self.scheduler.schedule()
        by_row = {entry.span.row: entry.tokens for entry in plan.entries}
        for one in requests:
            self.served[one.owner] = self.served.get(one.owner, 0) + by_row[one.row]
        self.order += [one.id for one in admitted]
        self.waits.update({one.id: self.steps - self.came[one.id] for one in admitted})
        self.steps += 1
        finished = self.scheduler.commit(requests, [report(one) for one in requests])
        for one in finished:
            self.scheduler.release(one)
        self.scheduler.check_integrity()
        return finished


def first_come(under_test: Scheduler) -> list[int]:
    """What a plain queue would admit, in a few lines."""
    queue = list(under_test.waiting)
    rows, pages = len(under_test.storage.rows), under_test.storage.pages.num_free
    admitted: list[int] = []
    blocked: list[Request] = []
    skipped = {r.id: r.skipped for r in queue}
    for r in queue:
        if not rows or len(blocked) == MAX_LOOKED_PAST:
            break
        needed = under_test.storage.most_pages(r) * r.rows_needed
        if r.rows_needed <= rows and needed <= pages:
            rows, pages = rows - r.rows_needed, pages - needed
            admitted.append(r.id)
            for other in blocked:
                skipped[other.id] += 1
        else:
            blocked.append(r)
        if blocked and skipped[blocked[0].id] >= MAX_SKIPS:
            break
    return admitted


@settings(max_examples=100)
@given(REQUESTS, st.integers(2, 6), st.integers(8, 30))
def test_one_owner_is_served_first_come_first_served(
    requests: list[Request], rows: int, pages: int
) -> None:
    under_test = scheduler(max_num_seqs=rows, num_pages=pages)
    add_all(under_test, requests)
    device = Device(under_test)
    while under_test.has_work:
        expected = first_come(under_test)
        before = len(device.order)
        device.step()
        assert device.order[before:] == expected


OWNED = st.lists(st.sampled_from(["", "ann", "bob", "eve"]), min_size=25, max_size=25)


@settings(max_examples=200)
@given(REQUESTS, OWNED, st.integers(1, 6), st.integers(4, 30))
def test_everything_ends_whoever_owns_it(
    requests: list[Request], owners: list[str], rows: int, pages: int
) -> None:
    under_test = scheduler(max_num_seqs=rows, num_pages=pages)
    accepted = add_all(under_test, list(map(of, owners, requests)))
    device = Device(under_test)
    while under_test.has_work:
        device.step()
    assert sorted(device.order) == [r.id for r in accepted]
    assert all(r.status is Status.FINISHED for r in accepted)
    assert not under_test.waiting._shares


@settings(max_examples=60)
@given(REQUESTS, OWNED, st.lists(st.integers(0, 30), max_size=40))
def test_what_is_dropped_leaves_nothing(
    requests: list[Request], owners: list[str], victims: list[int]
) -> None:
    under_test = scheduler()
    accepted = add_all(under_test, list(map(of, owners, requests)))
    device = Device(under_test)
    for victim in victims:
        if under_test.has_work:
            device.step()
        if victim < len(accepted):
            under_test.abort(accepted[victim])
            under_test.check_integrity()
    for r in accepted:
        under_test.abort(r)
    assert not under_test.has_work and not under_test.waiting._shares


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_flood_leaves_room_and_whoever_comes_starts_at_once(cache: str) -> None:
    """Also behind hundreds of long requests that came before, and that end together."""
    under_test = scheduler(max_num_seqs=8, num_pages=128, max_num_batched_tokens=1000)
    device = Clients(under_test)
    for _ in range(100):
        device.add("ann", request(0, prompt=20, gen=60, cache=cache))
    for _ in range(20):
        device.step()
    assert len(under_test.running) == 6
    for number in range(5):  # one after the other, in the middle of the others' answers
        mine = device.add("bob", request(0, gen=4, cache=cache))
        while mine.status is not Status.FINISHED:
            device.step()
        assert device.waits[mine.id] == 0, number


def test_whoever_has_no_name_may_have_everything() -> None:
    under_test = scheduler(max_num_seqs=8, max_num_batched_tokens=1000)
    device = Clients(under_test)
    for _ in range(20):
        device.add("", request(0))
    device.step()
    assert len(under_test.running) == 8


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_one_owner_always_gets_something(rows: int) -> None:
    """However little there is, and though the request takes all of it."""
    under_test = scheduler(max_num_seqs=rows, num_pages=4)
    device = Clients(under_test)
    whole = request(0, prompt=20, gen=12, cache="dual", cfg=0.0)
    assert under_test.storage.most_pages(whole) == 4
    device.add("ann", whole)
    device.step()
    assert whole.status is Status.RUNNING


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("turns", [("ann", "bob"), ("bob", "ann")])
@pytest.mark.parametrize("backlog", [1, 20])
def test_long_and_short_requests_get_the_same_work(
    rows: int, turns: tuple[str, str], backlog: int
) -> None:
    """Not the same number of requests: each of ann's takes ten times as many forwards."""
    under_test = scheduler(max_num_seqs=rows, max_num_batched_tokens=1000)
    device = Clients(under_test)
    sizes = {"ann": (5, 30), "bob": (32, 3)}  # prompt and answer: 35 in all
    for _ in range(3000):
        waiting = {one.owner for one in under_test.waiting}
        for owner in turns:
            if owner not in waiting:
                for _ in range(backlog):
                    device.add(owner, request(0, *sizes[owner]))
        device.step()
    # an admission counts as one forward more, so bob may get (3 / 4) / (30 / 31) of it
    assert min(device.served.values()) >= 0.75 * max(device.served.values())


@pytest.mark.parametrize("owners", [("ann", "bob"), ("bob", "ann")])
def test_a_wide_request_counts_for_more_than_a_narrow_one(owners: tuple[str, str]) -> None:
    """One row, and the same number of forwards for each request."""
    under_test = scheduler(max_num_seqs=1)
    device = Clients(under_test)
    prompts = dict(zip(owners, (96, 6), strict=True))
    for _ in range(100):
        for owner in owners:
            device.add(owner, request(0, prompts[owner], 4))
    while {one.owner for one in under_test.waiting} == {"ann", "bob"}:
        device.step()
    wide, narrow = owners
    assert device.served[wide] == pytest.approx(device.served[narrow], abs=2 * 100 * 5)


def test_idle_times_save_nothing_up() -> None:
    """Who comes back is not served alone until it has caught up."""
    under_test = scheduler(max_num_seqs=1)
    device = Clients(under_test)
    first = device.add("bob", request(0, gen=2))
    for _ in range(200):
        device.add("ann", request(0, gen=2))
    while first.status is not Status.FINISHED or device.steps < 200:
        device.step()
    for _ in range(50):
        device.add("bob", request(0, gen=2))
    del device.order[:]
    for _ in range(40):
        device.step()
    owners = ["ann" if id <= 200 and id else "bob" for id in device.order]
    assert owners[1:] in (["bob", "ann"] * 9 + ["bob"], ["ann", "bob"] * 9 + ["ann"])


def test_what_was_taken_alone_is_not_held_against_anyone() -> None:
    under_test = scheduler(max_num_seqs=1)
    device = Clients(under_test)
    for _ in range(100):
        device.add("ann", request(0, gen=2))
    for _ in range(150):
        device.step()
    for _ in range(100):
        device.add("bob", request(0, gen=2))
    del device.order[:]
    for _ in range(40):
        device.step()
    owners = ["ann" if id < 100 else "bob" for id in device.order]
    assert owners[1:] in (["bob", "ann"] * 9 + ["bob"], ["ann", "bob"] * 9 + ["ann"])


def test_leaving_for_a_moment_wins_nothing() -> None:
    """One long request after the other: each comes back to what it has been given."""
    under_test = scheduler(max_num_seqs=1)
    device = Clients(under_test)
    mine: Request | None = None
    for _ in range(2000):
        if mine is None or mine.status is Status.FINISHED:
            mine = device.add("ann", request(0, prompt=5, gen=20))
        if not any(one.owner == "bob" for one in under_test.waiting):
            device.add("bob", request(0, prompt=5, gen=1))
            device.add("bob", request(0, prompt=5, gen=1))
        device.step()
    # bob's pay two forwards for one, ann's 21 for 20
    assert device.served["bob"] * 2 == pytest.approx(device.served["ann"] * 21 / 20, rel=0.1)


def test_waiting_for_the_own_share_stops_nobody_else() -> None:
    under_test = scheduler(max_num_seqs=8, max_num_batched_tokens=1000, num_pages=40)
    device = Clients(under_test)
    for _ in range(50):
        device.add("ann", request(0, prompt=20, gen=60, cache="dual"))  # 10 pages each
    for _ in range(3):
        device.add("bob", request(0, gen=4))
    device.step()
    assert [r.owner for r in under_test.running].count("ann") == 3
    assert [r.owner for r in under_test.running].count("bob") == 3
    assert all(r.skipped == 0 for r in under_test.waiting)


def test_a_large_request_is_not_passed_for_ever_by_other_owners() -> None:
    """It needs all rows, and another owner's small ones never end together."""
    under_test = scheduler(max_num_seqs=2)
    device = Clients(under_test)
    for number in range(4):
        device.add("bob", request(0, gen=4 + number % 3))
    device.step()
    large = device.add("ann", request(0, cfg=1.0))
    while large.status is Status.WAITING:
        device.add("bob", request(0, gen=4 + device.steps % 3))
        device.step()
        assert device.steps < 500
    assert large.skipped <= MAX_SKIPS


def tokens_by_owner(under_test: Scheduler) -> dict[str, int]:
    """Run a step; the tokens of each owner in it."""
    plan, requests, _ = under_test.schedule()
    by_row = {entry.span.row: entry.tokens for entry in plan.entries}
    found: dict[str, int] = {}
    for one in requests:
        found[one.owner] = found.get(one.owner, 0) + by_row[one.row]
    for one in under_test.commit(requests, [report(one) for one in requests]):
        under_test.release(one)
    return found


def test_a_shared_step_is_as_long_as_if_all_asked_for_as_little() -> None:
    under_test = scheduler(max_num_seqs=16, max_num_batched_tokens=1000)
    for number in range(40):
        under_test.add(of("ann", request(number, prompt=5, gen=15)))
    assert tokens_by_owner(under_test) == {"ann": 12 * 20}  # alone: three quarters of the rows
    mine = of("bob", request(99, prompt=5, gen=15))
    under_test.add(mine)
    for _ in range(15):
        assert tokens_by_owner(under_test) == {"ann": 20, "bob": 20}
    assert mine.status is Status.FINISHED
    # for a while the next one is waited for, without a long step
    for _ in range(STAYS - 1):
        assert tokens_by_owner(under_test) == {"ann": 20}
        under_test.add(of("ann", request(100, prompt=5, gen=15)))
    tokens_by_owner(under_test)
    assert tokens_by_owner(under_test) == {"ann": 12 * 20}


def test_what_is_larger_than_a_part_is_taken_off_the_next_steps() -> None:
    under_test = scheduler(max_num_seqs=8, max_num_batched_tokens=1000)
    for number in range(2):
        under_test.add(of("ann", request(number, prompt=90, gen=10)))  # 100 tokens
    under_test.add(of("bob", request(9, prompt=10, gen=10)))  # 20
    sizes = [tokens_by_owner(under_test).get("ann", 0) for _ in range(10)]
    assert sizes == [100, 0, 0, 0, 0] * 2


def test_steps_that_are_short_anyway_are_not_made_shorter() -> None:
    under_test = scheduler(max_num_seqs=16, max_num_batched_tokens=1000, cheap_tokens=200)
    for number in range(40):
        under_test.add(of("ann", request(number, prompt=5, gen=15)))
    under_test.add(of("bob", request(99, prompt=5, gen=15)))
    assert tokens_by_owner(under_test) == {"ann": 200, "bob": 20}
    under_test.add(of("eve", request(98, prompt=1, gen=1)))
    # whoever has next to nothing in it does not hold up the others
    assert tokens_by_owner(under_test) == {"ann": 100, "bob": 20, "eve": 2}


def test_steps_of_one_that_is_alone_are_not_longer_than_is_good() -> None:
    for name, tokens in (("ann", 80), ("", 16 * 20)):
        under_test = scheduler(max_num_seqs=16, max_num_batched_tokens=1000, cheap_tokens=5)
        for number in range(40):
            under_test.add(of(name, request(number, prompt=5, gen=15)))
        assert [tokens_by_owner(under_test) for _ in range(3)] == [{name: tokens}] * 3


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_a_share_is_what_is_free_times_three(held: int, more: int, free: int) -> None:
    allowed = within_share(held, more, free)
    if held and more:
        assert allowed == (held + more <= TIMES_FREE * (free - more))
    else:
        assert allowed  # one may always be had, if there is room


def test_who_is_left_out_by_another_limit_pays_nothing() -> None:
    """Three owners, of whom two ask for more than the others leave of a step."""
    under_test = scheduler(max_num_seqs=16, max_num_batched_tokens=130)
    for number, owner in enumerate(["ann", "ann", "bob", "bob"]):
        under_test.add(of(owner, request(number, prompt=70, gen=30)))  # 100 tokens
    under_test.add(of("eve", request(9, prompt=1, gen=19)))  # 20
    got: Counter[str] = Counter()
    for _ in range(19):
        got.update(tokens_by_owner(under_test))
    assert got == {"ann": 400, "bob": 400, "eve": 380}


def test_smaller_requests_of_its_owner_pass_one_that_is_beyond_its_share() -> None:
    """As they pass one that must wait for room: a limited number of times."""
    under_test = scheduler(max_num_seqs=16, num_pages=40)
    page = under_test.limits.page_size
    sizes = [10, 16, 16, *[1] * 6]
    for number, pages in enumerate(sizes):
        under_test.add(of("ann", request(number, prompt=pages * page - 1, gen=1, cache="dual")))
    _, _, admitted = under_test.schedule()
    # the second of 16 pages waits, and 30 of 40 pages are all that one may have
    assert [one.id for one in admitted] == [0, 1, 3, 4, 5, 6]
