"""The threads of an engine in a process of its own wait asleep."""

from __future__ import annotations

import asyncio

import psutil
import pytest

from dllmserve import AsyncLLM


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_the_engine_s_threads_sleep(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)

    async def policy() -> str:
        llm = AsyncLLM("tiny", device="cpu", threads=1)
        await llm.start()
        try:
            (pid,) = llm.fleet.engine_pids
            return psutil.Process(pid).environ()["OMP_WAIT_POLICY"]
        finally:
            await llm.close()

    assert asyncio.run(policy()) == (given or "PASSIVE")
