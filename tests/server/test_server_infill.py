"""Infilling over HTTP: templates, suffixes, and editors, with an engine of its own."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dllmserve import LLM, Hole, SamplingParams
from dllmserve.config import EngineConfig
from dllmserve.server.app import create_app
from dllmserve.server.config import ServerConfig
from dllmserve.server.settings import Settings
from tests import helpers
from tests.conftest import Engines
from tests.infilling import template, truths
from tests.server.stand_in import Server

INFILL, COMPLETE, EDITOR = "/v1/infill", "/v1/completions", "/infill"
#: ids that end answers of the byte model are never drawn
LONG: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


@asynccontextmanager
async def serving(directory: Path, **options: Any) -> AsyncIterator[Server]:
    """A server with a real engine."""
    config = ServerConfig(job_store="memory", shutdown_timeout=0.0, **options)
    app = create_app(Settings(config, EngineConfig(model=str(directory), device="cpu"), None))
    async with app.router.lifespan_context(app):
        service: Any = app.state.service
        yield Server(app, service, app.state.jobs, service.llm.fleet)
        assert not service.runs and not service.admission.requests


def run(main: Any) -> None:
    asyncio.run(asyncio.wait_for(main, 120))


def body_of(pieces: list[Any]) -> list[Any]:
    """A template of the package as one of HTTP."""
    found = []
    for piece in pieces:
        if isinstance(piece, Hole):
            made = {"hole": piece.length, "name": piece.name, "fill": piece.fill}
            made |= {"regex": piece.regex, "choice": piece.choice and [*piece.choice]}
            found.append({k: v for k, v in made.items() if v is not None})
        else:
            found.append(piece)
    return found


def as_python(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without what only a server tells."""
    assert answer["usage"].pop("queue_time") >= 0
    return answer


def test_upstream(engines: Engines) -> None:
    """Token for token, with as many forwards."""
    name = "llada-kv2of4"

    async def main() -> None:
        async with serving(helpers.GOLDEN / name) as server:
            asked = []
            for case in truths(name):
                given = case["params"]
                how = {"temperature": 0, "schedule": "mdlm", "steps": given["steps"]}
                how |= {"block_length": given["block_size"], "cfg_scale": given["cfg_scale"]}
                pieces = body_of(template(case["tokens"], case["holes"]))
                asked.append(server.post(INFILL, {"template": pieces, **how}))
            for case, reply in zip(truths(name), await asyncio.gather(*asked), strict=True):
                answer = reply.json()
                assert answer["token_ids"] == case["expected"], case["id"]
                assert answer["usage"]["forward_passes"] == case["forwards"]
                steps = [step for hole in answer["holes"] for step in hole["steps"]]
                assert steps == case["step_map"]

    run(main())


def test_the_same_as_in_python(engines: Engines, byte_checkpoint: Path) -> None:
    llm = engines(byte_checkpoint)
    pieces: list[Any] = [
        *("Dear ", Hole(3, name="who", fill="up_to"), [44, 10], Hole(4, regex="[ab]+")),
        *(" or ", Hole(5, choice=["one", "three"], fill="up_to"), ""),
    ]
    ways: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 3, "block_length": 8, "steps_per_block": 2, "logprobs": 2},
        {"seed": 4, "quality": "balanced"},
        {"seed": 5, "unmask": "threshold", "threshold": 0.2, "cache": "dual"},
        {"temperature": 0, "sparse": {"default_block_len": 8}},
    ]

    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for way in ways:
                reply = await server.post(INFILL, {"template": body_of(pieces), **way})
                assert reply.status == 200, reply.body
                from dllmserve import SparseConfig

                made = {**way, "sparse": SparseConfig(**way["sparse"])} if "sparse" in way else way
                (expected,) = llm.infill([pieces], SamplingParams(**made), use_tqdm=False)
                assert as_python(reply.json()) == expected, way

    run(main())


