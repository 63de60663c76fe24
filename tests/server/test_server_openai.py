"""The OpenAI endpoints: what becomes of a body, and what comes back."""

import asyncio
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dllmserve import SamplingParams, SparseConfig, __version__
from dllmserve.core.validator import RequestValidator
from dllmserve.errors import EngineError, OutOfMemoryError
from tests.server.stand_in import LIMITS, MAX_LEN, SPEC, Server, run, serving, until

COMPLETE = "/v1/completions"
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
#: ids of the byte tokenizer
A, B = 64, 65


def plain(**given: Any) -> SamplingParams:
    """What the endpoints make of a request that gives nothing, without a default quality."""
    return SamplingParams(**{"gen_length": 128, "block_length": 32, "steps": 128, **given})


BODIES: list[tuple[dict[str, Any], SamplingParams, SparseConfig | None]] = [
    ({}, plain(), None),
    ({"max_tokens": 5}, plain(gen_length=5, steps=5), None),
    ({"gen_length": 40}, plain(gen_length=40, steps=64), None),
    ({"max_tokens": 40, "gen_length": 40}, plain(gen_length=40, steps=64), None),
    ({"max_tokens": 64, "steps": 16}, plain(gen_length=64, steps=16), None),
    ({"max_tokens": 64, "block_length": 16}, plain(gen_length=64, block_length=16, steps=64), None),
    (
        {"temperature": 0, "top_p": 0.5, "top_k": 7},
        plain(temperature=0.0, top_p=0.5, top_k=7),
        None,
    ),
    ({"stop": "x"}, plain(stop="x"), None),
    ({"stop": ["x", "yz"]}, plain(stop=["x", "yz"]), None),
    ({"stop": []}, plain(stop=[]), None),
    ({"logit_bias": {"7": -100, "8": 2.5}}, plain(logit_bias={7: -100.0, 8: 2.5}), None),
    ({"logit_bias": {}}, plain(), None),
    (
        {"unmask": "threshold", "threshold": 0.8, "cache": "dual", "cfg_scale": 0.5},
        plain(unmask="threshold", threshold=0.8, cache="dual", cfg_scale=0.5),
        None,
    ),
    ({"sparse": True}, plain(block_length=None), SparseConfig()),
    (
        {"max_tokens": 20, "default_block_len": 8, "retention_ratio": 0.25},
        plain(gen_length=20, block_length=None, steps=24),
        SparseConfig(default_block_len=8, retention_ratio=0.25),
    ),
    (
        {"sparse": {"pool_kernel": 1}, "block_length": 64},
        plain(block_length=64),
        SparseConfig(pool_kernel=1),
    ),
    # neutral values change nothing
    ({"frequency_penalty": 0, "presence_penalty": 0.0, "user": "me", "n": 1}, plain(), None),
    ({"temperature": None, "max_tokens": None, "stop": None, "seed": None}, plain(), None),
]


def test_bodies_become_parameters(byte_checkpoint: Path) -> None:
    frames = ((COMPLETE, {"prompt": "AB"}), (CHAT, {"messages": HI}))

    async def main() -> None:
        async with serving(byte_checkpoint, default_quality="exact") as server:
            for (path, frame), (given, params, sparse) in product(frames, BODIES):
                answer = await server.post(path, {**frame, "seed": 5, **given})
                assert answer.status == 200, (given, answer.body)
                submit = server.engine.calls[-1].submit
                seed = submit.params.seed
                assert seed == 5 or given.get("seed", 0) is None
                assert submit.params == replace(params, seed=seed, sparse=sparse), given

    run(main())


