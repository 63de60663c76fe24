"""A model whose logits are not numbers ends the request that met them, and no other."""

from __future__ import annotations

import pytest
import torch

from dllmserve import LLM, SamplingParams
from dllmserve.errors import EngineError
from tests.checkpoints import Shape, config, random_tensors, write

POISON = 7


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """An engine whose embedding of one id is infinite."""
    shape = Shape(family="llada")
    tensors = random_tensors(shape)
    tensors["model.transformer.wte.weight"][POISON] = torch.inf
    folder = tmp_path_factory.mktemp("poison")
    return LLM(str(write(folder, config(shape), tensors)), device="cpu")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_request_fails_and_the_engine_goes_on(llm: LLM, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, gen_length=8, steps=8, seed=1, ignore_eos=True)
    expected = llm.generate([[1, 2], [3]], params, use_tqdm=False)
    with pytest.raises(EngineError, match=r"NaN or infinite logits after 0 forwards.*float32"):
        llm.generate([[1, 2], [5, POISON], [3]], params, use_tqdm=False)
    assert llm.generate([[1, 2], [3]], params, use_tqdm=False) == expected
    llm._engine.scheduler.check_integrity()


def test_a_stream_fails_too(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, gen_length=8, steps=8)
    with pytest.raises(EngineError, match="NaN or infinite logits"):
        list(llm.stream([POISON], params))
    assert not llm._shared._live