ERRORS: list[tuple[str, dict[str, Any], str]] = [
    (INFILL, {}, "template is missing"),
    (INFILL, {"template": []}, "template must"),
    (INFILL, {"template": "abc"}, "template must be a list"),
    (INFILL, {"template": ["abc"]}, "template has no hole"),
    (INFILL, {"template": [{"hole": 0}]}, "template.0.hole must be an integer in [1, 8192]"),
    (INFILL, {"template": [{"hole": True}]}, "template.0.hole must be an integer"),
    (INFILL, {"template": ["a", {"hole": 2, "hol": 1}]}, "template.1.hol is not a parameter"),
    (INFILL, {"template": ["a", {"name": "x"}]}, "template.1.hole is missing"),
    (INFILL, {"template": ["a", 5]}, "template.1 must be a text, a list of token ids, or a hole"),
    (INFILL, {"template": ["\ud800", {"hole": 2}]}, "lone surrogate"),
    (INFILL, {"template": [{"hole": 2, "fill": "some"}]}, "fill"),
    (INFILL, {"template": [{"hole": 2, "regex": "a", "choice": ["b"]}]}, "exclude each other"),
    (INFILL, {"template": [{"hole": 2}], "gen_length": 3}, "gen_length=3 contradicts the holes"),
    (INFILL, {"template": [{"hole": 2}], "regex": "a"}, "give it to the Hole"),
    (INFILL, {"template": [{"hole": 2}], "stop": "a"}, "stop ends the text of a single hole"),
    (INFILL, {"template": [{"hole": 8192}] * 4000}, "more than 8192 positions"),
    (INFILL, {"template": ["a" * 999, {"hole": 2}]}, "template has 1001 positions"),
    (INFILL, {"template": ["a" * 5000, {"hole": 2}]}, "template has 5000 characters"),
    (INFILL, {"template": [{"hole": 2}], "stream": True}, "stream is not a parameter"),
    (COMPLETE, {"prompt": "a", "suffix": 5}, "suffix must be a text"),
    (COMPLETE, {"prompt": "a" * 250, "suffix": "b" * 9, "max_tokens": 9}, "prompt with its suffix"),
    (EDITOR, {"input_suffix": "a"}, "input_prefix is missing"),
    (EDITOR, {"input_prefix": "", "input_suffix": "", "n_predict": -3}, "n_predict must be"),
    (EDITOR, {"input_prefix": "", "input_suffix": "", "n": 2}, "n"),
    (EDITOR, {"input_prefix": "a" * 250, "input_suffix": "b" * 9}, "the text around the cursor"),
    (EDITOR, {"input_prefix": "", "input_suffix": "", "n_predict": 2, "max_tokens": 3}, "contrad"),
]


