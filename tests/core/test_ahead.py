"""Steps launched ahead of their reports."""

import pytest

from dllmserve.core.plan import EntryReport
from dllmserve.core.request import Request, Status
from dllmserve.core.scheduler import Scheduler
from dllmserve.errors import EngineError
from tests.core.test_scheduler import add_all, request, scheduler


def launch(under_test: Scheduler) -> list[tuple[Request, EntryReport]]:
    """One step ahead: its requests and what the device will say of them."""
    plan, requests, _ = under_test.schedule()
    reports = []
    for r, entry in zip(requests, plan.entries, strict=True):
        wrote = r.quota if r.quotas else 1
        assert entry.masks == r.progress.masks_left
        reports.append((r, EntryReport(entry.masks - wrote, frontier=0, eos=-1)))
    under_test.assume(requests)
    return reports


def land(under_test: Scheduler, step: list[tuple[Request, EntryReport]]) -> list[Request]:
    finished = under_test.commit([r for r, _ in step], [report for _, report in step])
    for r in finished:
        under_test.release(r)
    return finished


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_fixed_schedules_run_ahead_and_end_as_if_they_had_not(depth: int) -> None:
    under_test = scheduler(max_num_batched_tokens=1000)
    requests = add_all(
        under_test,
        [request(0, gen=8, block=3), request(0, gen=5, cache="dual"), request(0, gen=2)],
    )
    flights: list[list[tuple[Request, EntryReport]]] = []
    launched = 0
    while under_test.has_work:
        while len(flights) < depth and (step := launch(under_test)):
            launched += 1
            flights.append(step)
        before = [r.reported_forwards for r in requests]
        members = [r for r, _ in flights[0]]
        land(under_test, flights.pop(0))
        for r, was in zip(requests, before, strict=True):
            assert r.reported_forwards == was + (r in members)
    assert launched == 8
    assert [r.reported_forwards for r in requests] == [8, 5, 2]
    assert all(r.finish_reason == "length" for r in requests)
    under_test.check_integrity()


def test_an_early_end_leaves_the_later_reports_unread() -> None:
    under_test = scheduler()
    (one,) = add_all(under_test, [request(0, gen=8)])
    first, second, third = (launch(under_test) for _ in range(3))
    assert land(under_test, first) == []
    ended = [(one, EntryReport(6, frontier=2, eos=1))]
    assert land(under_test, ended) == [one]
    assert one.finish_reason == "stop"
    assert one.reported_forwards == 2  # not those that were launched for nothing
    assert one.status is Status.FINISHED
    assert land(under_test, third) == []
    assert second
    under_test.check_integrity()


def test_a_report_that_contradicts_the_schedule_is_an_engine_error() -> None:
    under_test = scheduler()
    (one,) = add_all(under_test, [request(0, gen=8)])
    launch(under_test)
    with pytest.raises(EngineError, match=r"request 0 has 6 masks left in its block.*leaves 7"):
        under_test.commit([one], [EntryReport(6, frontier=0, eos=-1)])


def test_what_cannot_be_foreseen_is_not_assumed() -> None:
    under_test = scheduler(max_num_batched_tokens=1000)
    one, two = add_all(under_test, [request(0), request(0, unmask="threshold")])
    launch(under_test)
    assert one.progress.forwards == 1
    assert two.progress.forwards == 0


def test_the_last_step_is_marked() -> None:
    under_test = scheduler()
    add_all(under_test, [request(0, gen=3, block=2)])
    marks = []
    for _ in range(3):
        plan, requests, _ = under_test.schedule()
        under_test.assume(requests)
        marks += [e.last for e in plan.entries]
    assert marks == [False, False, True]
    assert under_test.schedule()[1] == []  # nothing is left to launch
    assert under_test.has_work


def test_phases_can_be_kept_apart() -> None:
    """Neither kind waits for ever: whoever waited longest decides the kind of the step."""
    under_test = scheduler(phases="separate", max_num_batched_tokens=1000, num_pages=100)
    add_all(under_test, [request(0, gen=6, block=g, cache="dual") for g in (2, 3, 6)])
    kinds = []
    while under_test.has_work:
        plan, requests, _ = under_test.schedule()
        kinds.append({e.span.refresh for e in plan.entries})
        reports = [EntryReport(e.masks - 1, 0, -1) for e in plan.entries]
        for r in under_test.commit(requests, reports):
            under_test.release(r)
    assert all(len(kind) == 1 for kind in kinds)
    assert {True} in kinds
    assert {False} in kinds


def test_refreshes_can_be_spread() -> None:
    """Three refreshes of 13 tokens, at most 26 tokens of them a step; one always may."""
    under_test = scheduler(max_num_batched_tokens=1000, max_refresh_tokens=26, num_pages=100)
    add_all(under_test, [request(0, gen=8, cache="dual") for _ in range(3)])
    assert sum(e.span.refresh for e in under_test.schedule()[0].entries) == 2
    tight = scheduler(max_num_batched_tokens=1000, max_refresh_tokens=5, num_pages=100)
    add_all(tight, [request(0, gen=8, cache="dual") for _ in range(3)])
    assert sum(e.span.refresh for e in tight.schedule()[0].entries) == 1


def test_refreshes_that_fill_a_step_run_alone() -> None:
    """Of 13 tokens each; reuse of 8 tokens joins them only where they leave much room."""

    def kinds(count: int) -> list[bool]:
        under_test = scheduler(max_num_batched_tokens=60, num_pages=100, max_num_seqs=8)
        (first,) = add_all(under_test, [request(0, gen=8, cache="dual")])
        under_test.schedule()
        under_test.assume([first])
        first.id = count  # of equally old ones the lowest id comes first
        for n in range(count):
            under_test.add(request(n, gen=8, cache="dual"))
        return [e.span.refresh for e in under_test.schedule()[0].entries]

    assert sorted(kinds(1)) == [False, True]
    assert sorted(kinds(2)) == [False, True, True]
    assert kinds(3) == [True] * 3
