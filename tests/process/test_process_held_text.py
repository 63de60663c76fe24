"""A stream of which no text was given out yet survives its engine."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from dllmserve import SamplingParams
from dllmserve.async_llm import AsyncLLM


def test_ids_without_text_are_not_given_out(byte_checkpoint: Path) -> None:
    """Every id begins a character that never ends, so all text comes at the very end."""

    async def main() -> None:
        async with AsyncLLM(byte_checkpoint, device="cpu") as llm:
            assert llm.tokenizer is not None
            begins = llm.tokenizer.encode("東")[0]
            params = SamplingParams(
                temperature=0.0, gen_length=96, steps=96, block_length=1, logit_bias={begins: 100.0}
            )
            ids = await llm.prompt_ids("a")
            call = llm.submit(llm.check(ids, params), stream=True)
            pieces: list[str] = []
            counts: list[int] = []

            async def read() -> None:
                async for delta in llm.deltas(call):
                    pieces.append(delta.text)
                    counts.append(delta.tokens)

            reading = asyncio.create_task(read())
            async with asyncio.timeout(60):
                while llm.fleet.counters.committed < 8:
                    await asyncio.sleep(0.001)
                assert not reading.done()
                (pid,) = llm.fleet.engine_pids
                os.kill(pid, signal.SIGKILL)
                await reading
            assert llm.fleet.restarts == 1 and call.reruns == 1
            alone = await llm.generate("a", params)
            assert "".join(pieces) == alone["text"]
            assert sum(counts) == alone["usage"]["completion_tokens"]

    asyncio.run(main())
