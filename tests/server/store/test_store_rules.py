"""What every store promises: order of eviction, tombstones, atomic inserts, exact contents."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from dllmserve.errors import ConfigError, DllmServeError, JobStoreError
from dllmserve.server.store import (
    MAX_JOB_ID,
    Gone,
    JobIdTaken,
    JobRecord,
    JobResult,
    JobStore,
    Stored,
    StoreLimits,
)
from dllmserve.server.store.tables import EXPIRE_CHUNK
from tests.server.store.jobs import KINDS, answer, done, job, make_store, using

Make = Callable[..., JobStore]


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """make(**limits): a new store of either kind."""

    def made(**limits: float) -> JobStore:
        return make_store(request.param, tmp_path / "jobs.db", StoreLimits(**limits))  # type: ignore[arg-type]

    return made


def test_a_job_from_insert_to_delete(make: Make) -> None:
    store = make()

    async def body() -> None:
        assert await store.find(7) is None
        await store.insert([job(7)])
        assert await store.find(7) == Stored(job(7), None)
        assert await store.unfinished() == [job(7)]
        assert await store.finish(7, answer())
        for _ in range(3):  # reading never deletes
            assert await store.find(7) == done(job(7), answer())
            await store.mark_read(7)
        assert await store.unfinished() == []
        assert await store.delete(7)
        assert await store.find(7) == Gone("deleted", "ann")
        assert not await store.delete(7)

    using(store, body)


def test_only_an_unfinished_job_can_finish(make: Make) -> None:
    store = make()

    async def body() -> None:
        assert not await store.finish(1, answer())
        await store.insert([job(1), job(2)])
        assert await store.finish(1, answer("first"))
        assert not await store.finish(1, answer("second"))
        found = await store.find(1)
        assert isinstance(found, Stored) and found.result == answer("first")
        await store.delete(2)
        assert not await store.finish(2, answer())
        assert await store.find(2) == Gone("deleted", "ann")

    using(store, body)


def test_insert_is_all_or_nothing(make: Make) -> None:
    store = make()

    async def body() -> None:
        await store.insert([job(1), job(2)])
        await store.delete(1)
        for batch in ([job(3), job(2)], [job(3), job(1)], [job(3), job(4), job(3)]):
            with pytest.raises(JobIdTaken):
                await store.insert(batch)
        for wrong in (-1, MAX_JOB_ID + 1, 1 << 70):
            with pytest.raises(ValueError, match=rf"in \[0, {MAX_JOB_ID}\], got {wrong}"):
                await store.insert([job(3), job(wrong)])
        assert await store.find(3) is None
        assert await store.unfinished() == [job(2)]
        await store.insert([])
        await store.insert([job(0), job(MAX_JOB_ID)])
        assert store.stats().unfinished == 3

    using(store, body)


def test_unfinished_jobs_come_in_the_order_of_acceptance(make: Make) -> None:
    """Whatever their ids and the wall clock say."""
    store = make()

    async def body() -> list[int]:
        await store.insert([job(50, created=9.0), job(10, created=9.0)])
        await store.insert([job(30, created=1.0)])
        await store.insert([job(20, created=5.0)])
        await store.finish(10, answer())
        return [record.id for record in await store.unfinished()]

    assert using(store, body) == [50, 30, 20]


def test_read_results_are_evicted_first_then_the_oldest(make: Make) -> None:
    store = make(max_results=3)

    async def body() -> None:
        await store.insert([job(id) for id in range(9)])
        for id in (0, 1, 2):
            await store.finish(id, answer())
        for id in (2, 1, 2):  # only the first time counts
            await store.mark_read(id)
        gone = []
        for id in (3, 4, 5, 6):
            await store.finish(id, answer())
            gone.append([i for i in range(9) if await store.find(i) == Gone("evicted", "ann")])
        assert gone == [[2], [1, 2], [0, 1, 2], [0, 1, 2, 3]]
        assert [record.id for record in await store.unfinished()] == [7, 8]
        stats = store.stats()
        assert (stats.results, stats.unfinished) == (3, 2)
        assert stats.evicted == {
            "expired": 0,
            "evicted_read": 2,
            "evicted_unread": 2,
            "deleted": 0,
        }

    using(store, body)


def test_a_clock_that_jumps_back_does_not_evict_new_results(make: Make) -> None:
    store = make(max_results=2)

    async def body() -> None:
        await store.insert([job(id) for id in range(3)])
        for id, finished in ((0, 5000.0), (1, 5001.0), (2, 10.0)):
            await store.finish(id, answer(finished=finished))
        assert await store.find(0) == Gone("evicted", "ann")
        assert isinstance(await store.find(2), Stored)

    using(store, body)


def test_bytes_of_texts_errors_and_details_are_bounded(make: Make) -> None:
    store = make(max_bytes=100)

    async def body() -> None:
        await store.insert([job(id, request=b"p" * 1000) for id in range(5)])
        await store.finish(0, answer("ü" * 25))
        await store.finish(1, JobResult("failed", None, "e" * 20, b"d" * 30, 200.0))
        assert store.stats().bytes == 100
        await store.finish(2, answer("x"))
        assert (await store.find(0), store.stats().bytes) == (Gone("evicted", "ann"), 51)
        # one result that alone is too large goes at once, after all others
        assert await store.finish(3, answer("x" * 101))
        assert await store.find(3) == Gone("evicted", "ann")
        assert (store.stats().results, store.stats().bytes) == (0, 0)
        assert await store.find(4) == Stored(job(4, request=b"p" * 1000), None)

    using(store, body)


def test_ttl_counts_from_the_end_of_the_job(make: Make) -> None:
    store = make(ttl_s=10)

    async def body() -> None:
        await store.insert([job(id, created=0.0) for id in range(4)])
        for id, finished in ((0, 100.0), (1, 101.0), (2, 99.0)):
            await store.finish(id, answer(finished=finished))
        await store.expire(108.9)
        assert store.stats().results == 3
        await store.expire(110.0)
        found = [await store.find(id) for id in range(4)]
        assert found[0] == found[2] == Gone("expired", "ann")
        assert found[1] == done(job(1, created=0.0), answer(finished=101.0))
        await store.expire(1e9)
        assert await store.find(3) == Stored(job(3, created=0.0), None)  # it has not finished
        assert store.stats().evicted["expired"] == 3

    using(store, body)


def test_results_expire_in_the_order_of_their_ends(make: Make) -> None:
    store = make(ttl_s=10, max_tombstones=1)

    async def body() -> None:
        await store.insert([job(id) for id in range(3)])
        for id, finished in ((0, 100.0), (1, 102.0), (2, 101.0)):
            await store.finish(id, answer(finished=finished))
        await store.expire(200.0)
        assert [await store.find(id) for id in range(3)] == [None, Gone("expired", "ann"), None]

    using(store, body)


def test_more_results_expire_than_one_transaction_takes(make: Make) -> None:
    store = make(ttl_s=10)
    count = 2 * EXPIRE_CHUNK + 1

    async def body() -> None:
        await store.insert([job(id) for id in range(count)])
        await asyncio.gather(*(store.finish(id, answer()) for id in range(count)))
        await store.expire(300.0)
        assert (store.stats().results, store.stats().bytes) == (0, 0)
        assert store.stats().evicted["expired"] == count

    using(store, body)


def test_tombstones_keep_the_owner_and_the_oldest_go(make: Make) -> None:
    store = make(max_tombstones=2)

    async def body() -> None:
        await store.insert([job(id, "ann") for id in range(3)])
        for id in (1, 0, 2):
            await store.delete(id)
        found = [await store.find(id) for id in range(3)]
        assert found == [Gone("deleted", "ann"), None, Gone("deleted", "ann")]
        await store.insert([job(1)])  # nobody remembers it
        with pytest.raises(JobIdTaken, match="job id 2 is taken"):
            await store.insert([job(2)])

    using(store, body)


async def fill(store: JobStore, owner: str, ids: range, text: str = "Hi!") -> None:
    """Jobs of an owner, all of them finished."""
    await store.insert([job(id, owner) for id in ids])
    for id in ids:
        await store.finish(id, answer(text))


async def kept(store: JobStore, ids: range) -> list[int]:
    """Those that have a result."""
    return [id for id in ids if isinstance(await store.find(id), Stored)]


def test_a_flood_evicts_only_its_owners_results(make: Make) -> None:
    """However many there are, whether they were read or not, and whoever came first."""
    store = make(max_results=10, max_tombstones=10)

    async def body() -> None:
        await fill(store, "bob", range(2))
        await store.mark_read(0)
        await fill(store, "ann", range(100, 200))
        assert await kept(store, range(2)) == [0, 1]
        assert await kept(store, range(100, 200)) == list(range(192, 200))
        # bob may have his share, but not more than ann then
        await fill(store, "bob", range(2, 9))
        assert await kept(store, range(9)) == [4, 5, 6, 7, 8]  # 0 had been read, 1 was next
        assert await kept(store, range(100, 200)) == list(range(195, 200))

    using(store, body)


def test_bytes_are_taken_from_whoever_has_most_of_them(make: Make) -> None:
    """Many small results do not pay for a few large ones."""
    store = make(max_bytes=100)

    async def body() -> None:
        await fill(store, "bob", range(10), "12")
        await fill(store, "ann", range(100, 110), "x" * 30)
        assert await kept(store, range(10)) == list(range(10))
        assert await kept(store, range(100, 110)) == [108, 109]

    using(store, body)


def test_those_who_hold_the_same_lose_what_goes_first(make: Make) -> None:
    store = make(max_results=2)

    async def body() -> None:
        await fill(store, "bob", range(1))
        await fill(store, "ann", range(1, 2))
        await store.mark_read(1)
        await fill(store, "eve", range(2, 3))
        assert await kept(store, range(3)) == [0, 2]  # ann's had been read
        await fill(store, "eve", range(3, 4))
        assert await kept(store, range(4)) == [0, 3]

    using(store, body)


def test_a_flood_of_tombstones_leaves_those_of_others(make: Make) -> None:
    store = make(max_tombstones=4)

    async def body() -> None:
        await fill(store, "bob", range(1))
        await store.delete(0)
        await fill(store, "ann", range(1, 20))
        for id in range(1, 20):
            await store.delete(id)
        assert await store.find(0) == Gone("deleted", "bob")
        assert [await store.find(id) for id in range(16, 20)] == [
            None,
            *[Gone("deleted", "ann")] * 3,
        ]

    using(store, body)


def test_a_store_may_keep_no_tombstones(make: Make) -> None:
    store = make(max_tombstones=0)

    async def body() -> None:
        await store.insert([job(0)])
        assert await store.delete(0)
        assert await store.find(0) is None

    using(store, body)


def test_reserved_ids_are_consecutive_and_never_given_twice(make: Make) -> None:
    store = make()

    async def body() -> None:
        assert await store.reserve_ids(1) == [0]
        assert await store.reserve_ids(0) == []
        with pytest.raises(ValueError, match="must be >= 0, got -1"):
            await store.reserve_ids(-1)
        many = await asyncio.gather(*(store.reserve_ids(3) for _ in range(50)))
        assert all(ids == [ids[0], ids[0] + 1, ids[0] + 2] for ids in many)
        assert sorted(id for ids in many for id in ids) == list(range(1, 151))

    using(store, body)


def test_marking_what_has_no_unread_result_changes_nothing(make: Make) -> None:
    store = make(max_results=1)

    async def body() -> None:
        await store.mark_read(5)
        await store.insert([job(5), job(6)])
        await store.mark_read(5)
        await store.finish(5, answer())
        await store.finish(6, answer())
        assert store.stats().evicted["evicted_unread"] == 1

    using(store, body)


TEXTS = st.text(st.characters(categories=["L", "N", "P", "S", "Z", "C"]), max_size=30)
RECORDS = st.builds(
    JobRecord,
    st.integers(0, MAX_JOB_ID),
    TEXTS,
    TEXTS,
    st.floats(0, 1e12),
    st.floats(0, 1e12) | st.just(float("inf")),
    st.binary(max_size=100),
)
RESULTS = st.builds(
    JobResult,
    st.sampled_from(["finished", "failed", "cancelled"]),
    TEXTS | st.none() | st.just("\ud800 \x00 \udfff"),
    TEXTS | st.none(),
    st.binary(max_size=100),
    st.floats(0, 1e12),
)


@pytest.mark.parametrize("kind", KINDS)
def test_contents_come_back_exactly(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Lone surrogates, NUL and empty strings included."""

    @hypothesis_settings(max_examples=40)
    @given(RECORDS, RESULTS)
    def check(record: JobRecord, result: JobResult) -> None:
        store = make_store(kind, tmp_path_factory.mktemp("exact") / "jobs.db")

        async def body() -> None:
            await store.insert([record])
            assert await store.find(record.id) == Stored(record, None)
            await store.finish(record.id, result)
            assert await store.find(record.id) == done(record, result)
            await store.delete(record.id)
            assert await store.find(record.id) == Gone("deleted", record.owner)

        using(store, body)

    check()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ttl_s", 0),
        ("ttl_s", float("inf")),
        ("max_results", 0),
        ("max_results", True),
        ("max_bytes", 0.5),
        ("max_tombstones", -1),
    ],
)
def test_limits_are_checked(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be .*, got {value}"):
        StoreLimits(**{field: value})  # type: ignore[arg-type]


def test_errors_of_a_store_are_for_a_server_to_answer() -> None:
    assert issubclass(JobIdTaken, JobStoreError)
    assert issubclass(JobStoreError, DllmServeError) and issubclass(JobStoreError, RuntimeError)
    assert (JobStoreError.http_status, JobStoreError.code) == (503, "job_store_error")
