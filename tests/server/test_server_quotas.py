"""Quotas have owners: what one key asks for leaves slots, work and results for the others."""

from pathlib import Path
from typing import Any

import pytest

from dllmserve import SamplingParams
from dllmserve.core.request import Request
from dllmserve.core.validator import RequestValidator
from dllmserve.errors import CapacityError, OverloadedError, QuotaError
from dllmserve.process.messages import Counters
from dllmserve.server.admission import Admission
from dllmserve.server.app import _most_calls
from dllmserve.server.http.keys import ApiKeys
from tests.server.stand_in import (
    KEYS,
    LIMITS,
    SPEC,
    Reply,
    Server,
    make_server,
    run,
    secret,
    serving,
    until,
)

ONE_KEY = ApiKeys.from_env("ann=ann-0123456789abcdef", "test")
ASK = {"prompt": "ab", "gen_length": 4, "steps": 4}


def request(length: int = 10, prompt: int = 10, **given: Any) -> Request:
    params = SamplingParams(gen_length=length, steps=length, **given)
    return RequestValidator(SPEC, LIMITS, True).request(0, [1] * prompt, params)


def taken(admission: Admission, owner: str, most: int = 10_000) -> int:
    """Take slots one by one until the owner is refused; how many there were."""
    for count in range(most):
        try:
            admission.take([request()], owner)
        except QuotaError as error:
            assert error.http_status == 429 and 1 <= error.retry_after <= 30
            return count
    return most


@pytest.mark.parametrize(("most", "first"), [(1, 1), (2, 1), (3, 2), (4, 3), (8, 6), (256, 192)])
def test_one_owner_takes_three_quarters_at_most(most: int, first: int) -> None:
    admission = Admission(most, None, several=True)
    places = admission.take([request()], "ann")
    if most == 1:
        with pytest.raises(OverloadedError) as full:
            admission.take([request()], "ann")
        assert full.value.http_status == 503
        return
    assert taken(admission, "ann") == first - 1
    # and there is something for the next, and at last one for whoever has nothing
    admission.take([request()], "bob")
    free = most - admission.requests
    for number in range(free):
        admission.take([request()], f"other {number}")
    with pytest.raises(OverloadedError, match="are over max_requests=") as full:
        admission.take([request()], "eve")
    assert full.value.http_status == 503
    admission.give_back(places[0])
    admission.take([request()], "eve")


def test_alone_an_owner_has_everything() -> None:
    admission = Admission(8, None)
    for _ in range(8):
        admission.take([request()], "ann")
    with pytest.raises(OverloadedError, match="8 requests are under way") as full:
        admission.take([request()], "ann")
    assert full.value.http_status == 503


def test_what_is_left_is_not_for_one_newcomer() -> None:
    admission = Admission(16, None, several=True)
    admission.take([request()] * 12, "ann")
    with pytest.raises(OverloadedError, match="would leave too little for others") as refused:
        admission.take([request()] * 4, "bob")
    assert refused.value.http_status == 503  # it has nothing under way that could end
    admission.take([request()] * 3, "bob")
    with pytest.raises(QuotaError, match="3 requests of this key are under way and 1 more"):
        admission.take([request()], "bob")
    admission.take([request()], "eve")


def test_more_than_one_may_ever_have_is_refused_for_good() -> None:
    admission = Admission(16, None, several=True)
    with pytest.raises(CapacityError, match="13 requests at once are over the 12 that one key"):
        admission.take([request()] * 13, "ann")
    admission = Admission(16, None, max_per_owner=3, several=True)
    with pytest.raises(CapacityError, match="4 requests at once are over max_parallel_per_key=3"):
        admission.take([request()] * 4, "ann")
    admission.take([request()] * 2, "ann")
    with pytest.raises(QuotaError, match="2 more are over max_parallel") as refused:
        admission.take([request()] * 2, "ann")
    assert refused.value.code == "too_many_parallel_requests"
    admission.take([request()], "ann")
    admission.take([request()] * 3, "bob")


