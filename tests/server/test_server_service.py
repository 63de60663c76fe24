"""Admission, runs and draining: slots are given back and counted, whatever happens."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dllmserve import SamplingParams
from dllmserve.core.request import Request
from dllmserve.core.validator import RequestValidator
from dllmserve.core.work import work_of
from dllmserve.errors import (
    CapacityError,
    EngineDiedError,
    EngineError,
    OverloadedError,
    RequestAbortedError,
)
from dllmserve.outputs import RequestOutput
from dllmserve.process.messages import Counters
from dllmserve.server.admission import Admission
from dllmserve.server.service import finish_all
from tests.server.stand_in import LIMITS, SPEC, Server, run, serving, until


def request(length: int = 10, prompt: int = 10, **given: Any) -> Request:
    params = SamplingParams(gen_length=length, steps=length, **given)
    return RequestValidator(SPEC, LIMITS, True).request(0, [1] * prompt, params)


def test_the_work_of_a_request() -> None:
    assert work_of(request(10, 10)) == 10 * 20
    assert work_of(request(10, 10, cfg_scale=1.0)) == 10 * 20 * 2
    assert work_of(request(10, 10, unmask="threshold")) == 10 * 20
    two_a_step = SamplingParams(gen_length=10, steps=5)
    assert work_of(RequestValidator(SPEC, LIMITS, True).request(0, [1] * 10, two_a_step)) == 5 * 20
    # steps beyond one token each cost nothing
    many = SamplingParams(gen_length=10, steps=500)
    assert work_of(RequestValidator(SPEC, LIMITS, True).request(0, [1] * 10, many)) == 10 * 20


def test_places_are_taken_all_or_none_and_given_back_once() -> None:
    admission = Admission(3, None)
    first = admission.take([request(), request()])
    assert (admission.requests, admission.work) == (2, 400)
    with pytest.raises(OverloadedError, match="2 requests are under way and 2 more are over"):
        admission.take([request(), request()])
    with pytest.raises(CapacityError, match="4 requests at once are over max_requests=3"):
        admission.take([request()] * 4)
    assert (admission.requests, admission.work) == (2, 400)
    for _ in range(2):
        admission.give_back(first[0])
    assert (admission.requests, admission.work) == (1, 200)
    # what was accepted earlier is never refused
    places = [admission.take_anyway(request()) for _ in range(5)]
    assert admission.requests == 6
    for place in (*places, first[1]):
        admission.give_back(place, 10)
    assert (admission.requests, admission.work) == (0, 0)
    admission.closed_because = "gone fishing"
    with pytest.raises(OverloadedError, match="gone fishing"):
        admission.take([request()])


def test_work_is_bounded_but_one_may_always_run() -> None:
    admission = Admission(100, 500)
    (large,) = admission.take([request(100, 100)])
    with pytest.raises(OverloadedError, match="work of 20000 is under way and 200 more is over"):
        admission.take([request()])
    admission.give_back(large)
    admission.take([request(), request()])
    with pytest.raises(OverloadedError):
        admission.take([request()])


def test_the_bound_is_a_minute_at_the_measured_speed() -> None:
    admission = Admission(10_000, None)
    for _ in range(10):  # ten a second
        (place,) = admission.take([request()])
        admission.give_back(place, 10)
    assert admission.retry_after() == 1
    admission.measure(10.0, 1000)  # each passed 10 times in 10 s: 100 requests' worth
    taken = 0
    with pytest.raises(OverloadedError) as caught:
        while taken < 1000:
            admission.take([request()])
            taken += 1
    assert taken == pytest.approx(600, abs=2)
    assert caught.value.retry_after == 15  # a quarter of what is under way


def test_long_requests_after_short_ones_are_no_standstill() -> None:
    """What counts is what the engine does, not only what has ended."""
    admission = Admission(100, None)
    (short,) = admission.take([request(1, 1)])
    admission.give_back(short, 1)
    admission.take([request(100, 100)] * 4)
    admission.measure(5.0, 1 + 4 * 50)  # half way in five seconds
    admission.take([request(100, 100)] * 4)
    assert admission.requests == 8


def test_dropped_requests_do_not_make_it_look_slow() -> None:
    admission = Admission(10_000, None)
    for index in range(10):
        (place,) = admission.take([request()])
        admission.give_back(place, 10 if index == 0 else None)
    admission.measure(10.0, 100)
    for _ in range(60):
        admission.take([request()])
    with pytest.raises(OverloadedError):
        admission.take([request()])


def test_answers_that_end_by_themselves_count_as_what_they_take() -> None:
    """Their length is a bound that few come near, and no reason to refuse others."""

    def chat(length: int = 240) -> Request:
        return request(length, 10, quality="balanced")

    admission = Admission(1000, 50_000)
    (first,) = admission.take([chat()])
    assert (first.forwards, first.work) == (128, 128 * (10 + 128 + 32))
    assert first.work < work_of(chat())
    # a shorter one never counts more than it may take
    (short,) = admission.take([chat(8)])
    assert (short.forwards, short.work) == (8, 8 * 18)
    for place in (first, short):
        admission.give_back(place, 4, 10)
    for _ in range(100):
        (place,) = admission.take([chat()])
        admission.give_back(place, 4, 10)
    places = admission.take([chat()] * 100)
    assert {place.forwards for place in places} == {5}
    assert admission.work == sum(place.work for place in places) <= 50_000
    for place in places:
        admission.give_back(place, 200, 240)
    # long answers are noticed as well, and what is dropped says nothing
    (place,) = admission.take([chat()])
    assert place.forwards > 150
    admission.give_back(place)
    (again,) = admission.take([chat()])
    assert again.work == place.work
    admission.give_back(again)
    # what does not end early counts as ever
    (plain,) = admission.take([request()])
    assert (plain.forwards, plain.work) == (10, 200)


def test_any_answer_of_an_autoregressive_model_may_end_early() -> None:
    causal = replace(SPEC, geometry="causal", block_length=1, logit_shift=1)

    def chat(**given: Any) -> Request:
        params = SamplingParams(max_tokens=240, **given)
        return RequestValidator(causal, LIMITS, True).request(0, [1] * 10, params)

    admission = Admission(1000, None)
    (place,) = admission.take([chat()])
    assert (place.forwards, place.work) == (128, 10 + 128 - 1)
    admission.give_back(place)
    for _ in range(100):
        (place,) = admission.take([chat()])
        admission.give_back(place, 20, 20)
    (place,) = admission.take([chat()])
    assert (place.forwards, place.work) == (21, 10 + 21 - 1)
    (whole,) = admission.take([chat(ignore_eos=True)])
    assert (whole.forwards, whole.work) == (240, 10 + 240 - 1)


def test_masks_that_every_forward_sees_count() -> None:
    admission = Admission(10, None)
    (place,) = admission.take([request(240, 10, unmask="threshold", early_end=True)])
    assert place.work == 128 * 250


def test_what_runs_at_once_is_let_in_whatever_was_learned() -> None:
    admission = Admission(100, None)
    admission.at_once = 3
    (place,) = admission.take([request()])
    admission.give_back(place, 1)
    admission.measure(1000.0, 1)
    for _ in range(3):
        admission.take([request()])
    with pytest.raises(OverloadedError, match="this server takes on"):
        admission.take([request()])


def test_the_engines_counters_are_what_is_measured(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            server.engine.hold = True
            server.service.admission.at_once = 1
            (first,) = server.service.admit([request(10, 10)])
            server.engine.counters = Counters(busy=100.0, spans=10)
            # 10 passes in 100 s: a minute is 6 passes, and 10 are under way
            with pytest.raises(OverloadedError, match="over the 120 that"):
                server.service.admit([request(10, 10)])
            assert server.metric("admission_rejections_total", reason="full") == 1
            assert server.metric("outstanding_work") == 200
            first.close()

    run(main())


def test_a_refusal_says_full_while_the_engine_restarts(byte_checkpoint: Path) -> None:
    """Requests are taken then, so it is no reason."""

    async def main() -> None:
        from dllmserve.process.supervisor import State

        async with serving(byte_checkpoint, max_requests=1) as server:
            server.engine.hold = True
            server.engine.state = State.RESTARTING
            (first,) = server.service.admit([request()])
            with pytest.raises(OverloadedError):
                server.service.admit([request()])
            assert server.metric("admission_rejections_total", reason="full") == 1
            server.service.refuse_new()
            with pytest.raises(OverloadedError):
                server.service.admit([request()])
            assert server.metric("admission_rejections_total", reason="draining") == 1
            first.close()

    run(main())


def test_an_engine_that_goes_between_two_requests(
    byte_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            server.engine.hold = True
            real, seen = server.engine.submit, []

            def submit(*given: Any, **more: Any) -> Any:
                seen.append(given)
                if len(seen) == 2:
                    raise EngineError("gone")
                return real(*given, **more)

            monkeypatch.setattr(server.engine, "submit", submit)
            with pytest.raises(EngineError, match="gone"):
                server.service.admit([request()] * 4)
            assert server.idle() and not server.engine.open_calls

    run(main())


def test_what_runs_are_counted_as(byte_checkpoint: Path) -> None:
    """Each accepted request is one of finished, failed and dropped."""

    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            server.engine.hold = True
            service, engine = server.service, server.engine
            runs = service.admit([request(4)] * 6)
            tasks = [asyncio.create_task(one.output()) for one in runs]
            await asyncio.sleep(0)
            engine.play(engine.calls[0])
            engine.calls[1].end(EngineDiedError("no"))
            tasks[2].cancel()
            runs[3].drop("shutdown", "that was it")
            runs[4].reason = "deleted"
            tasks[4].cancel()
            tasks[5].cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(found[0], RequestOutput)
            assert isinstance(found[1], EngineDiedError)
            assert isinstance(found[3], RequestAbortedError)
            assert server.idle()
            for one in runs:
                one.close()  # again
            assert server.idle()
            assert server.metric("request_success_total", finished_reason="length") == 1
            assert server.metric("request_failure_total", reason="engine_died") == 1
            aborted = {
                reason: server.metric("requests_aborted_total", reason=reason)
                for reason in ("disconnect", "shutdown", "deleted")
            }
            assert aborted == {"disconnect": 2, "shutdown": 1, "deleted": 1}
            assert server.metric("prompt_tokens_total") == 60
            assert server.metric("generation_tokens_total") == 4
            assert server.metric("request_params_max_tokens_sum") == 24
            assert server.metric("request_denoising_steps_sum") == 4
            assert server.metric("request_queue_time_seconds_count") == 1
            assert server.metric("request_inference_time_seconds_count") == 1
            assert server.metric("e2e_request_latency_seconds_count") == 1

    run(main())


def test_the_first_failure_ends_them_all(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            server.engine.hold = True
            runs = server.service.admit([request(4)] * 3)
            finishing = asyncio.create_task(finish_all(runs))
            await asyncio.sleep(0.01)
            server.engine.calls[1].end(EngineError("no"))
            with pytest.raises(EngineError, match="no"):
                await finishing
            assert server.idle() and len(server.engine.aborted) == 2

    run(main())


def test_a_drain_waits_then_drops_and_tells(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            server.engine.hold = True
            given = {"prompt": "a", "max_tokens": 2}
            asked = [
                server.begin("POST", "/v1/completions", {**given, "stream": stream})
                for stream in (False, True, False)
            ]
            await until(lambda: len(server.engine.calls) == 3)
            draining = asyncio.create_task(server.service.drain(0.3))
            await asyncio.sleep(0.05)
            refused = await server.post("/v1/completions", given)
            assert refused.status == 503 and refused.headers["retry-after"]
            assert server.metric("admission_rejections_total", reason="draining") == 1
            server.engine.play(server.engine.calls[0])
            assert (await asked[0].reply()).status == 200
            await draining
            # at its end everybody has been told
            assert server.idle()
            assert b"shut down" in asked[1].body or b"shutting down" in asked[1].body
            assert (await asked[1].reply()).events()[-1][1] == "[DONE]"
            assert (await asked[2].reply()).status == 503
            assert server.metric("requests_aborted_total", reason="shutdown") == 2
            assert server.metric("request_failure_total") == 0

    run(main())


async def statuses(server: Server) -> dict[str, tuple[int, str]]:
    found = {}
    for path in ("/health", "/v1/health", "/ready", "/live"):
        answer = await server.get(path)
        head = await server.ask("HEAD", path)
        assert head.status == answer.status
        found[path] = (answer.status, answer.json()["status"])
        assert answer.status == 200 or answer.headers["retry-after"]
    return found


def same(status: int, name: str, live: int) -> dict[str, tuple[int, str]]:
    """What all probes say."""
    paths = ("/health", "/v1/health", "/ready")
    return {**dict.fromkeys(paths, (status, name)), "/live": (live, name)}


def test_probes_in_every_state(byte_checkpoint: Path) -> None:
    async def main() -> None:
        from dllmserve.process.supervisor import State
        from tests.server.stand_in import KEYS, make_server

        _, fresh = make_server(byte_checkpoint)
        assert await statuses(fresh) == same(503, "loading", 200)
        assert (await fresh.get("/v1/models")).json()["data"][0]["max_model_len"] is None

        async with serving(byte_checkpoint, keys=KEYS) as server:  # probes need none
            engine = server.engine
            assert await statuses(server) == same(200, "ok", 200)
            assert server.metric("ready") == 1
            # a long step, or a hang: no requests for a while, and the watchdog sees to it
            engine.silence = 31.0
            assert await statuses(server) == same(503, "stalled", 200)
            assert server.metric("ready") == 0
            engine.silence = 331.0
            assert await statuses(server) == same(503, "stalled", 503)
            engine.silence, engine.state = 0.0, State.RESTARTING
            assert await statuses(server) == same(503, "restarting", 200)
            engine.state = State.READY
            server.service.refuse_new()
            assert await statuses(server) == same(503, "draining", 200)

        async with serving(byte_checkpoint, watchdog_timeout=2.0) as server:
            server.engine.silence = 3.0
            assert await statuses(server) == same(503, "stalled", 200)
            watching = asyncio.create_task(server.service.watch())
            server.engine.fail(EngineError("gone"))
            assert await statuses(server) == same(503, "failed", 503)
            assert str(await watching) == "gone" and server.service.failure is watching.result()
            refused = await server.post("/v1/completions", {"prompt": "a"})
            assert refused.status == 503
            assert server.metric("admission_rejections_total", reason="failed") == 1

    run(main())


def test_gauges_and_http_metrics(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, metrics_compat="vllm") as server:
            server.engine.hold = True
            asked = [server.begin("POST", "/v1/generate/stream", {"prompt": "a"}) for _ in "abc"]
            await until(lambda: len(server.engine.calls) == 3)
            server.engine.calls[0].start()
            assert server.metric("num_requests_running") == 1
            assert server.metric("num_requests_waiting") == 2
            server.engine.counters = Counters(pages_used=0.25, steps=5, spans=7, committed=9)
            server.engine.restarts = 2
            page = (await server.get("/metrics")).body.decode()
            for line in (
                'dllmserve:kv_cache_usage_perc{model_name="byte-llada"} 0.25',
                'vllm:kv_cache_usage_perc{model_name="byte-llada"} 0.25',
                'vllm:num_requests_running{model_name="byte-llada"} 1.0',
                'vllm:num_requests_waiting{model_name="byte-llada"} 2.0',
                'dllmserve:engine_steps_total{model_name="byte-llada"} 5.0',
                'dllmserve:diffusion_num_denoising_steps_total{model_name="byte-llada"} 7.0',
                'dllmserve:diffusion_num_committed_tokens_total{model_name="byte-llada"} 9.0',
                'dllmserve:engine_restarts_total{model_name="byte-llada"} 2.0',
            ):
                assert line in page.splitlines(), line
            for one in asked:
                await one.left()
            await server.get("/v1/result/77?wait=1")
            await server.get("/no/such/path/77")
            route = "/v1/result/{request_id}"
            assert server.metric("http_requests_total", route=route, status="404") == 1
            assert server.metric("http_requests_total", route="unmatched", status="404") == 1
            assert b"such" not in (await server.get("/metrics")).body

    run(main())