def test_prompts_of_all_kinds(byte_checkpoint: Path) -> None:
    cases: list[tuple[Any, list[list[int]]]] = [
        ("ab", [[A, B]]),
        ([A, B], [[A, B]]),
        (["a", "b"], [[A], [B]]),
        ([[A], [B, A]], [[A], [B, A]]),
    ]

    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for prompt, ids in cases:
                before = len(server.engine.calls)
                answer = await server.post(COMPLETE, {"prompt": prompt, "max_tokens": 2})
                assert answer.status == 200
                assert [c.submit.prompt_ids for c in server.engine.calls[before:]] == ids
                assert [c["index"] for c in answer.json()["choices"]] == list(range(len(ids)))

    run(main())


def test_the_answer_of_a_completion(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, served_model_name="it") as server:
            given = {"model": "it", "prompt": ["ab", "x"], "max_tokens": 3, "n": 2, "stop": "aa"}
            answer = (await server.post(COMPLETE, given)).json()
            usage = answer.pop("usage")
            assert answer.pop("id").startswith("cmpl-")
            assert abs(answer.pop("created") - server.service.created) < 60
            assert answer == {
                "object": "text_completion",
                "model": "it",
                "system_fingerprint": f"dllmserve-{__version__}",
                "choices": [
                    {"index": i, "text": text, "logprobs": None, "finish_reason": "length"}
                    for i, text in enumerate(["aba", "aba", "xxx", "xxx"])
                ],
            }
            assert usage.pop("queue_time") >= 0
            assert usage == {
                # each prompt counts once, every answer
                "prompt_tokens": 3,
                "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens": 12,
                "total_tokens": 15,
                "forward_passes": 12,
                "tokens_per_forward": 1.0,
                "edits": 0,
            }

    run(main())