@pytest.mark.parametrize("learned", [False, True])
def test_work_of_one_owner_is_no_reason_to_refuse_another(learned: bool) -> None:
    """Neither a bound that was given nor one that was learned is filled by one alone."""
    admission = Admission(10_000, None if learned else 60_000, several=True)
    if learned:
        for _ in range(50):  # 100 forwards a second of 20 tokens: a minute is 120,000
            (place,) = admission.take([request()], "eve")
            admission.give_back(place, 10)
        admission.measure(5.0, 500)
        limit = 120_000
    else:
        limit = 60_000
    assert taken(admission, "ann") == limit * 3 // 4 // 200
    # 200 a request: a third of all is bob's, whatever ann has
    assert taken(admission, "bob") == limit // 3 // 200
    # something larger than all of it is taken of whoever has nothing
    admission.take([request(200, 50)] * 5, "eve")
    with pytest.raises(QuotaError, match="is over its part of the"):
        admission.take([request()], "eve")


def test_each_owner_teaches_what_is_expected_of_itself() -> None:
    def chat() -> Request:
        return request(240, 10, quality="balanced")

    admission = Admission(1000, None, several=True)
    for _ in range(100):
        (place,) = admission.take([chat()], "ann")
        admission.give_back(place, 4, 10)
    (known,), (new,) = admission.take([chat()], "ann"), admission.take([chat()], "bob")
    assert (known.forwards, new.forwards) == (5, 128)


def test_the_speed_is_that_of_late() -> None:
    """Hours of tiny requests say nothing of what follows."""
    admission = Admission(1000, None)
    for _ in range(1000):
        (place,) = admission.take([request(1, 1)])
        admission.give_back(place, 1)
    admission.measure(1000.0, 1000)
    busy, forwards = 1000.0, 1000
    for _ in range(40):  # then ten times as many forwards, each of ten times as many tokens
        for _ in range(20):
            (place,) = admission.take([request(10, 10)])
            admission.give_back(place, 10)
        busy, forwards = busy + 20, forwards + 200
        admission.measure(busy, forwards)
    assert admission._speed == pytest.approx(10 * 20, rel=0.1)


def test_retry_after_follows_the_load() -> None:
    busy, forwards = 0.0, 0
    admission = Admission(40, None, several=True, progress=lambda: (busy, forwards))
    admission.take([request(100, 100)] * 30, "ann")
    with pytest.raises(QuotaError) as refused:
        admission.check_room(1, "ann")
    assert refused.value.retry_after == 1  # nothing is known yet
    busy, forwards = 10.0, 1000  # 3,000 are under way: 30 seconds, and 7.5 until a quarter is done
    with pytest.raises(QuotaError) as refused:
        admission.check_room(1, "ann")
    assert refused.value.retry_after == 8
    # what another has shares the speed, and is no reason by itself
    admission.take([request(1, 1)], "bob")
    with pytest.raises(QuotaError) as refused:
        admission.check_room(1, "ann")
    assert refused.value.retry_after == pytest.approx(15, abs=1)
    assert admission.retry_after("bob") == 1
    busy, forwards = 40.0, 1010
    assert admission.retry_after() == admission.retry_after("ann") == 30


async def batch(server: Server, count: int, key: str) -> Reply:
    body = {**ASK, "prompts": ["ab"] * count}
    del body["prompt"]
    return await server.post("/v1/generate_batch", body, **secret(key))


