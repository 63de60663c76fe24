"""Two real engines behind one AsyncLLM: the answers of one, and no request lost with one."""

import asyncio
import os
import signal

import pytest

from dllmserve import LLM, SamplingParams
from dllmserve.async_llm import AsyncLLM
from tests.process.helpers import until
from tests.process.left import nothing_left

LONG = SamplingParams(temperature=0.0, gen_length=48, steps=48, block_length=16, ignore_eos=True)
DRAWN = SamplingParams(gen_length=16, steps=8, seed=3)
PROMPTS = [f"The {word}" for word in ("president", "people", "law", "house")]


def test_two_engines_answer_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # sums over several threads have another last bit
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sync = LLM("tiny", device="cpu", max_model_len=256)
    expected = sync.generate(PROMPTS, DRAWN, use_tqdm=False)
    long = sync.generate(PROMPTS, LONG, use_tqdm=False)

    async def main() -> None:
        llm = AsyncLLM("tiny", device="cpu", max_model_len=256, data_parallel_size=2)
        async with asyncio.timeout(200), llm:
            fleet = llm.fleet
            assert llm.info.limits.max_num_seqs == sync.plan.limits.max_num_seqs
            assert await asyncio.gather(*(llm.generate(p, DRAWN) for p in PROMPTS)) == expected
            assert all(engine.counters.steps for engine in fleet.supervisors)
            pieces = [delta.text async for delta in llm.stream_text(PROMPTS[0], DRAWN)]
            assert "".join(pieces) == expected[0]["text"]

            asked = [asyncio.create_task(llm.generate(p, LONG)) for p in PROMPTS]
            await until(lambda: all(engine.running for engine in fleet.supervisors))
            pid = fleet.supervisors[1].engine_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            assert await asyncio.gather(*asked) == long
            await until(lambda: fleet.restarts == 1 and fleet.serving == 2)
            assert fleet.requests == 0 and [e.work for e in fleet.supervisors] == [0, 0]

    with nothing_left():
        asyncio.run(main())
