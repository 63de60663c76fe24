"""Several ranks on CUDA devices: as threads that share one, and as processes on their own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dllmserve import LLM, SamplingParams
from dllmserve.parallel.torch_group import TorchGroup
from dllmserve.process.ranks import make_store
from tests import helpers
from tests.checkpoints import write_random
from tests.gpu.test_gpu_engine import expected
from tests.helpers import random_prompt
from tests.parallel.test_rank_tokens import ALIGNED, PARAMS, SPARSE, pictures
from tests.parallel.threads import threaded_llm

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("aligned")
    return {name: write_random(base / name, shape) for name, shape in ALIGNED.items()}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["llada", "dream"])
def test_the_same_bits(
    aligned: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    """In float32 the number of ranks changes no bit, CUDA graphs on the one side included."""
    options: dict[str, Any] = {"dtype": "float32", "kv_pages": 60}
    one = LLM(str(aligned[name]), device="cuda", **options)
    several, runner, _ = threaded_llm(
        monkeypatch, str(aligned[name]), size, device="cuda:0", **options
    )
    for kind, given in PARAMS.items():
        params = SamplingParams(gen_length=16, steps=8, block_length=8, seed=7, **given)
        for sparse in SPARSE if kind in ("greedy", "drawn") else [None]:
            found = pictures(several, params, sparse)
            assert found == pictures(one, params, sparse), (kind, sparse)
    first, *others = [one.table for one in runner.runners]
    for other in others:
        assert torch.equal(first.tokens[:, :-1], other.tokens[:, :-1])


@pytest.mark.parametrize("name", helpers.MODELS)
def test_golden(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    llm, _, _ = threaded_llm(
        monkeypatch,
        str(helpers.GOLDEN / name),
        2,
        device="cuda:0",
        dtype="float32",
        max_logit_rows=50,
    )
    assert helpers.run_cases(llm, helpers.golden(name)) == expected(name)


def test_half_precision(aligned: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over ranks round differently: what the ranks agree on is what counts."""
    llm, runner, _ = threaded_llm(
        monkeypatch, str(aligned["llada"]), 2, device="cuda:0", dtype="bfloat16", kv_pages=60
    )
    params = [
        SamplingParams(gen_length=24, steps=8, temperature=t, seed=s, cache=c, ignore_eos=True)
        for s, (t, c) in enumerate([(0.0, "dual"), (0.9, "none"), (0.7, "prefix")])
    ]
    prompts = [random_prompt(i, 9) for i in range(3)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [len(o["token_ids"]) for o in outputs] == [24] * 3
    assert torch.equal(
        runner.runners[0].table.tokens[:, :-1], runner.runners[1].table.tokens[:, :-1]
    )


def test_exchanges_are_recorded_in_graphs() -> None:
    """NCCL's, with one rank, which is all that one device can have."""
    store, _ = make_store(1)
    group = TorchGroup(store, 0, 1, CUDA, 60.0)
    assert group.captures
    x = torch.ones(8, 16, device=CUDA)
    group.all_reduce(x.clone())  # connects
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        out = group.all_gather(group.all_reduce(x * 2))
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    for value in (1.0, 3.0):
        x.fill_(value)
        graph.replay()
        assert torch.equal(out, torch.full((1, 8, 16), 2 * value, device=CUDA))
    del graph
    group.abort()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("size", [2, 4])
def test_processes_on_devices_of_their_own(aligned: dict[str, Path], size: int) -> None:
    """NCCL within CUDA graphs: the same bits as on one device, and graphs are used."""
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} CUDA devices")
    options: dict[str, Any] = {"dtype": "float32", "kv_pages": 60}
    one = LLM(str(aligned["llada"]), device="cuda", **options)
    with LLM(str(aligned["llada"]), tensor_parallel_size=size, **options) as several:
        for kind, given in PARAMS.items():
            params = SamplingParams(gen_length=16, steps=8, block_length=8, seed=7, **given)
            assert pictures(several, params, None) == pictures(one, params, None), kind
        dual = SamplingParams(temperature=0.0, gen_length=32, steps=32, cache="dual")
        prompts = [random_prompt(i, 9) for i in range(5)]
        assert several.generate(prompts, dual, use_tqdm=False) == one.generate(
            prompts, dual, use_tqdm=False
        )
        graphs = several._engine._runner._runner.graphs
        assert graphs is not None and graphs.replays > 0
