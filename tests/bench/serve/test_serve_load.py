"""Load on a fake server: every figure is compared with what the server itself knows."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.responses import JSONResponse

from dllmserve.errors import ConfigError
from dllmserve.tools.bench.serve.arrivals import TraceEntry, arrival_times
from dllmserve.tools.bench.serve.figures import result_of
from dllmserve.tools.bench.serve.load import measure
from dllmserve.tools.bench.serve.options import ServeOptions
from dllmserve.tools.bench.serve.prompts import builtin
from tests.bench.serve.conftest import Load
from tests.bench.serve.fake import MODEL, Fake, Plan
from tests.steady import watched

INF = float("inf")
Slack = Callable[[], float]


@pytest.fixture
def slack() -> Iterator[Slack]:
    """Seconds that this machine may have added to anything."""
    with watched() as lost:
        yield lambda: 0.6 + lost()


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_openai(fake: Fake, load: Load, slack: Slack, endpoint: str, stream: bool) -> None:
    fake.plan = lambda number: Plan(first=0.1, gap=0.1, chunks=3)
    measured, (result,) = load(
        endpoint=endpoint, stream=stream, rates=(INF,), requests=4, body={"steps": 7}
    )
    assert (result.ok, result.failed, result.rejected) == (4, 0, 0)
    assert measured.model == MODEL and measured.server == "uvicorn"
    path = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}[endpoint]
    assert [s.path for s in fake.seen] == [path] * 4
    body = fake.seen[0].body
    assert (body["model"], body["max_tokens"], body["temperature"]) == (MODEL, 64, 0.0)
    assert body["steps"] == 7
    assert body.get("stream", False) is stream
    assert body.get("stream_options") == ({"include_usage": True} if stream else None)
    prompt = body["messages"][0]["content"] if endpoint == "chat" else body["prompt"]
    assert prompt in {builtin(0)(n)[0] for n in range(4)}
    assert result.output_tokens == 48 and result.tokens_per_forward == 3.0
    assert result.total is not None and 0.3 <= result.total.p50 <= 0.3 + slack()
    if stream:
        assert result.first_text is not None and 0.1 <= result.first_text.p50 <= 0.1 + slack()
        assert result.first_text.p50 <= result.total.p50 - 0.19
    else:
        assert result.first_text is None
    # the client's moments enclose the server's
    for outcome, seen in zip(measured.rows[0].outcomes, _in_order(fake, measured), strict=True):
        assert outcome.sent is not None and outcome.finished is not None
        assert seen.answered is not None
        assert outcome.scheduled <= outcome.started <= outcome.sent <= seen.arrived
        assert seen.answered <= outcome.finished <= seen.answered + slack()


def _in_order(fake: Fake, measured: Any) -> list[Any]:
    """What the server saw, in the order of the client's outcomes."""
    prompts = {builtin(0)(o.index)[0]: n for n, o in enumerate(measured.rows[0].outcomes)}

    def place(seen: Any) -> int:
        body = seen.body
        return prompts[body["prompt"] if "prompt" in body else body["messages"][0]["content"]]

    return sorted(fake.seen, key=place)


@pytest.mark.parametrize("long_poll", [True, False])
def test_native(fake: Fake, load: Load, slack: Slack, long_poll: bool) -> None:
    fake.plan = lambda number: Plan(first=0.4)
    fake.long_poll = long_poll
    _, (result,) = load(endpoint="native", stream=False, rates=(INF,), requests=3, max_tokens=9)
    assert (result.ok, result.output_tokens, result.first_text) == (3, 36, None)
    assert result.total is not None and 0.4 <= result.total.p50 <= 0.4 + slack()
    body = fake.seen[0].body
    assert set(body) == {"prompt", "gen_length", "temperature"} and body["gen_length"] == 9
    assert result.polled is not long_poll
    assert fake.polls == 3 if long_poll else fake.polls > 6


