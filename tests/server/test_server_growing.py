"""Block-causal and autoregressive models behind the server: what a client sees of them."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dllmserve import LLM, SamplingParams
from dllmserve.core.model_spec import NO_MASK
from dllmserve.core.validator import RequestValidator
from tests.process.left import nothing_left
from tests.server.stand_in import LIMITS, SPEC, Server, run, serving, until
from tests.server.test_server_whole import whole

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "ab"}]
BLOCK = replace(SPEC, geometry="block", block_length=4)
CAUSAL = replace(SPEC, geometry="causal", block_length=1, logit_shift=1, mask_id=NO_MASK)


async def served(server: Server, path: str, body: dict[str, Any], spec: Any, **sizes: int) -> Any:
    """The parameters that reach an engine with another model."""
    llm, limits = server.service.llm, replace(LIMITS, **sizes)
    server.engine.info = msgspec.structs.replace(llm.info, spec=spec, limits=limits)
    llm._validator = RequestValidator(spec, limits, True)
    answer = await server.post(path, body)
    assert answer.status == 200, answer.error
    return server.engine.calls[-1].submit.params


LENGTHS: list[tuple[Any, str, dict[str, Any], dict[str, int], int]] = [
    # a chat of five tokens gets what is left of the context, whatever a step may hold
    (CAUSAL, CHAT, {}, {"max_num_batched_tokens": 8}, 251),
    (CAUSAL, CHAT, {}, {"num_pages": 10}, 155),
    (CAUSAL, CHAT, {"temperature": 0, "stop_token_ids": [7]}, {}, 251),
    (BLOCK, CHAT, {"unmask": "dynamic"}, {}, 251),
    # the last block has to fit as well
    (BLOCK, CHAT, {}, {"max_model_len": 255}, 247),
    (BLOCK, CHAT, {"block_length": 32}, {"max_model_len": 255}, 219),
    (BLOCK, COMPLETE, {"prompt": "a" * 200}, {"max_model_len": 255}, 52),
    # an answer that does not end by itself
    (CAUSAL, CHAT, {"ignore_eos": True}, {}, 128),
    (CAUSAL, COMPLETE, {"prompt": "a"}, {}, 128),
    (CAUSAL, CHAT, {"max_completion_tokens": 3}, {}, 3),
    (CAUSAL, "/v1/generate", {"prompt": "a"}, {}, 64),
    (BLOCK, "/v1/generate", {"prompt": "a"}, {}, 128),
]


def test_how_long_an_answer_may_be_that_nobody_gave_a_length(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for spec, path, given, sizes, length in LENGTHS:
                body = given if "prompt" in given else {"messages": HI, **given}
                params = await served(server, path, body, spec, **sizes)
                assert params.gen_length == length, (path, given, sizes)

    run(main())


def test_what_nobody_gave_is_the_models_own(byte_checkpoint: Path) -> None:
    """A quality has the blocks of the model, and all that a client adds leaves it a quality."""

    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for given in ({}, {"seed": 5}, {"n": 2, "seed": 5}, {"stop_token_ids": [7]}):
                body = {"messages": HI, **given}
                params = await served(server, CHAT, body, BLOCK)
                assert (params.unmask, params.threshold) == ("threshold", 0.9), given
                assert (params.block_length, params.cache) == (4, "none"), given
                params = await served(server, CHAT, body, CAUSAL)
                # the same tokens, and steps that can be planned ahead
                assert (params.unmask, params.block_length) == ("steps", 1), given
            native = {"prompt": "a", "quality": "fast"}
            assert (await served(server, "/v1/generate", native, BLOCK)).block_length == 4

    run(main())


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (CAUSAL, {"cfg_scale": 1.5}, "cfg_scale"),
    (BLOCK, {"cfg_scale": 1.5}, "cfg_scale"),
    (BLOCK, {"sparse": True}, "sparse"),
    (BLOCK, {"schedule": "dream"}, "schedule"),
    (CAUSAL, {"sub_block_length": 2}, "sub_block_length"),
    (CAUSAL, {"block_length": 32}, "block_length"),
    (BLOCK, {"stop_token_ids": [260]}, "stop_token_ids"),
    (BLOCK, {"steps_per_block": 0}, "steps_per_block"),
    (BLOCK, {"max_tokens": 250}, "prompt"),
    (SPEC, {"sub_block_length": 2}, "sub_block_length"),
]


def test_refusals_name_the_field(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for spec, given, param in REFUSED:
                await served(server, COMPLETE, {"prompt": "abc", "max_tokens": 4}, spec)
                body = {"prompt": "abcdefgh", "max_tokens": 4, **given}
                for path in (COMPLETE, "/v1/generate"):
                    answer = await server.post(path, body)
                    assert answer.status == 400, (path, given)
                    assert answer.error["param"] == param, answer.error
            few = {"num_pages": 2}
            await served(server, COMPLETE, {"prompt": "abc", "max_tokens": 4}, CAUSAL, **few)
            answer = await server.post(COMPLETE, {"prompt": "abc", "max_tokens": 40})
            assert answer.error["code"] == "capacity_exceeded"
            assert answer.error["message"].endswith("shorten the prompt or max_tokens")

    run(main())


#: pages for two of the longest requests, and steps shorter than their prompts
FEW: dict[str, Any] = {"kv_pages": 20, "page_size": 8, "max_num_batched_tokens": 48}


def bodies() -> list[dict[str, Any]]:
    """Requests as both APIs take them."""
    return [
        {
            "prompt": [(7 * i + j) % 250 for j in range(3 + 5 * i)],
            "max_tokens": 20 + 3 * i,
            "temperature": 0.7,
            "seed": i,
            "ignore_eos": i % 3 > 0,
            "quality": "exact",
            **({"logprobs": 2} if i == 5 else {}),
        }
        for i in range(12)
    ]


def expected(llm: LLM, body: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in body.items() if name != "prompt"}
    [output] = llm.generate([body["prompt"]], SamplingParams(**given), use_tqdm=False)
    return output


async def all_at_once(server: Server, outputs: list[dict[str, Any]]) -> None:
    """Whole answers, streams and jobs, while pages run out: each as if it were alone."""

    async def one(index: int, body: dict[str, Any]) -> None:
        output, way = outputs[index], index % 3
        usage = output["usage"]
        if way == 0:
            answer = (await server.post(COMPLETE, body)).json()
            found, counts = answer["choices"][0], answer["usage"]
        elif way == 1:
            options = {"include_usage": True}
            given = {**body, "stream": True, "stream_options": options}
            events = [data for _, data in (await server.post(COMPLETE, given)).events()]
            assert events.pop() == "[DONE]"
            counts = events.pop()["usage"]
            pieces = [event["choices"][0] for event in events]
            assert sum(bool(piece["text"]) for piece in pieces) > 2
            found = {**pieces[-1], "text": "".join(piece["text"] for piece in pieces)}
        else:
            (id,) = (await server.post("/v1/generate", body)).json()["request_ids"]
            found = (await server.get(f"/v1/result/{id}?wait=60&details=true")).json()
            counts = found["usage"]
        assert found["text"] == output["text"], (index, way)
        assert found["finish_reason"] == output["finish_reason"]
        if way == 2:
            assert found["steps"] == output["steps"]
            assert ("logprobs" in found) == ("logprobs" in output)
            for mine, theirs in zip(
                found.get("logprobs", []), output.get("logprobs", []), strict=True
            ):
                assert mine["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)
                assert len(mine["top"]) == 2
        known = {name: counts[name] for name in usage if name != "cached_tokens"}
        assert known == {name: usage[name] for name in known}

    await asyncio.gather(*[one(*pair) for pair in enumerate(bodies())])


async def watched(server: Server, llm: LLM) -> None:
    """Played back, the steps give the answer; nothing committed changes; blocks are in order."""
    body = {**bodies()[11], "ignore_eos": True}  # its prompt takes two forwards that only store
    events = (await server.post("/v1/generate/stream", body)).events()
    name, done = events[-1]
    output = expected(llm, body)
    for one in (done, output):
        one["usage"].pop("cached_tokens")  # which requests before have left
    assert (name, done) == ("done", output)
    steps = [data for name, data in events if name == "step"]
    assert [step["forward_passes"] for step in steps] == list(range(1, len(steps) + 1))
    assert all(step["changed"] and step["length"] == body["max_tokens"] for step in steps)
    cells: dict[int, Any] = {}
    for step in steps:
        for cell in step["changed"]:
            before = cells.get(cell["position"], {"committed": False})
            if before["committed"]:  # its confidence is told once
                assert cell == {**before, "confidence": None}
            else:
                assert step["block"][0] <= cell["position"] < step["block"][1]
            cells[cell["position"]] = cell
    ids = [cells[place]["token_id"] for place in range(body["max_tokens"])]
    assert ids == events[-1][1]["token_ids"]


async def edited(server: Server, llm: LLM) -> None:
    """Edits are counted and shown, and the canvas that is played back is the answer."""
    body: dict[str, Any] = {"prompt": [5, 6, 7], "gen_length": 21, "temperature": 0.0}
    body |= {"unmask": "joint", "block_length": 8, "ignore_eos": True}
    output = expected(llm, body)
    edits = output["usage"]["edits"]
    assert edits > 0
    answer = (await server.post(COMPLETE, body)).json()
    assert answer["usage"]["edits"] == edits == server.metric("edited_tokens_total")
    events = (await server.post("/v1/generate/stream", body)).events()
    cells = [cell for name, data in events if name == "step" for cell in data["changed"]]
    assert sum(cell.get("edited", False) for cell in cells) == edits
    ids = {cell["position"]: cell["token_id"] for cell in cells}
    assert [ids[place] for place in range(21)] == events[-1][1]["token_ids"] == output["token_ids"]


@pytest.mark.parametrize("family", ["sdar", "qwen3"])
def test_from_the_first_request_to_the_last(
    family: str,
    growing_checkpoints: dict[str, Path],
    engines: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Few pages; chaos/ kills engines and servers with these models."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = growing_checkpoints[family]
    llm: LLM = engines(path)
    outputs = [expected(llm, body) for body in bodies()]

    async def main() -> None:
        async with whole(path, tmp_path / "jobs.sqlite3", **FEW) as server:
            await all_at_once(server, outputs)
            await until(lambda: server.metric("num_requests_running") == 0)
            assert server.metric("num_preemptions_total") > 0
            assert server.metric("kv_cache_usage_perc") == 0
            forwards = sum(output["usage"]["forward_passes"] for output in outputs)
            # forwards that only store, those after a preemption too, decide nothing
            assert server.metric("diffusion_num_denoising_steps_total") == forwards
            await watched(server, llm)
            if family == "sdar":
                await edited(server, llm)

    with nothing_left():
        asyncio.run(asyncio.wait_for(main(), 200))


def test_a_stream_of_text_needs_a_tokenizer(checkpoints: dict[str, Path]) -> None:
    """That is said before anything is run."""

    async def main() -> None:
        async with serving(checkpoints["llada"]) as server:
            answer = await server.post(COMPLETE, {"prompt": [1, 2], "stream": True})
            assert (answer.status, answer.error["param"]) == (400, "stream")
            assert not server.engine.calls
            whole = (await server.post(COMPLETE, {"prompt": [1, 2], "max_tokens": 4})).json()
            assert whole["usage"]["completion_tokens"] == 4

    run(main())
