"""Submit and poll: the documented answers, byte by byte, and everything around them."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from dllmserve import SamplingParams, SparseConfig
from tests.server.stand_in import KEYS, MAX_LEN, Reply, Server, run, secret, serving, until

Body = Callable[[Server], Awaitable[None]]


@pytest.fixture
def served(byte_checkpoint: Path) -> Callable[..., None]:
    """Runs a coroutine function with a server."""

    def go(body: Body, **options: Any) -> None:
        async def main() -> None:
            async with serving(byte_checkpoint, **options) as server:
                await body(server)

        run(main())

    return go


async def result(server: Server, id: int, query: str = "?wait=10", **headers: str) -> Reply:
    return await server.get(f"/v1/result/{id}{query}", **headers)


def test_the_documented_answers_byte_by_byte(served: Callable[..., None]) -> None:
    async def body(server: Server) -> None:
        server.engine.hold = True
        answer = await server.post("/v1/generate", {"prompt": "ab", "gen_length": 5})
        assert (answer.status, answer.body) == (200, b'{"request_ids":[0],"status":"submitted"}')
        assert answer.headers["location"] == "/v1/result/0"

        found = await result(server, 0, "")
        assert found.body == b'{"request_id":0,"status":"running","text":null}'
        assert found.headers["retry-after"] == "1"

        both = await server.post("/v1/generate_batch", {"prompts": ["x", "y"], "gen_length": 3})
        assert both.body == b'{"request_ids":[1,2],"status":"submitted"}'
        assert "location" not in both.headers

        await until(lambda: len(server.engine.calls) == 3)
        for call in server.engine.calls:
            server.engine.play(call)
        found = await result(server, 0)
        assert found.body == b'{"request_id":0,"status":"finished","text":"ababa"}'
        assert "retry-after" not in found.headers
        assert (await result(server, 2)).json()["text"] == "yyy"
        # reading changes nothing
        assert (await result(server, 0)).body == found.body

    served(body)


def test_details_on_request(served: Callable[..., None]) -> None:
    async def body(server: Server) -> None:
        await server.post("/v1/generate", {"prompt": "ab", "gen_length": 5})
        answer = (await result(server, 0, "?wait=10&details=true")).json()
        assert answer["usage"].pop("queue_time") >= 0
        assert answer == {
            "request_id": 0,
            "status": "finished",
            "text": "ababa",
            "finish_reason": "length",
            "steps": [1, 2, 3, 4, 5],
            "usage": {
                "prompt_tokens": 2,
                "completion_tokens": 5,
                "forward_passes": 5,
                "cached_tokens": 0,
                "edits": 0,
            },
        }

    served(body)


def test_a_long_poll_ends_with_the_job_or_with_its_time(served: Callable[..., None]) -> None:
    async def body(server: Server) -> None:
        server.engine.hold = True
        await server.post("/v1/generate", {"prompt": "ab", "gen_length": 2})
        early = await result(server, 0, "?wait=0.05")
        assert early.json()["status"] == "running"
        waiting = server.begin("GET", "/v1/result/0?wait=60")
        await until(lambda: len(server.engine.calls) == 1)
        await asyncio.sleep(0.02)
        assert not waiting.task.done()
        server.engine.play(server.engine.calls[0])
        assert (await waiting.reply()).json()["text"] == "ab"

        for wrong in ("61", "-1", "nan", "inf", "x"):
            refused = await result(server, 0, f"?wait={wrong}")
            assert refused.status == 400 and refused.error["param"] == "wait"
        assert (await result(server, 0, "?details=1")).error["param"] == "details"

    served(body)


def test_a_long_poll_whose_client_left_waits_no_longer(served: Callable[..., None]) -> None:
    async def body(server: Server) -> None:
        server.engine.hold = True
        await server.post("/v1/generate", {"prompt": "ab", "gen_length": 2})
        waiting = server.begin("GET", "/v1/result/0?wait=60")
        await asyncio.sleep(0.02)
        await waiting.left()
        # the job goes on: leaving a poll cancels nothing
        assert len(server.engine.open_calls) == 1

    served(body)


def test_deleting(served: Callable[..., None]) -> None:
    async def body(server: Server) -> None:
        server.engine.hold = True
        await server.post("/v1/generate_batch", {"prompts": ["a", "b"], "gen_length": 2})
        await until(lambda: len(server.engine.calls) == 2)
        deleted = await server.ask("DELETE", "/v1/result/0")
        assert (deleted.status, deleted.body) == (204, b"")
        await until(lambda: server.engine.calls[0].ended)
        assert server.engine.aborted == [server.engine.calls[0]]
        assert server.metric("requests_aborted_total", reason="deleted") == 1
        assert server.metric("requests_aborted_total", reason="disconnect") == 0

        server.engine.play(server.engine.calls[1])
        await result(server, 1)
        assert (await server.ask("DELETE", "/v1/result/1")).status == 204
        for id in (0, 1):
            for method in ("GET", "DELETE"):
                gone = await server.ask(method, f"/v1/result/{id}")
                assert gone.status == 410
                assert gone.error["type"] == "result_expired"
                assert gone.error["code"] == "result_deleted"
        never = await server.ask("DELETE", "/v1/result/7")
        assert (never.status, never.error["code"]) == (404, "not_found")

    served(body)


def test_two_deletes_at_once(served: Callable[..., None]) -> None:
    async def body(server: Server) -> None:
        await server.post("/v1/generate", {"prompt": "a", "gen_length": 2})
        await result(server, 0)
        both = [server.begin("DELETE", "/v1/result/0") for _ in range(2)]
        assert sorted([(await one.reply()).status for one in both]) == [204, 410]

    served(body)


def test_results_expire(served: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dllmserve.server.jobs._EXPIRE_EVERY_S", 0.01)

    async def body(server: Server) -> None:
        await server.post("/v1/generate", {"prompt": "a", "gen_length": 2})
        await result(server, 0)
        await until(lambda: server.metric("results_evicted_total", reason="expired") == 1)
        gone = await result(server, 0, "")
        assert (gone.status, gone.error["code"]) == (410, "result_expired")
        assert server.metric("results_stored") == server.metric("results_bytes") == 0

    served(body, result_ttl=0.05)


def test_nobody_sees_the_jobs_of_another_key(served: Callable[..., None]) -> None:
    async def body(server: Server) -> None:
        ann, bob = secret("ann"), secret("bob")
        server.engine.hold = True
        body = {"prompt": "a", "gen_length": 2}
        (id,) = (await server.post("/v1/generate", body, **ann)).json()["request_ids"]
        never = (await result(server, id + 1, "", **bob)).body
        expected = never.replace(str(id + 1).encode(), str(id).encode())
        for finished in (False, True):
            if finished:
                server.engine.play(server.engine.calls[0])
                assert (await result(server, id, **ann)).json()["text"] == "aa"
            for method in ("GET", "DELETE"):
                wait = "?wait=0.01" if method == "GET" else ""
                foreign = await server.ask(method, f"/v1/result/{id}{wait}", **bob)
                assert (foreign.status, foreign.body) == (404, expected)
        assert (await result(server, id, "")).status == 401
        assert (await server.ask("DELETE", f"/v1/result/{id}", **ann)).status == 204
        assert (await result(server, id, "", **ann)).status == 410
        # that it was there is also the owner's alone
        assert (await result(server, id, "", **bob)).body == expected

    served(body, keys=KEYS, request_id_scheme="sequential")


def test_ids_cannot_be_guessed_with_keys(served: Callable[..., None]) -> None:
    async def body(server: Server) -> None:
        prompts = {"prompts": ["a"] * 20, "gen_length": 1}
        answer = (await server.post("/v1/generate_batch", prompts, **secret("ann"))).json()
        ids = answer["request_ids"]
        assert len(set(ids)) == 20 and max(ids) > 2**40 and max(ids) < 2**53

    served(body, keys=KEYS)


def test_only_plain_ids_are_ids(served: Callable[..., None]) -> None:
    ids = ("01", "+1", "%201", "1.0", "-1", "1_0", "x", str(2**53), "9" * 500)

    async def body(server: Server) -> None:
        for method, id in product(("GET", "DELETE"), ids):
            answer = await server.ask(method, f"/v1/result/{id}")
            assert answer.status == 400, id
            assert answer.error["type"] == "invalid_request_error"
            assert answer.error["param"] == "request_id"

    served(body)


def test_a_batch_is_taken_as_a_whole_or_not_at_all(served: Callable[..., None]) -> None:
    async def body(server: Server) -> None:
        server.engine.hold = True
        wrong: list[tuple[list[Any], int, str]] = [
            (["a", ""], 400, "prompts.1"),
            (["a", [1, 300]], 400, "prompts[1][1]"),
            (["a", "b" * (MAX_LEN - 2)], 400, "prompts[1]"),
            (["a", "b" * 5000], 400, "prompts[1]"),
            (["a", 3], 400, "prompts.1"),
            (["a"] * 5, 400, "max_prompts=4"),
            ([], 400, "prompts"),
            (["a"] * 4, 503, "max_requests=3"),
        ]
        await server.post("/v1/generate", {"prompt": "a", "gen_length": 2})
        for prompts, status, part in wrong:
            given = {"prompts": prompts, "gen_length": 4}
            if status == 503:
                given["prompts"] = prompts[:3]
            answer = await server.post("/v1/generate_batch", given)
            assert answer.status == status, prompts
            assert part in answer.error["message"]
            assert "detail" in answer.json()
        assert answer.headers["retry-after"] == "1"
        assert len(server.engine.calls) == 1 and server.service.admission.requests == 1
        # and the next id was not used up
        assert (await server.post("/v1/generate", {"prompt": "b"})).json()["request_ids"] == [1]

    served(body, max_requests=3, max_prompts=4)


def test_a_batch_that_never_has_room_is_not_to_be_tried_again(served: Callable[..., None]) -> None:
    async def body(server: Server) -> None:
        answer = await server.post("/v1/generate_batch", {"prompts": ["a"] * 3, "gen_length": 2})
        assert (answer.status, answer.error["code"]) == (400, "capacity_exceeded")
        assert "retry-after" not in answer.headers
        assert server.metric("admission_rejections_total") == 0

    served(body, max_requests=2)


def test_a_failed_job_says_why(served: Callable[..., None]) -> None:
    async def body(server: Server) -> None:
        server.engine.hold = True
        await server.post("/v1/generate", {"prompt": "a", "timeout": 0.05})
        answer = (await result(server, 0)).json()
        assert answer["status"] == "failed" and answer["text"] is None
        assert "did not finish in" in answer["error"]
        assert server.metric("requests_aborted_total", reason="deadline") == 1
        assert server.metric("request_failure_total") == 0

    served(body)


FIELDS: list[tuple[dict[str, Any], SamplingParams, SparseConfig | None]] = [
    ({}, SamplingParams(), None),
    (
        {"temperature": 0, "max_tokens": 16, "ignore_eos": True, "gen_length": 16, "steps": 8},
        SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, gen_length=16, steps=8),
        None,
    ),
    (
        {"block_length": 8, "cfg_scale": 1.5, "remasking": "random", "schedule": "dream"},
        SamplingParams(block_length=8, cfg_scale=1.5, remasking="random", schedule="dream"),
        None,
    ),
    (
        {"unmask": "threshold", "threshold": 0.5, "confidence": "margin", "eps": 0.01},
        SamplingParams(unmask="threshold", threshold=0.5, confidence="margin", eps=0.01),
        None,
    ),
    (
        {"unmask": "factor", "factor": 2.0, "cache": "dual", "top_p": 0.5, "top_k": 3},
        SamplingParams(unmask="factor", factor=2.0, cache="dual", top_p=0.5, top_k=3),
        None,
    ),
    (
        {"unmask": "entropy_bound", "entropy_bound": 0.5, "stop": "x", "logit_bias": {"7": -100}},
        SamplingParams(unmask="entropy_bound", entropy_bound=0.5, stop="x", logit_bias={7: -100.0}),
        None,
    ),
    ({"stop": ["a", "b"]}, SamplingParams(stop=["a", "b"]), None),
    ({"sparse": True}, SamplingParams(), SparseConfig()),
    ({"sparse": False}, SamplingParams(), None),
    ({"sparse": {"enabled": False, "retention_ratio": 0.1}}, SamplingParams(), None),
    ({"retention_ratio": 0.25}, SamplingParams(), SparseConfig(retention_ratio=0.25)),
    (
        {"sparse": True, "delay_step": 2, "head_select": False},
        SamplingParams(),
        SparseConfig(delay_step=2, head_select=False),
    ),
    (
        {"sparse": {"pool_kernel": 5, "default_block_len": 8}},
        SamplingParams(),
        SparseConfig(pool_kernel=5, default_block_len=8),
    ),
    ({"temperature": None, "sparse": None, "stop": None}, SamplingParams(), None),
]


def test_fields_become_parameters(served: Callable[..., None]) -> None:
    async def body(server: Server) -> None:
        for count, (given, params, sparse) in enumerate(FIELDS, 1):
            answer = await server.post("/v1/generate", {"prompt": [65, 66], "seed": 11, **given})
            assert answer.status == 200, (given, answer.body)
            await until(lambda seen=count: len(server.engine.calls) == seen)
            submit = server.engine.calls[-1].submit
            assert submit.prompt_ids == [65, 66]
            assert submit.params == replace(params, seed=11, sparse=sparse), given

    served(body)


def test_a_seed_is_drawn_once_and_kept(served: Callable[..., None]) -> None:
    async def body(server: Server) -> None:
        prompts = {"prompts": ["a", "a"], "gen_length": 2}
        await server.post("/v1/generate_batch", prompts)
        await until(lambda: len(server.engine.calls) == 2)
        seeds = [call.submit.params.seed for call in server.engine.calls]
        assert len(set(seeds)) == 2

    served(body)


WRONG: list[tuple[dict[str, Any], str | None]] = [
    ({"temperature": False}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"gen_length": True}, "gen_length"),
    ({"gen_length": "32"}, "gen_length"),
    ({"gen_length": 1.0}, "gen_length"),
    ({"gen_length": 0}, "gen_length"),
    ({"cfg_scale": 1e30}, "cfg_scale"),
    ({"steps": 8193}, "steps"),
    ({"top_p": 0}, "top_p"),
    ({"seed": -1}, "seed"),
    ({"remasking": "sometimes"}, "remasking"),
    ({"cache": "sparse"}, "cache"),
    ({"cache": "dual", "sparse": True}, None),
    ({"stop": ""}, "stop"),
    ({"stop": ["x" * 257]}, "stop"),
    ({"stop": "\ud800"}, "stop"),
    ({"logit_bias": {"01": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"260": 1}}, "logit_bias"),
    ({"sparse": {"retention": 0.5}}, "sparse"),
    ({"sparse": {"pool_kernel": 3}, "delay_step": 1}, "delay_step"),
    ({"sparse": False, "delay_step": 1}, "delay_step"),
    ({"timeout": 0}, "timeout"),
    ({"temprature": 1}, "temprature"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
]


def test_wrong_fields_are_named(served: Callable[..., None]) -> None:
    async def body(server: Server) -> None:
        for given, param in WRONG:
            answer = await server.post("/v1/generate", {"prompt": "a", "gen_length": 8, **given})
            assert answer.status == 400, (given, answer.body)
            assert answer.error["type"] == "invalid_request_error"
            assert answer.error["param"] == param, (given, answer.body)
        assert server.engine.calls == []

    served(body)


def test_bodies_that_are_none(served: Callable[..., None]) -> None:
    bodies = [
        *(b"{", b"", b"[1]", b"null", b'"a"', b"[" * 100_000, b'{"prompt": "\xff"}'),
        b'{"prompt": "a", "gen_length": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
    ]

    async def body(server: Server) -> None:
        for raw in bodies:
            answer = await server.post("/v1/generate", raw)
            assert answer.status == 400, raw[:40]
            assert answer.error["type"] == "invalid_request_error"
            assert answer.error["code"].startswith("invalid_")
        assert server.engine.calls == []

    served(body)


def test_other_paths_and_methods(served: Callable[..., None]) -> None:
    async def body(server: Server) -> None:
        assert (await server.get("/v1/nothing")).error["code"] == "not_found"
        wrong = await server.get("/v1/generate")
        assert (wrong.status, wrong.error["code"]) == (405, "method_not_allowed")
        assert wrong.headers["allow"] == "POST"

    served(body)