def test_native_failures(fake: Fake, load: Load) -> None:
    plans = [Plan(error=True), Plan(status=503, headers={"Retry-After": "3"}), Plan()]
    fake.plan = lambda number: plans[number]
    _, (result,) = load(
        endpoint="native", stream=False, rates=(INF,), requests=3, concurrency=1, slo_total=9.0
    )
    assert (result.ok, result.rejected, result.failures) == (1, 1, {"failed result": 1})
    assert result.messages == {"failed result": "the engine died", "rejected": "full"}
    assert result.good is not None and result.good.requests == 1


def test_every_way_to_fail(fake: Fake, load: Load) -> None:
    plans = [
        Plan(),
        Plan(status=400),
        Plan(status=400),
        Plan(status=500),
        Plan(status=503, headers={"Retry-After": "1"}),
        Plan(status=503),
        Plan(status=429, headers={"Retry-After": "1"}),
        Plan(broken=True),
        Plan(no_done=True),
        Plan(error=True),
        Plan(garbage=True),
        Plan(first=30),
        Plan(usage=None),
    ]
    fake.plan = lambda number: plans[number]
    measured, (result,) = load(rates=(20.0,), requests=len(plans), timeout=3.0, slo_total=60.0)
    assert result.requests == len(plans) and result.unfinished == 0
    assert (result.ok, result.rejected, result.failed) == (2, 3, 8)
    assert result.rejections == {"503": 2, "429": 1} and result.retry_after == 2
    assert result.failures == {
        "http 400": 2,
        "http 500": 1,
        "broken stream": 2,
        "stream error": 1,
        "bad answer": 1,
        "timeout": 1,
    }
    assert result.messages["stream error"] == "the engine died"
    assert result.messages["http 400"] == "no: 400"
    assert result.messages["timeout"] == "no answer within 3 s"
    assert result.good is not None
    assert (result.good.requests, result.good.share) == (2, 2 / 13)
    assert (result.without_usage, result.output_tokens) == (1, 12)
    # one each: nothing is tried twice
    assert len(fake.seen) == len(plans)
    # a stream that breaks has had a first text nevertheless
    broken = [o for o in measured.rows[0].outcomes if o.kind == "broken stream"]
    assert all(o.first_text is not None for o in broken)


def test_answers_that_are_not_json(fake: Fake, load: Load) -> None:
    fake.plan = lambda number: Plan(garbage=True)
    _, (result,) = load(stream=False, rates=(INF,), requests=2)
    assert result.failures == {"bad answer": 2} and result.total is None


def test_a_stream_ends_with_its_last_event(fake: Fake, load: Load, slack: Slack) -> None:
    """Even if the server leaves the connection open; it is then not used again."""
    fake.plan = lambda number: Plan(linger=0.0 if number else 30.0)
    _, (result,) = load(rates=(INF,), requests=3, concurrency=1)
    assert result.ok == 3 and result.total is not None and result.total.max < slack()
    first, second, third = (s.peer for s in fake.seen)
    assert first != second == third


def test_queue_time(fake: Fake, load: Load) -> None:
    """From the header, and before that from the usage; nonsense is no time."""
    plans = [
        Plan(headers={"X-Queue-Time": "0.25"}),
        Plan(headers={"X-Queue-Time": "0.25"}, usage={"queue_time": 0.75}),
        Plan(headers={"X-Queue-Time": "soon"}),
        Plan(headers={"X-Queue-Time": "-1"}, usage={"queue_time": "nan"}),
    ]
    fake.plan = lambda number: plans[number % 4]
    _, (result,) = load(rates=(INF,), requests=8)
    assert result.ok == 8 and result.queue is not None
    assert (result.queue.count, result.queue.mean, result.queue.max) == (4, 0.5, 0.75)


