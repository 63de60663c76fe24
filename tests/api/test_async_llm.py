"""AsyncLLM: the same answers as LLM, from another process."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dllmserve import LLM, AsyncLLM, SamplingParams, SparseConfig
from dllmserve.errors import (
    CapacityError,
    ConfigError,
    ContextLengthError,
    EngineError,
    InvalidParameterError,
    PromptError,
    RequestAbortedError,
    TokenizerError,
    UnknownOptionError,
)
from dllmserve.outputs import TextDelta
from dllmserve.process.supervisor import State
from tests.process.left import nothing_left

GREEDY = SamplingParams(temperature=0.0, gen_length=24, steps=24, block_length=4, ignore_eos=True)
DRAWN = SamplingParams(gen_length=16, steps=8, seed=3, top_p=0.9, stop=["q"])
CHAT = [{"role": "user", "content": "Hi"}]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


async def same_answers(llm: AsyncLLM, sync: LLM) -> None:
    sparse = SparseConfig(retention_ratio=0.3, default_block_len=8)
    for params, how in ((GREEDY, None), (DRAWN, None), (DRAWN, sparse)):
        for prompt in ("Hello", [65, 66], np.array([65, 66])):
            expected = sync.generate([prompt], params, how, use_tqdm=False)[0]
            assert await llm.generate(prompt, params, how) == expected
    assert await llm.chat(CHAT, DRAWN) == sync.chat(CHAT, DRAWN, use_tqdm=False)[0]
    # many at once, in whatever batches
    prompts = [f"prompt {n}" for n in range(12)]
    together = await asyncio.gather(*(llm.generate(p, DRAWN) for p in prompts))
    assert together == sync.generate(prompts, DRAWN, use_tqdm=False)


async def same_streams(llm: AsyncLLM, sync: LLM) -> None:
    for params in (GREEDY, DRAWN):
        expected = sync.generate(["Hello"], params, use_tqdm=False)[0]
        deltas: list[TextDelta] = [d async for d in llm.stream_text("Hello", params)]
        assert "".join(d.text for d in deltas) == expected["text"]
        assert all(d.text and d.output is None for d in deltas[:-1])
        last = deltas[-1].output
        assert last is not None and last.as_dict() == expected
        assert sum(d.tokens for d in deltas) == last.completion_tokens
        canvases = [c async for c in llm.stream([65, 66], params)]
        assert canvases == list(sync.stream([65, 66], params))
        assert canvases[-1].output is not None
    # several pieces, as blocks are committed one after the other
    pieces = [d.text async for d in llm.stream_text("Hello", GREEDY)]
    assert len([p for p in pieces if p]) > 3


async def same_logprobs(llm: AsyncLLM, sync: LLM) -> None:
    """Of whole answers and of pieces; those of all pieces together are the answer's."""
    for params in (GREEDY, DRAWN):
        asked = replace(params, logprobs=2)
        (expected,) = sync.generate(["Hello"], asked, use_tqdm=False)
        assert await llm.generate("Hello", asked) == expected
        (traced,) = sync.generate(["Hello"], params, use_tqdm=False, history=True)
        assert len(traced["history"]) == traced["usage"]["forward_passes"]
        assert await llm.generate("Hello", params, history=True) == traced
        deltas = [d async for d in llm.stream_text("Hello", asked)]
        assert all(d.logprobs is not None and len(d.logprobs) == d.tokens for d in deltas)
        assert [one for d in deltas for one in d.logprobs or ()] == expected["logprobs"]
        assert all([d.logprobs is None async for d in llm.stream_text("Hello", params)])


async def same_likelihoods(llm: AsyncLLM, sync: LLM) -> None:
    asked: Any = (["Hello", "Hello", [65, 66]], ["ab", "abc", [67]], 12, 3)
    found = await llm.log_likelihood(*asked)
    assert found == pytest.approx(sync.log_likelihood(*asked, use_tqdm=False), abs=1e-3)
    with pytest.raises(PromptError, match=r"answers\[0\] is empty"):
        await llm.log_likelihood(["Hello"], [[]])


