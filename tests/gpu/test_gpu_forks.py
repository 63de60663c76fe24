"""A process that was forked from one that has used CUDA: errors at once, and a CPU still works."""

from pathlib import Path

import pytest

from dllmserve import LLM, SamplingParams
from dllmserve.errors import EngineError
from tests import helpers
from tests.process.forks import forked

PARAMS = SamplingParams(temperature=0.0, gen_length=8, steps=4, ignore_eos=True)


@pytest.mark.timeout(300)
def test_a_fork_of_a_process_with_cuda(checkpoints: dict[str, Path]) -> None:
    path = str(checkpoints["llada"])
    llm = LLM(path, device="cuda")
    expected = helpers.answer(llm, [1, 2, 3], PARAMS)

    def child() -> str:
        with pytest.raises(EngineError, match="forked from it"):
            helpers.answer(llm, [1, 2, 3], PARAMS)
        for device in ("auto", "cuda"):
            with pytest.raises(EngineError, match="'spawn' method, or set device='cpu'"):
                LLM(path, device=device)
        return str(len(helpers.answer(LLM(path, device="cpu"), [1, 2, 3], PARAMS)))

    assert forked(child) == "8"
    assert helpers.answer(llm, [1, 2, 3], PARAMS) == expected