def test_percentiles_and_goodput(fake: Fake, load: Load, slack: Slack) -> None:
    """Nine quick answers in ten and a slow one; the bound lies far from both."""
    fake.plan = lambda number: Plan(first=3.0 if number % 10 == 9 else 0.0, chunks=1)
    _, (result,) = load(rates=(40.0,), requests=40, slo_total=2.5, slo_first=2.5)
    assert result.ok == 40
    assert result.total is not None and result.first_text is not None
    assert result.total.count == 40
    assert result.total.p50 < 2.5 and 3.0 <= result.total.p99 <= 3.0 + slack()
    # as the percentile of 36 small values and 4 large ones, between two of them
    assert result.total.mean >= 0.3
    assert result.good is not None
    assert (result.good.requests, result.good.share) == (36, 0.9)
    assert result.good.per_second == pytest.approx(36 / result.seconds)
    assert result.requests_per_second == pytest.approx(40 / result.seconds)
    assert result.tokens_per_second == pytest.approx(40 * 12 / result.seconds)


def test_requests_arrive_on_schedule(fake: Fake, load: Load, slack: Slack) -> None:
    """At the server, too; slow answers keep nobody back."""
    fake.plan = lambda number: Plan(first=1.0)
    measured, (result,) = load(rates=(30.0,), duration=1.0, seed=5, burstiness=0.5)
    expected = []
    for at in arrival_times(30.0, 0.5, 5):
        if at >= 1.0:
            break
        expected.append(at)
    row = measured.rows[0]
    assert result.requests == len(expected) == len(fake.seen) > 5
    assert [o.scheduled - row.start for o in row.outcomes] == pytest.approx(expected)
    late = [s.arrived - row.start - at for s, at in zip(fake.seen, expected, strict=True)]
    assert all(-0.01 <= seconds <= slack() for seconds in late)
    assert (result.arrivals, result.rate) == ("gamma", 30.0)
    assert result.client.max_send_delay < slack()


def test_a_stall_shows(fake: Fake, load: Load, slack: Slack) -> None:
    """A second in which the server does nothing is in the times of all who came meanwhile."""
    timer = threading.Timer(0.5, lambda: fake.stall(1.0))
    timer.start()
    _, (result,) = load(trace=[TraceEntry(n / 20, "hello", {}) for n in range(40)])
    timer.join()
    assert result.ok == 40 and result.total is not None
    # twenty arrivals fall into the stall; a client that waits for its turn would see one
    assert result.total.max >= 0.9
    assert result.total.p90 >= 0.7
    assert result.total.p50 <= slack()
    # the client itself was in time
    assert result.client.max_send_delay < slack()


def test_the_client_reports_its_own_lateness(load: Load, slack: Slack) -> None:
    """Times count from the schedule even if the client is what stalls."""
    entries = [TraceEntry(n / 20, "hello", {}) for n in range(10)]

    def source(index: int) -> tuple[str, dict[str, Any]]:
        if index == 2:
            time.sleep(0.5)
        return "hello", {}

    _, (result,) = load(trace=entries, source=source)
    assert 0.3 <= result.client.max_send_delay <= 0.5 + slack() and result.late
    assert result.total is not None and result.total.max >= 0.4


def test_cap(fake: Fake, load: Load) -> None:
    """At most two at the server; the wait for a turn is part of the time."""
    fake.plan = lambda number: Plan(first=0.2, chunks=1)
    _, (result,) = load(rates=(1000.0,), requests=6, concurrency=2)
    assert result.ok == 6 and result.arrivals == "poisson"
    assert _most_at_once(fake) == 2
    assert result.client.max_slot_wait is not None and result.client.max_slot_wait >= 0.35
    assert result.total is not None and result.total.max >= 0.55
    assert len({s.peer for s in fake.seen}) == 2  # connections are used again


def test_closed_loop(fake: Fake, load: Load, slack: Slack) -> None:
    """Users who wait for their answers: their times count from sending."""
    fake.plan = lambda number: Plan(first=0.2, chunks=1)
    _, (result,) = load(rates=(INF,), concurrency=3, duration=0.7)
    assert result.arrivals == "closed loop" and result.rate is None
    assert result.ok == result.requests and 3 <= result.requests <= 12
    assert _most_at_once(fake) == 3
    assert result.total is not None and result.total.p50 <= 0.2 + slack()
    assert result.client.max_slot_wait is None
    _, (result,) = load(rates=(INF,), concurrency=3, requests=5)
    assert result.ok == 5