async def errors(llm: AsyncLLM) -> None:
    cases: list[tuple[type[Exception], Any, Any]] = [
        (PromptError, "", None),
        (PromptError, [], None),
        (PromptError, [1, 260], None),
        (PromptError, [True], None),
        (PromptError, b"x", None),
        (PromptError, 5, None),
        (PromptError, "\ud800", None),
        (ContextLengthError, "x" * 300, None),
        (ContextLengthError, "x" * 9000, None),
        (InvalidParameterError, "x", SamplingParams(gen_length=4, logit_bias={260: 1.0})),
    ]
    for kind, prompt, params in cases:
        with pytest.raises(kind):
            await llm.generate(prompt, params)
        with pytest.raises(kind):
            await anext(llm.stream_text(prompt, params))
    for messages in ([], "Hi", [{"role": "user"}], [{"role": "user", "content": 3}]):
        with pytest.raises(PromptError):
            await llm.chat(messages)  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match="no errors"):
        await llm.chat([{"role": "error", "content": "x"}])
    with pytest.raises(CapacityError):
        await llm.generate("x" * 100, SamplingParams(gen_length=100, cfg_scale=1.0))


async def dropped(llm: AsyncLLM) -> None:
    """However a caller goes, its request goes too."""
    fleet = llm.fleet
    long = SamplingParams(temperature=0.0, gen_length=200, steps=200, block_length=4)

    def idle() -> bool:
        return fleet.counters.running == fleet.counters.waiting == 0

    tasks = [asyncio.create_task(llm.generate([n + 1], long)) for n in range(20)]
    await until(lambda: fleet.counters.running > 0)
    for task in tasks:
        task.cancel()
    assert all(
        isinstance(e, asyncio.CancelledError)
        for e in await asyncio.gather(*tasks, return_exceptions=True)
    )
    await until(idle)
    assert fleet.counters.pages_used == 0 and not fleet.requests

    for stream in (llm.stream_text("Hello", long), llm.stream("Hello", long)):
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
    await until(idle)

    call = llm.submit(llm.check([1], long))
    llm.abort(call)
    with pytest.raises(RequestAbortedError):
        await call.output()
    await until(idle)


def test_everything_is_as_with_llm(
    byte_checkpoint: Path, engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # sums over several threads have another last bit
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = {"device": "cpu", "max_num_batched_tokens": 256}
    sync = engines(byte_checkpoint, max_num_batched_tokens=256)

    async def main() -> None:
        async with asyncio.timeout(200), AsyncLLM(byte_checkpoint, **options) as llm:
            assert llm.info.limits == sync.plan.limits and llm.info.spec == sync.spec
            await same_answers(llm, sync)
            await same_streams(llm, sync)
            await same_logprobs(llm, sync)
            await same_likelihoods(llm, sync)
            await errors(llm)
            await dropped(llm)
            # without a seed each call draws its own
            drawn = [await llm.generate("Hello", SamplingParams(gen_length=16)) for _ in range(2)]
            assert drawn[0]["token_ids"] != drawn[1]["token_ids"]
            assert llm.fleet.restarts == 0
            late = asyncio.create_task(llm.generate("x", SamplingParams(gen_length=200, steps=200)))
            await until(lambda: llm.fleet.requests == 1)
        with pytest.raises(EngineError, match="closed"):
            await late
        with pytest.raises(EngineError, match="closed"):
            await llm.generate("Hello", GREEDY)
        assert llm.fleet.state is State.CLOSED

    with nothing_left():
        asyncio.run(main())


def test_options_are_checked_at_once(byte_checkpoint: Path) -> None:
    with pytest.raises(UnknownOptionError, match="did you mean 'max_model_len'"):
        AsyncLLM(byte_checkpoint, max_len=5)
    with pytest.raises(ConfigError):
        AsyncLLM(byte_checkpoint, max_model_len=-1)

    async def main() -> None:
        llm = AsyncLLM(byte_checkpoint)
        for use in (
            lambda: llm.info,
            lambda: llm.check([1]),
        ):
            with pytest.raises(EngineError, match="await start"):
                use()
        with pytest.raises(EngineError, match="await start"):
            await llm.generate("Hello")
        await llm.close()

    asyncio.run(main())
