"""Graphs, the device-resident loop, mixed loads and memory on a CUDA device."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dllmserve import LLM, SamplingParams, SparseConfig
from dllmserve.errors import OutOfMemoryError
from tests import helpers
from tests.checkpoints import Shape, write_random

Job = tuple[list[int], SamplingParams, SparseConfig | None]

FAMILIES = {
    "llada": Shape(family="llada", heads=4, kv_heads=4, head_dim=32, mlp=200, max_len=2560),
    "dream": Shape(family="dream", heads=6, kv_heads=2, head_dim=32, mlp=200, max_len=2560),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("serving")
    return {name: write_random(root / name, shape) for name, shape in FAMILIES.items()}


def engine(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), device="cuda", dtype="float32", **options)


def mixed_load(count: int) -> list[Job]:
    """Prompts of 32 to 2,000 and answers of 32 to 512 tokens, every cache and rule."""
    rng = random.Random(count)
    variants: list[tuple[dict[str, Any], SparseConfig | None]] = [
        ({"cache": "none"}, None),
        ({"cache": "dual", "block_length": 32}, None),
        ({"cache": "dual", "block_length": 32, "unmask": "threshold", "threshold": 0.05}, None),
        ({"cache": "prefix", "block_length": 64}, None),
        ({"block_length": 32}, SparseConfig(retention_ratio=0.5)),
        ({"block_length": 16}, SparseConfig(retention_ratio=0.3, head_select=False)),
        ({"cache": "dual", "block_length": 32, "cfg_scale": 1.0}, None),
        ({"cache": "dual", "block_length": 32, "temperature": 0.8, "top_p": 0.9}, None),
        ({"block_length": 32, "temperature": 1.0}, SparseConfig(retention_ratio=0.5)),
    ]
    jobs: list[Job] = []
    for i in range(count):
        options, sparse = variants[i % len(variants)]
        gen = rng.randint(32, 512)
        given = {"temperature": 0.0, "gen_length": gen, "steps": max(gen // 4, 1), "seed": i}
        params = SamplingParams(**given | options, ignore_eos=i % 3 == 0)
        jobs.append((helpers.random_prompt(i, rng.randint(32, 2000)), params, sparse))
    return jobs


def run(llm: LLM, jobs: list[Job]) -> list[dict[str, Any]]:
    prompts, params, sparse = (list(column) for column in zip(*jobs, strict=True))
    outputs = llm.generate(prompts, params, sparse, use_tqdm=False)
    helpers.check_idle(llm)
    return outputs


def replays(llm: LLM) -> int:
    graphs = llm._engine._runner.graphs
    return graphs.replays if graphs else 0


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("name", "count"), [("llada", 256), ("dream", 40)])
def test_a_mixed_load_answers_as_each_request_alone(
    folders: dict[str, Path], name: str, count: int
) -> None:
    llm = engine(folders[name], max_num_seqs=64, max_num_batched_tokens=8192)
    jobs = mixed_load(count)
    together = run(llm, jobs)
    alone = [run(llm, [job])[0] for job in jobs]
    different = [i for i in range(count) if together[i] != alone[i]]
    assert different == []


@pytest.mark.parametrize("name", FAMILIES)
def test_graphs_and_kernels_do_not_change_tokens(folders: dict[str, Path], name: str) -> None:
    jobs = mixed_load(27)
    graphs = engine(folders[name])
    expected = run(graphs, jobs)
    assert replays(graphs) > 0
    assert run(graphs, jobs) == expected
    eager = engine(folders[name], enforce_eager=True, steps_per_sync=1)
    assert run(eager, jobs) == expected
    assert replays(eager) == 0
    apart = engine(folders[name], phases="separate", max_refresh_tokens=3000)
    assert run(apart, jobs) == expected
    # other kernels sum in another order, so a near tie may fall the other way
    plain = engine(folders[name], kernels="torch", attention="sdpa")
    same = [a == b for a, b in zip(run(plain, jobs), expected, strict=True)]
    assert sum(same) >= len(jobs) - 1


@contextmanager
def no_hidden_waits() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_steps_never_wait_for_the_device(folders: dict[str, Path], name: str, eager: bool) -> None:
    """Whole requests, admission and answers included, with torch's sync debug mode on."""
    llm = engine(folders[name], enforce_eager=eager)
    jobs = [job for job in mixed_load(27) if job[1].gen_length < 400]
    expected = run(llm, jobs)  # compiles kernels and captures graphs
    run(llm, jobs)
    with no_hidden_waits():
        assert run(llm, jobs) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_with_flash_attention_and_graphs(folders: dict[str, Path], name: str) -> None:
    """Rounding may choose other tokens, but as many, and none of them the mask."""
    llm = LLM(str(folders[name]), device="cuda", dtype="bfloat16")
    jobs = mixed_load(54)
    for (_, params, _), output in zip(jobs, run(llm, jobs), strict=True):
        if params.ignore_eos:
            assert len(output["token_ids"]) == params.gen_length
        assert llm.spec.mask_id not in output["token_ids"]
    assert replays(llm) > 0


def test_the_memory_plan_is_measured_and_kept(folders: dict[str, Path]) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    llm = LLM(str(folders["llada"]), device="cuda", dtype="bfloat16", gpu_memory_utilization=0.5)
    memory = llm.plan.memory
    assert memory.measured
    assert memory.activations > 0
    assert memory.graphs > 0
    assert memory.planned <= memory.allowed
    run(llm, mixed_load(60))
    assert torch.cuda.max_memory_allocated() - before <= memory.planned


def take_all_memory() -> list[torch.Tensor]:
    """Blocks that leave nothing, in large pieces first and of 1 MiB at the end."""
    hogs = []
    for size in (2**30, 2**25, 2**21, 2**20):
        while True:
            try:
                hogs.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                break
    return hogs


def test_out_of_memory_ends_what_does_not_fit_and_nothing_else(folders: dict[str, Path]) -> None:
    """Another program takes the memory that the engine had planned with."""
    llm = LLM(str(folders["llada"]), device="cuda", dtype="bfloat16", kv_pages=2000)
    small = [(helpers.random_prompt(1, 40), SamplingParams(temperature=0.0, gen_length=32), None)]
    params = SamplingParams(temperature=0.0, gen_length=512, steps=4)
    large = [(helpers.random_prompt(i, 2000), params, None) for i in range(3)]
    expected = run(llm, [*small, *large])
    torch.cuda.empty_cache()
    hogs = take_all_memory()
    try:
        with pytest.raises(OutOfMemoryError, match="max_num_batched_tokens"):
            run(llm, large)
        del hogs[-8:]  # 8 MiB are enough for a short request
        torch.cuda.empty_cache()
        assert run(llm, small)[0] == expected[0]
        assert len(run(llm, [*small, *small])) == 2
    finally:
        hogs.clear()
        torch.cuda.empty_cache()
    assert run(llm, [*small, *large]) == expected
