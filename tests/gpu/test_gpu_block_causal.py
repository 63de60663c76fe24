"""Block-causal and autoregressive models on a CUDA device, in float32 and with CUDA graphs."""

import random
from typing import Any

import pytest

from dllmserve import LLM
from tests import helpers
from tests.engine.test_block_causal import MODELS, cases
from tests.helpers import answers
from tests.parallel.threads import threaded_llm

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {"kv_pages": 400},
    "without-prefixes": {"kv_pages": 400, "prefix_caching": False},
    "few-pages": {"kv_pages": 30, "page_size": 8, "max_num_seqs": 16},
    "small-steps": {"kv_pages": 400, "page_size": 7, "max_num_batched_tokens": 70},
}


def engine(name: str, **options: Any) -> LLM:
    folder = str(helpers.GOLDEN / name)
    return LLM(folder, device="cuda", dtype="float32", gpu_memory_utilization=0.5, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("name", MODELS)
def test_upstreams_outputs(name: str, options: dict[str, Any]) -> None:
    """Alone first, so that graphs are there; then together, in any order, twice."""
    llm, batch = engine(name, **options), cases(name)
    for case in batch:
        assert answers(llm, [case]) == [case[2]], case[1]
    for seed in range(2):
        mixed = random.Random(seed).sample(batch, len(batch))
        assert answers(llm, mixed) == [case[2] for case in mixed]
    graphs = llm._engine._runner.graphs
    assert graphs is not None and graphs.replays > 100
    scheduler = llm._engine.scheduler
    assert (scheduler.storage.cached > 0) == scheduler.limits.prefix_caching
    assert scheduler.storage.preempted > 0 or options["kv_pages"] > 30


@pytest.mark.parametrize(
    ("name", "size"), [("sdar-kv2of4", 2), ("fdv2-kv2of4", 2), ("qwen3-kv2of4", 2)]
)
def test_on_several_ranks(monkeypatch: pytest.MonkeyPatch, name: str, size: int) -> None:
    folder = str(helpers.GOLDEN / name)
    options: dict[str, Any] = {"kv_pages": 60, "page_size": 8, "max_num_seqs": 8}
    llm, _, _ = threaded_llm(monkeypatch, folder, size, device="cuda:0", dtype="float32", **options)
    batch = cases(name)
    assert answers(llm, batch) == [case[2] for case in batch]