def test_a_flood_of_one_key_leaves_slots_for_others(byte_checkpoint: Path) -> None:
    """Jobs count until they have ended, not until they are accepted."""

    async def main() -> None:
        async with serving(byte_checkpoint, keys=KEYS, max_requests=16) as server:
            server.engine.hold = True
            assert (await batch(server, 13, "ann")).error["code"] == "capacity_exceeded"
            assert (await batch(server, 8, "ann")).status == 200
            assert (await batch(server, 4, "ann")).status == 200
            for path in ("/v1/generate", "/v1/completions"):
                refused = await server.post(path, b"{nonsense", **secret("ann"))  # unread
                assert refused.status == 429 and int(refused.headers["retry-after"]) >= 1
                assert refused.error["code"] == "share_exceeded"
                assert refused.error["type"] == "rate_limit_error"
            mine = server.begin("POST", "/v1/completions", {"prompt": "ab"}, **secret("bob"))
            await until(lambda: len(server.engine.calls) == 13)
            assert server.metric("admission_rejections_total", reason="share_exceeded") == 2
            # the engine knows them apart, and nothing of their keys
            names = {call.submit.owner for call in server.engine.calls}
            assert len(names) == 2 and all(len(name) == 8 for name in names)
            # it is ann's until it has ended, and a drop is an end
            server.engine.play(server.engine.calls[12])
            assert (await mine.reply()).status == 200
            assert (await batch(server, 1, "ann")).status == 429
            for call in list(server.engine.open_calls):
                server.engine.play(call)
            await until(server.idle)
            server.engine.hold = False
            assert (await batch(server, 12, "ann")).status == 200

    run(main())


@pytest.mark.parametrize("keys", [None, ONE_KEY])
def test_without_others_there_is_nothing_to_leave(
    byte_checkpoint: Path, keys: ApiKeys | None
) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, keys=keys, max_requests=16) as server:
            server.engine.hold = True
            assert (await batch(server, 16, "ann")).status == 200
            assert (await batch(server, 1, "ann")).status == 503
            assert {call.submit.owner for call in server.engine.calls} == {""}
            for call in server.engine.calls:
                server.engine.play(call)

    run(main())


def test_the_parallel_limit_counts_answers(byte_checkpoint: Path) -> None:
    async def main() -> None:
        options: dict[str, Any] = {"keys": KEYS, "max_parallel_per_key": 3}
        async with serving(byte_checkpoint, **options) as server:
            server.engine.hold = True
            never = await batch(server, 4, "ann")
            assert (never.status, never.error["code"]) == (400, "capacity_exceeded")
            assert "max_parallel_per_key=3" in never.error["message"]
            never = await server.post(
                "/v1/completions", {"prompt": ["a", "b"], "n": 2}, **secret("ann")
            )
            assert never.status == 400 and "max_parallel_per_key=3" in never.error["message"]
            assert (await batch(server, 3, "ann")).status == 200
            for path in ("/v1/generate", "/v1/generate/stream", "/v1/chat/completions"):
                refused = await server.post(path, ASK, **secret("ann"))
                assert refused.status == 429 and refused.headers["retry-after"]
                assert refused.error["code"] == "too_many_parallel_requests"
            # what takes no place is not counted, and others are not concerned
            for path in ("/v1/models", "/metrics", "/v1/result/7"):
                assert (await server.get(path, **secret("ann"))).status in (200, 404)
            assert (await batch(server, 2, "bob")).status == 200
            server.engine.play(server.engine.calls[0])
            await until(lambda: server.service.admission.requests == 4)
            assert (await batch(server, 1, "ann")).status == 200
            for call in server.engine.calls:
                server.engine.play(call)

    run(main())


def test_the_rate_counts_answers(byte_checkpoint: Path) -> None:
    async def main() -> None:
        options: dict[str, Any] = {"keys": KEYS, "requests_per_minute": 10}
        async with serving(byte_checkpoint, **options) as server:
            never = await batch(server, 11, "ann")
            assert (never.status, never.error["code"]) == (400, "capacity_exceeded")
            assert "requests_per_minute=10" in never.error["message"]
            assert (await batch(server, 7, "ann")).status == 200
            # that one, and the one that was refused: two are left
            refused = await batch(server, 3, "ann")
            assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
            assert 6 <= int(refused.headers["retry-after"]) <= 12
            assert server.metric("admission_rejections_total", reason="rate_limit_exceeded") == 1
            two = {"prompt": "a", "n": 2}
            assert (await server.post("/v1/completions", two, **secret("ann"))).status == 429
            assert (await batch(server, 10, "bob")).status == 200
            assert (await batch(server, 1, "bob")).status == 429

    run(main())