def test_the_answer_of_a_chat(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            given = {"messages": HI, "max_completion_tokens": 4, "stop": "i"}
            answer = (await server.post(CHAT, given)).json()
            assert answer["object"] == "chat.completion"
            assert answer["id"].startswith("chatcmpl-")
            assert answer["choices"] == [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "H", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ]
            # the ids up to the stop string's end: <|user|> H i
            assert answer["usage"]["completion_tokens"] == 3
            assert server.engine.calls[0].submit.params.gen_length == 4

    run(main())


def test_several_choices_have_seeds_of_their_own(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:

            async def seeds(**given: Any) -> list[Any]:
                before = len(server.engine.calls)
                await server.post(COMPLETE, {"prompt": "a", "max_tokens": 1, **given})
                return [c.submit.params.seed for c in server.engine.calls[before:]]

            assert await seeds(n=3, seed=7) == [7, 8, 9]
            assert await seeds(n=2, seed=2**63 - 1) == [2**63 - 1, 0]
            assert await seeds(seed=-1) == [2**63 - 1]
            assert len(set(await seeds(n=3))) == 3
            assert await seeds(best_of=2, n=2, seed=1) == [1, 2]

    run(main())


def test_echo(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for prompt in (["ab", "x"], [[A, B], [87]]):
                given = {"prompt": prompt, "max_tokens": 1, "echo": True, "n": 2}
                answer = (await server.post(COMPLETE, given)).json()
                texts = [choice["text"] for choice in answer["choices"]]
                assert texts == ["aba", "aba", "xx", "xx"]

    run(main())


def test_lengths_that_fit_what_is_left(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, default_max_tokens=100) as s:
            await s.post(COMPLETE, {"prompt": "a"})
            assert s.engine.calls[-1].submit.params.gen_length == 100
            await s.post(COMPLETE, {"prompt": "a" * (MAX_LEN - 9)})
            assert s.engine.calls[-1].submit.params.gen_length == 9
            for prompt in ("a" * MAX_LEN, "a" * 16 * MAX_LEN, "a" * (16 * MAX_LEN + 1), [A] * 9999):
                answer = await s.post(COMPLETE, {"prompt": prompt})
                assert answer.status == 400
                assert answer.error["code"] == "context_length_exceeded"
            answer = await s.post(CHAT, {"messages": HI, "max_tokens": MAX_LEN})
            assert answer.error["code"] == "context_length_exceeded"
            assert f"max_model_len={MAX_LEN}" in answer.error["message"]

    run(main())


QUALITIES: list[tuple[dict[str, Any], SamplingParams]] = [
    ({"quality": "fast"}, SamplingParams(quality="fast", gen_length=40)),
    (
        {"quality": "balanced", "threshold": 0.95, "block_length": 16},
        SamplingParams(quality="balanced", gen_length=40, threshold=0.95, block_length=16),
    ),
    # the server's own, where a request says nothing of decoding
    ({"temperature": 0.5}, SamplingParams(quality="balanced", gen_length=40, temperature=0.5)),
    ({"quality": "exact"}, SamplingParams(quality="exact", gen_length=40)),
    ({"ignore_eos": True}, SamplingParams(quality="balanced", gen_length=40, ignore_eos=True)),
    ({"unmask": "factor"}, plain(gen_length=40, unmask="factor", steps=64)),
    (
        {"sparse": True},
        plain(gen_length=40, steps=64, block_length=None, sparse=SparseConfig()),
    ),
]


def test_qualities(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for given, params in QUALITIES:
                answer = await server.post(COMPLETE, {"prompt": "AB", "max_tokens": 40, **given})
                assert answer.status == 200, (given, answer.body)
                sent = replace(server.engine.calls[-1].submit.params, seed=None)
                assert sent == params, given
            answer = await server.post(COMPLETE, {"prompt": "AB", "quality": "best"})
            assert (answer.status, answer.error["param"]) == (400, "quality")
            answer = await server.post("/v1/generate", {"prompt": "AB", "quality": "fast"})
            assert answer.status == 200
            # the native endpoints have the defaults of SamplingParams
            await server.post("/v1/generate", {"prompt": "AB", "seed": 1})
            assert server.engine.calls[-1].submit.params == SamplingParams(seed=1)

    run(main())


#: what a request and the operator give, and how long a chat's answer may be: prompt and answer
#: have MAX_LEN tokens at most, and HI is 5 of them
FITS = MAX_LEN - 5
LENGTHS: list[tuple[dict[str, Any], dict[str, Any], int]] = [
    ({}, {}, FITS),
    ({"temperature": 0.5, "stop": "x", "n": 2}, {}, FITS),
    ({"quality": "fast"}, {}, FITS),
    ({"quality": "balanced", "threshold": 0.95}, {}, FITS),
    ({"quality": "balanced", "cfg_scale": 1.0}, {}, FITS),
    ({"unmask": "threshold", "early_end": True, "suffix_window": 32}, {}, FITS),
    # each forward of these costs more, the longer the answer may be
    ({"unmask": "threshold", "early_end": True}, {}, 128),
    ({"unmask": "threshold"}, {}, 128),
    ({"quality": "exact"}, {}, 128),
    ({"ignore_eos": True}, {}, 128),
    ({"steps": 16}, {}, 128),
    ({}, {"default_quality": "exact"}, 128),
    ({"quality": "fast"}, {"default_quality": "exact"}, FITS),
    # the operator's own number is for all
    ({}, {"default_max_tokens": 40}, 40),
    ({"steps": 16}, {"default_max_tokens": 40}, 40),
    ({}, {"default_max_tokens": 4000}, FITS),
    ({"max_tokens": 7}, {}, 7),
    ({"max_completion_tokens": 7}, {"default_max_tokens": 40}, 7),
]


@pytest.mark.parametrize(("given", "options", "length"), LENGTHS)
def test_how_long_a_chat_may_be(
    given: dict[str, Any], options: dict[str, Any], length: int, byte_checkpoint: Path
) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, **options) as server:
            answer = await server.post(CHAT, {"messages": HI, **given})
            assert answer.status == 200, answer
            sent = server.engine.calls[-1].submit.params
            assert sent.gen_length == length

    run(main())


def test_what_fits_also_fits_the_engine(byte_checkpoint: Path) -> None:
    """Nobody gave a length, so no length may be what a request is refused for."""
    cases: list[tuple[dict[str, Any], dict[str, Any], int]] = [
        ({"num_pages": 6}, {}, 6 * 16 - 5),
        # of eight rows each has its share, and 128 tokens at least
        ({"num_pages": 104}, {}, 13 * 16 - 5),
        ({"num_pages": 64}, {}, 128),
        ({"num_pages": 13}, {"quality": "balanced", "cfg_scale": 1.0}, 6 * 16 - 5),
        ({"num_pages": 0}, {"quality": "balanced", "cache": "none"}, FITS),
        ({"max_num_batched_tokens": 100}, {}, 95),
        ({"max_num_batched_tokens": 201}, {"quality": "balanced", "cfg_scale": 1.0}, 95),
    ]

    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            llm = server.service.llm
            for sizes, given, length in cases:
                limits = replace(LIMITS, **sizes)
                server.engine.info = msgspec.structs.replace(llm.info, limits=limits)
                llm._validator = RequestValidator(SPEC, limits, True)
                answer = await server.post(CHAT, {"messages": HI, **given})
                assert answer.status == 200, (sizes, answer)
                assert server.engine.calls[-1].submit.params.gen_length == length

    run(main())


def test_the_operators_block_length_is_for_all(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            # as with the engine's option default_block_length
            spec = replace(SPEC, block_length=8)
            server.service.llm._validator = RequestValidator(spec, LIMITS, True)
            for given, length in (({}, 8), ({"block_length": 4}, 4), ({"steps": 16}, 8)):
                await server.post(CHAT, {"messages": HI, **given})
                sent = server.engine.calls[-1].submit.params
                assert sent.block_length == length, given
                await server.post("/v1/generate", {"prompt": "Hi", **given})
                await until(lambda: len(server.engine.calls) % 2 == 0)
                sent = server.engine.calls[-1].submit.params
                assert sent.block_length == length, given

    run(main())


REFUSED: list[tuple[str, dict[str, Any], str | None]] = [
    (COMPLETE, {"logprobs": 21}, "logprobs"),
    (COMPLETE, {"logprobs": True}, "logprobs"),
    (COMPLETE, {"logprobs": 1, "echo": True}, "echo"),
    (COMPLETE, {"best_of": 2}, "best_of"),
    (COMPLETE, {"prompt": []}, "prompt"),
    (COMPLETE, {"prompt": [""]}, "prompt"),
    (COMPLETE, {"prompt": ["a", 1]}, "prompt"),
    (COMPLETE, {"n": 9}, "n"),
    (COMPLETE, {"n": 0}, "n"),
    (COMPLETE, {"stop": ["a"] * 17}, "stop"),
    (COMPLETE, {"max_tokens": 0}, "max_tokens"),
    (COMPLETE, {"max_tokens": 5, "gen_length": 6}, "gen_length"),
    (COMPLETE, {"frequency_penalty": 0.5}, "frequency_penalty"),
    (COMPLETE, {"presence_penalty": False}, "presence_penalty"),
    (COMPLETE, {"stream": "yes"}, "stream"),
    (COMPLETE, {"stream_options": {"include_usage": True}}, "stream_options"),
    (COMPLETE, {"logit_bias": {"-1": 1}}, "logit_bias"),
    (COMPLETE, {"max_completion_tokens": 5}, "max_completion_tokens"),
    (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    (CHAT, {"logprobs": 1}, "logprobs"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": []}, "chat_template_kwargs"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"prompt": "x"}, "prompt"),
]


def test_what_cannot_be_honoured_is_refused_by_name(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for path, given, param in REFUSED:
                frame: dict[str, Any] = {"prompt": "a"} if path == COMPLETE else {"messages": HI}
                answer = await server.post(path, {**frame, **given})
                assert answer.status == 400, (given, answer.body)
                assert answer.error["type"] == "invalid_request_error"
                assert answer.error["param"] == param, (given, answer.body)
                assert "detail" not in answer.json()
            assert server.engine.calls == []

    run(main())


def test_models(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            (card,) = (await server.get("/v1/models")).json()["data"]
            assert card.pop("created") > 1e9
            assert card == {
                "id": "byte-llada",
                "object": "model",
                "owned_by": "dllmserve",
                "max_model_len": MAX_LEN,
            }
            assert (await server.get("/v1/models/byte-llada")).json()["id"] == "byte-llada"
            for answer in (
                await server.get("/v1/models/org/other"),
                await server.post(COMPLETE, {"model": "org/other", "prompt": "a"}),
                await server.post(CHAT, {"model": "org/other", "messages": HI}),
            ):
                assert (answer.status, answer.error["code"]) == (404, "model_not_found")
                assert answer.error["param"] == "model"
                assert "'byte-llada'" in answer.error["message"]

    run(main())


def test_variables_of_the_chat_template(
    byte_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            tokenizer = server.service.llm.tokenizer
            assert tokenizer is not None
            source = "{{ messages[0].content }}{{ mood }}"
            monkeypatch.setattr(tokenizer, "_templates", {"default": source})
            monkeypatch.setattr(tokenizer, "_marked", {})
            for given, text in (({}, "Hi"), ({"mood": "kind<|end|>"}, "Hikind<|end|>")):
                body = {"messages": HI, "max_tokens": 1, "chat_template_kwargs": given}
                assert (await server.post(CHAT, body)).status == 200
                # what a client gives is text, whatever it looks like
                ids = server.engine.calls[-1].submit.prompt_ids
                assert ids == [byte - 33 for byte in text.encode()]

    run(main())


def test_too_many_answers(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, max_prompts=4) as server:
            answer = await server.post(COMPLETE, {"prompt": ["a"] * 3, "n": 2})
            assert answer.status == 400 and "max_prompts=4" in answer.error["message"]
            assert (await server.post(CHAT, {"messages": HI, "n": 5})).error["param"] == "n"

    run(main())


async def ended(server: Server, error: Exception, **given: Any) -> Any:
    """The answer to a request that ends so."""
    server.engine.hold = True
    before = len(server.engine.calls)
    asked = server.begin("POST", COMPLETE, {"prompt": "a", "max_tokens": 4, **given})
    await until(lambda: len(server.engine.calls) > before)
    server.engine.calls[-1].end(error)
    return await asked.reply()


def test_failures_have_a_status_and_no_insides(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            answer = await ended(server, OutOfMemoryError("CUDA out of memory in process 77"))
            assert (answer.status, answer.error["code"]) == (503, "out_of_memory")
            assert "77" not in answer.error["message"] and answer.headers["retry-after"]
            answer = await ended(server, EngineError("the model gave NaN"))
            assert (answer.status, answer.error["type"]) == (500, "server_error")
            # the first failure drops the other choices
            answer = await ended(server, EngineError("no"), n=3)
            assert answer.status == 500 and server.idle() and not server.engine.open_calls
            assert server.metric("request_failure_total", reason="engine_error") == 2
            answer = await server.post(COMPLETE, {"prompt": "a", "timeout": 0.02})
            assert (answer.status, answer.error["type"]) == (504, "timeout")

    run(main())


def test_a_client_that_leaves_drops_its_requests(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            server.engine.hold = True
            for given in ({"n": 3}, {"n": 2, "stream": True}):
                server.engine.calls.clear()
                asked = server.begin("POST", COMPLETE, {"prompt": "a", **given})
                await until(lambda: len(server.engine.calls) >= 2)
                await asyncio.sleep(0.01)
                await asked.left()
                assert server.idle() and not server.engine.open_calls
            assert server.metric("requests_aborted_total", reason="disconnect") == 5
            assert server.metric("http_requests_total", status="499", route=COMPLETE) == 1

    run(main())
