"""Canvases of noise on a CUDA device, in float32 and with CUDA graphs."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllmserve import LLM, SamplingParams
from tests.engine.test_renoise import CASES, MODEL, noise_of, run_all

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {"kv_pages": 400},
    "few-pages": {"kv_pages": 60, "page_size": 2},
    "small-steps": {"kv_pages": 400, "max_num_batched_tokens": 40, "max_logit_rows": 7},
    "eager": {"kv_pages": 400, "enforce_eager": True},
}


def engine(model: Path = MODEL, **options: Any) -> LLM:
    return LLM(str(model), device="cuda", gpu_memory_utilization=0.5, **options)


@pytest.fixture(scope="module")
def steep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with weights so large that a changed last bit soon changes tokens."""
    folder = tmp_path_factory.mktemp("steep")
    for file in MODEL.glob("*.json"):
        shutil.copy(file, folder)
    torch.manual_seed(0)
    tensors = load_file(str(MODEL / "model.safetensors"))
    random_tensors = {
        name: 0.3 * torch.randn(tensor.shape) if tensor.dim() > 1 else tensor
        for name, tensor in tensors.items()
    }
    save_file(random_tensors, str(folder / "model.safetensors"))
    return folder


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_upstreams_outputs(options: dict[str, Any]) -> None:
    """Alone, twice, so that graphs are there; then together, in any order."""
    llm = engine(dtype="float32", **options)
    llm.use_noise(noise_of(enumerate(CASES)))
    everyone = [*range(len(CASES))]
    for number in everyone * 2:
        run_all(llm, [number])
    for seed in range(3):
        run_all(llm, random.Random(seed).sample(everyone, len(everyone)))
    graphs = llm._engine._runner.graphs  # type: ignore[attr-defined]
    assert (graphs is None) == ("enforce_eager" in options)
    assert graphs is None or graphs.replays > 100


@pytest.mark.parametrize("weights", ["golden", "steep"])
def test_tokens_do_not_depend_on_the_batch(weights: str, steep: Path) -> None:
    """Counted noise and draws, filtered ones among them, with graphs and padded steps."""
    llm = engine({"golden": MODEL, "steep": steep}[weights], dtype="float32", kv_pages=400)
    prompts = [[*range(3, 4 + n)] for n in range(12)]
    params = [
        SamplingParams(
            gen_length=20,
            max_denoising_steps=5,
            seed=n,
            top_k=(0, 3)[n % 2],
            logprobs=(None, 2)[n % 3 == 0],
        )
        for n in range(12)
    ]
    alone = [
        llm.generate([p], [q], use_tqdm=False)[0] for p, q in zip(prompts, params, strict=True)
    ]
    assert llm.generate(prompts, params, use_tqdm=False) == alone


def test_half_precision_runs() -> None:
    llm = engine(dtype="bfloat16", kv_pages=400)
    params = SamplingParams(gen_length=32, max_denoising_steps=6, ignore_eos=True)
    outputs = llm.generate([[5, 6, 7]] * 8, params, use_tqdm=False)
    assert all(len(output["token_ids"]) == 32 for output in outputs)