def test_a_refusal_for_want_of_room_costs_nothing_of_the_rate(byte_checkpoint: Path) -> None:
    async def main() -> None:
        options: dict[str, Any] = {"requests_per_minute": 10, "max_requests": 4}
        async with serving(byte_checkpoint, **options) as server:
            server.engine.hold = True
            assert (await batch(server, 3, "ann")).status == 200
            assert (await batch(server, 4, "ann")).status == 503  # one, for the call itself
            server.engine.hold = False
            for call in server.engine.calls:
                server.engine.play(call)
            await until(server.idle)
            assert (await batch(server, 4, "ann")).status == 200
            await until(server.idle)
            assert (await batch(server, 3, "ann")).status == 429  # two are left

    run(main())


def test_resumed_jobs_are_their_owners(byte_checkpoint: Path, tmp_path: Path) -> None:
    async def main() -> None:
        options: dict[str, Any] = {"keys": KEYS, "store": str(tmp_path / "jobs.sqlite3")}
        async with serving(byte_checkpoint, max_requests=16, **options) as first:
            first.engine.hold = True
            assert (await batch(first, 12, "ann")).status == 200
        app, second = make_server(byte_checkpoint, max_requests=16, **options)
        second.engine.hold = True
        async with app.router.lifespan_context(app):
            await until(lambda: len(second.engine.calls) == 12)
            assert (await batch(second, 1, "ann")).error["code"] == "share_exceeded"
            assert (await batch(second, 1, "bob")).status == 200
            assert len({call.submit.owner for call in second.engine.calls}) == 2
            for call in second.engine.calls:
                second.engine.play(call)
            await until(second.idle)

    run(main())


def test_the_admission_guard_says_when_to_come_back(byte_checkpoint: Path) -> None:
    """Also where it refuses before anything is looked at."""

    async def main() -> None:
        async with serving(byte_checkpoint, max_requests=4) as server:
            server.engine.hold = True
            runs = server.service.admit([request(100, 100)] * 4)
            known = []
            for busy, spans in ((1.0, 10), (10.0, 20), (10.0, 100), (10.0, 1000), (400.0, 400)):
                server.engine.counters = Counters(busy=busy, spans=spans)
                refused = await server.post("/v1/completions", b"{nonsense")
                assert refused.status == 503
                known.append(int(refused.headers["retry-after"]))
            # 400 forwards are under way: at 2, 10, 100 and 1 a second
            assert known == [1, 30, 10, 1, 30]
            for one in runs:
                one.close()

    run(main())


def test_one_key_cannot_hold_all_connections(byte_checkpoint: Path) -> None:
    async def main() -> None:
        options: dict[str, Any] = {"keys": KEYS, "max_connections": 8}
        async with serving(byte_checkpoint, **options) as server:
            server.engine.hold = True
            (id,) = (await batch(server, 1, "ann")).json()["request_ids"]
            path = f"/v1/result/{id}?wait=60"
            polls = [server.begin("GET", path, **secret("ann")) for _ in range(6)]
            await until(lambda: server.engine.calls != [])
            refused = await server.get(path, **secret("ann"))
            assert (refused.status, refused.error["code"]) == (429, "too_many_calls")
            assert refused.headers["retry-after"]
            assert (await server.get("/v1/models", **secret("bob"))).status == 200
            assert (await server.get("/health")).status == 200
            server.engine.play(server.engine.calls[0])
            for poll in polls:
                assert (await poll.reply()).json()["status"] == "finished"
            assert (await server.get(path, **secret("ann"))).status == 200
            assert _most_calls(server.service.settings) == 6
        async with serving(byte_checkpoint, keys=ONE_KEY) as server:
            assert _most_calls(server.service.settings) is None

    run(main())
