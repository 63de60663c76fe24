"""Matrices in e4m3 on a CUDA device."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dllmserve import LLM, SamplingParams
from dllmserve.errors import ConfigError
from tests.helpers import GOLDEN, random_prompt

CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
BLOCKS = ("sdar-kv2of4", "llada2-g4e8")
pytestmark = pytest.mark.skipif(not CAPABLE, reason="needs compute capability 8.9")


def engine(model: str | Path, **options: Any) -> LLM:
    given = {"device": "cuda", "dtype": "bfloat16", "quantization": "fp8", **options}
    return LLM(str(model), kv_pages=400, gpu_memory_utilization=0.5, **given)


@pytest.mark.parametrize("name", ["llada-kv2of4", "dream-kv2of4", *BLOCKS])
def test_graphs_give_the_same_every_time(name: str) -> None:
    """Small models, whose matrices are no multiples of anything."""
    prompts = [random_prompt(n, 5 + n) for n in range(6)]
    cache = "none" if name in BLOCKS else "dual"
    params = SamplingParams(temperature=0.0, gen_length=16, ignore_eos=True, cache=cache)
    llm = engine(GOLDEN / name)
    for prompt in prompts:
        llm.generate([prompt], params, use_tqdm=False)  # kernels one by one, and captured
    expected = [llm.generate([p], params, use_tqdm=False)[0]["token_ids"] for p in prompts]
    for _ in range(2):
        found = [llm.generate([p], params, use_tqdm=False)[0]["token_ids"] for p in prompts]
        assert found == expected
    graphs = llm._engine._runner.graphs  # type: ignore[attr-defined]
    assert graphs is not None and graphs.replays > 0


def test_the_embedded_model_still_knows_its_tasks() -> None:
    questions = ["Sort the numbers: 9 41 7", "Reverse the word: lamp", "Sort the numbers: 8 3 30 1"]
    chats = [[{"role": "user", "content": q}] for q in questions]
    params = SamplingParams(temperature=0.0, gen_length=32)
    plain = engine("tiny", quantization=None).chat(chats, params, use_tqdm=False)
    narrow = engine("tiny").chat(chats, params, use_tqdm=False)
    assert [o["text"] for o in narrow] == [o["text"] for o in plain]


def test_memory_is_what_was_planned() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    llm = engine("tiny")
    assert llm.plan.memory.measured
    assert torch.cuda.memory_allocated() - before <= llm.plan.memory.planned


def test_canvases_of_noise() -> None:
    llm = engine(GOLDEN / "diffusion-gemma-e6")
    params = SamplingParams(gen_length=32, max_denoising_steps=6, ignore_eos=True)
    outputs = llm.generate([[5, 6, 7]] * 8, params, use_tqdm=False)
    assert all(len(output["token_ids"]) == 32 for output in outputs)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    with pytest.raises(ConfigError, match="give dtype='bfloat16'"):
        engine("tiny", dtype=dtype)
