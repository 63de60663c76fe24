"""Mixtures of experts on CUDA devices, in float32 and with CUDA graphs; ranks and block routing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dllmserve import LLM
from tests import helpers
from tests.engine.test_block_causal import cases
from tests.engine.test_block_routing import Job, batch, checkpoint
from tests.helpers import answers
from tests.parallel.threads import threaded_llm

__all__ = ["batch", "checkpoint"]  # fixtures

SHARED = [
    pytest.param(name, divided, id=f"{name}-{'divided' if divided else 'cut'}")
    for name in ("llada2-g4e8", "sdarmoe-kv2of4", "qwen3moe-kv2of4")
    for divided in (False, True)
]


def engine(folder: Path, **options: Any) -> LLM:
    return LLM(
        str(folder),
        device="cuda",
        dtype="float32",
        kv_pages=400,
        gpu_memory_utilization=0.5,
        **options,
    )


@pytest.mark.parametrize("name", helpers.EXPERTS)
def test_upstreams_outputs(name: str) -> None:
    """LLaDA-MoE, alone and then together, twice."""
    llm, found = engine(helpers.GOLDEN / name), helpers.golden(name)
    for case in found:
        assert helpers.run_cases(llm, [case]) == [case.output], case.kind
    for _ in range(2):
        assert helpers.run_cases(llm, found) == [case.output for case in found]


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_block_routing(checkpoint: Path, batch: list[Job], kernels: str) -> None:
    llm = engine(checkpoint, kernels=kernels)
    for job in batch:
        assert answers(llm, [job]) == [job[2]]
    for _ in range(2):
        assert answers(llm, batch) == [job[2] for job in batch]
    runner: Any = llm._engine._runner
    # in plain torch the host asks who chose an expert, which no graph can
    assert (runner.graphs is not None and runner.graphs.replays > 10) == (kernels == "triton")


@pytest.mark.parametrize(("name", "divided"), SHARED)
def test_on_two_ranks(monkeypatch: pytest.MonkeyPatch, name: str, divided: bool) -> None:
    options: dict[str, Any] = {"kv_pages": 60, "page_size": 8, "max_num_seqs": 8}
    options |= {"device": "cuda:0", "dtype": "float32", "expert_parallel": divided}
    llm, _, _ = threaded_llm(monkeypatch, str(helpers.GOLDEN / name), 2, **options)
    found = cases(name)
    assert answers(llm, found) == [case[2] for case in found]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("name", "divided"), SHARED)
def test_on_two_devices(name: str, divided: bool) -> None:
    """NCCL within CUDA graphs."""
    options: dict[str, Any] = {"dtype": "float32", "kv_pages": 200, "expert_parallel": divided}
    found = cases(name)
    with LLM(str(helpers.GOLDEN / name), tensor_parallel_size=2, **options) as llm:
        for _ in range(3):
            assert answers(llm, found) == [case[2] for case in found]
        runner: Any = llm._engine._runner
        assert runner._runner.graphs.replays > 0