def test_errors(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for path, body, why in ERRORS:
                reply = await server.post(path, body)
                message = reply.json()["error"]["message"]
                assert (reply.status, why in message) == (400, True), (path, why, message)

    run(main())


def test_suffixes(engines: Engines, byte_checkpoint: Path) -> None:
    """The answer is the text of a hole between prompt and suffix, whole or in pieces."""
    llm = engines(byte_checkpoint)

    def expected(prompt: Any, suffix: str, fill: str, **given: Any) -> dict[str, Any]:
        pieces = [prompt, Hole(20, fill=fill), suffix]
        (found,) = llm.infill([pieces], SamplingParams(**given), use_tqdm=False)
        return found

    async def main() -> None:
        async with serving(byte_checkpoint, default_quality="exact") as server:
            for extra, fill in ((LONG, "exact"), ({"seed": 3}, "up_to")):
                body = {"prompt": "Dear ", "suffix": ", hello", "max_tokens": 20, **extra}
                params = {k: v for k, v in extra.items() if k != "ignore_eos"}
                found = expected("Dear ", ", hello", fill, block_length=32, **params)
                answer = (await server.post(COMPLETE, body)).json()
                (choice,) = answer["choices"]
                assert choice["text"] == found["holes"][0]["text"]
                assert choice["finish_reason"] == found["finish_reason"]
                assert answer["usage"]["prompt_tokens"] == len("Dear , hello")
                assert answer["usage"]["completion_tokens"] == found["usage"]["completion_tokens"]
                small = {**body, "block_length": 4, "logprobs": 1}
                plain = (await server.post(COMPLETE, small)).json()["choices"][0]
                reply = await server.post(COMPLETE, {**small, "stream": True})
                pieces = [json.loads(e) for e in events(reply.body) if e != "[DONE]"]
                told = [piece["choices"][0] for piece in pieces]
                assert "".join(piece["text"] for piece in told) == plain["text"]
                assert told[-1]["finish_reason"] == plain["finish_reason"]
                tokens = [t for p in told if p["logprobs"] for t in p["logprobs"]["tokens"]]
                assert tokens == plain["logprobs"]["tokens"]
            several = {"prompt": ["ab", [3, 4, 5]], "suffix": "cd", "n": 2, "seed": 1, "echo": True}
            answer = (await server.post(COMPLETE, {**several, "max_tokens": 20})).json()
            for index, choice in enumerate(answer["choices"]):
                prompt = ("ab", [3, 4, 5])[index // 2]
                one = expected(prompt, "cd", "up_to", block_length=32, seed=1 + index % 2)
                text = prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt)  # type: ignore[union-attr]
                assert choice["text"] == text + one["holes"][0]["text"]
            same = {"prompt": "ab", "max_tokens": 5, "seed": 2}
            texts = [
                (await server.post(COMPLETE, {**same, **more})).json()["choices"][0]["text"]
                for more in ({}, {"suffix": ""}, {"suffix": None})
            ]
            assert len(set(texts)) == 1
            matched = {"prompt": "a", "suffix": "b", "max_tokens": 6, "regex": "[xy]+"}
            text = (await server.post(COMPLETE, matched)).json()["choices"][0]["text"]
            assert text and set(text) <= {"x", "y"}

    run(main())


def events(body: bytes) -> list[str]:
    """Data of a stream of events."""
    lines = body.decode().split("\n")
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def test_editors(engines: Engines, byte_checkpoint: Path) -> None:
    """llama.cpp's /infill, as its clients call it."""
    llm = engines(byte_checkpoint)
    sent = {
        "id_slot": 0,
        "input_extra": [{"filename": "a.py", "text": "A", "time": 5}, {"text": "B"}],
        "input_prefix": "ab\n",
        "prompt": "  c",
        "input_suffix": "\nde",
        "n_predict": 7,
        "n_indent": 2,
        "samplers": ["top_k", "top_p", "infill"],
        "cache_prompt": True,
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": 500,
        **LONG,
    }
    whole = "a.py\nA\n\nB\n\nab\n  c"
    params = SamplingParams(temperature=0.0, block_length=32)
    (expected,) = llm.infill([[whole, Hole(7), "\nde"]], params, use_tqdm=False)
    text = expected["holes"][0]["text"]

    async def main() -> None:
        async with serving(byte_checkpoint, default_quality="exact") as server:
            answer = (await server.post(EDITOR, sent)).json()
            assert (answer["content"], answer["stop"], answer["stop_type"]) == (text, True, "limit")
            assert answer["tokens_predicted"] == 7
            assert answer["tokens_evaluated"] == answer["timings"]["prompt_n"] == len(whole) + 3
            told = events((await server.post(EDITOR, {**sent, "stream": True})).body)
            pieces = [json.loads(piece) for piece in told]
            assert "".join(piece["content"] for piece in pieces) == text
            assert [piece["stop"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
            wanted = {"response_fields": ["content", "timings/prompt_n", "none", "timings/x"]}
            answer = (await server.post(EDITOR, {**sent, **wanted})).json()
            assert answer == {"content": text, "timings/prompt_n": len(whole) + 3}
            warm = {"input_prefix": "", "input_suffix": "", "prompt": "", "n_predict": 0}
            answer = (await server.post(EDITOR, {**warm, "response_fields": [""]})).json()
            assert answer == {}
            assert (await server.post(EDITOR, warm)).json()["content"] == ""
            (letter,) = llm.tokenizer.encode("q")  # type: ignore[union-attr]
            (end, *_) = llm.spec.eos_ids
            for bias, more, kind in (
                (letter, {"stop": ["zz", "qqq"]}, ("word", "qqq")),
                (end, {}, ("eos", "")),
            ):
                body = {**sent, "logit_bias": {str(bias): 100}, "ignore_eos": False, **more}
                answer = (await server.post(EDITOR, body)).json()
                assert (answer["stop_type"], answer["stopping_word"]) == kind
                assert answer["content"] == ""
            default = {"input_prefix": "a", "input_suffix": "b", "n_predict": -1, **LONG}
            answer = (await server.post(EDITOR, default)).json()
            assert answer["tokens_predicted"] == 128

    run(main())


@pytest.mark.parametrize("name", ["qwen3", "sdar"])
def test_models_that_do_not_see_a_suffix(growing_checkpoints: dict[str, Path], name: str) -> None:
    async def main() -> None:
        async with serving(growing_checkpoints[name]) as server:
            body = {"prompt": "abc", "suffix": "def", "max_tokens": 9}
            reply = await server.post(COMPLETE, body)
            assert reply.status == 400
            message = reply.json()["error"]["message"]
            assert message.startswith("prompt with its suffix has ") and "a hole" in message

    run(main())


def test_an_llm_is_the_same_engine(engines: Engines, byte_checkpoint: Path) -> None:
    """What a row is is said once: the default quality of the server takes the same windows."""
    llm: LLM = engines(byte_checkpoint)

    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            body = {"prompt": "ab", "suffix": "cd", "max_tokens": 40, "temperature": 0}
            answer = (await server.post(COMPLETE, body)).json()
            params = SamplingParams(temperature=0.0, quality="balanced", block_length=32)
            pieces = ["ab", Hole(40, fill="up_to"), "cd"]
            (found,) = llm.infill([pieces], params, use_tqdm=False)
            assert answer["choices"][0]["text"] == found["holes"][0]["text"]
            assert answer["usage"]["forward_passes"] == found["usage"]["forward_passes"]

    run(main())