def _most_at_once(fake: Fake) -> int:
    """Requests that the server had at once, at most."""
    begun = [(s.arrived, 1) for s in fake.seen]
    ended = [(s.answered, -1) for s in fake.seen if s.answered is not None]
    now = most = 0
    for _, change in sorted(begun + ended):
        now += change
        most = max(most, now)
    return most


def test_trace(fake: Fake, load: Load) -> None:
    entries = [TraceEntry(0.0, "one", {"max_tokens": 3}), TraceEntry(0.3, "two", {"steps": 2})]
    _, (result,) = load(trace=entries, body={"max_tokens": 5, "steps": 8})
    assert (result.arrivals, result.rate, result.label) == ("trace", None, "trace")
    assert result.arrived_per_second == pytest.approx(2 / 0.3)
    bodies = [s.body for s in fake.seen]
    assert [(b["max_tokens"], b["steps"]) for b in bodies] == [(3, 8), (5, 2)]
    assert [b["messages"][0]["content"] for b in bodies] == ["one", "two"]
    _, (result,) = load(trace=entries, requests=1)
    assert result.requests == 1
    _, (result,) = load(trace=entries, duration=0.2)
    assert result.requests == 1


def test_sweep_and_warmup(fake: Fake, load: Load) -> None:
    _, results = load(rates=(20.0, 40.0), requests=4, warmup=2, headers={"x-team": "blue"})
    assert [(r.rate, r.ok) for r in results] == [(20.0, 4), (40.0, 4)]
    first, second = (r.arrived_per_second for r in results)
    assert first is not None and second == pytest.approx(2 * first)
    assert len(fake.seen) == 2 + 4 + 4
    assert all(s.headers["x-team"] == "blue" for s in fake.seen)


def test_api_key(fake: Fake, load: Load) -> None:
    load(rates=(INF,), requests=1, api_key="secret")
    assert fake.seen[0].headers["authorization"] == "Bearer secret"


def test_interrupt(fake: Fake) -> None:
    """What was measured before is reported; the rest is unfinished, and no later row runs."""
    fake.plan = lambda number: Plan(first=0.0 if number < 5 else 60.0)
    options = ServeOptions(url=fake.url, warmup=0, rates=(50.0, 60.0), duration=50.0)

    async def main() -> Any:
        task = asyncio.create_task(measure(options, builtin(0)))
        while len(fake.seen) < 10:
            await asyncio.sleep(0.02)
        task.cancel()
        return await task

    started = time.monotonic()
    measured = asyncio.run(main())
    assert time.monotonic() - started < 20
    assert measured.interrupted and len(measured.rows) == 1
    result = result_of(measured.rows[0], options)
    assert result.ok == 5 and result.failed == 0 and result.unfinished >= 5
    assert result.requests == result.ok + result.unfinished


def message(load: Load, **given: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(requests=1, **given)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_server_that_cannot_be_used(fake: Fake, load: Load) -> None:
    text = message(load, url="http://127.0.0.1:1")
    assert "no server answers at http://127.0.0.1:1 (Connection refused)" in text
    assert "dllmserve serve" in text and "--url" in text
    fake.models = JSONResponse({}, 401)
    assert "--api-key or DLLMSERVE_API_KEY" in message(load)
    assert "an API key was refused" in message(load, api_key="wrong")
    fake.models = JSONResponse({"data": []})
    assert "names none (HTTP 200: no model)" in message(load)
    fake.models = JSONResponse({"detail": "Not Found"}, 404)
    assert "names none (HTTP 404: Not Found)" in message(load)
    load(requests=1, model="mine", rates=(INF,))
    assert fake.seen[-1].body["model"] == "mine"
    load(requests=1, endpoint="native", stream=False, rates=(INF,))


def test_warmup_that_fails(fake: Fake, load: Load) -> None:
    fake.plan = lambda number: Plan(status=400)
    text = message(load, warmup=1)
    assert "the warm-up request failed: http 400: no: 400" in text and "--warmup 0" in text
    fake.plan = lambda number: Plan(status=503)
    assert "the warm-up request failed: rejected with 503: no: 503" in message(load, warmup=1)
