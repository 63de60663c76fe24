"""What each forward wrote, with which confidence, against what a watcher sees."""

from pathlib import Path
from typing import Any

import pytest

from dllmserve import SamplingParams, SparseConfig
from tests import helpers
from tests.conftest import Engines
from tests.engine.test_logprobs import KEPT, watched


@pytest.mark.parametrize("name", ["llada", "dream-tied"])
def test_every_cache_and_rules_that_mask_again(
    engines: Engines, checkpoints: dict[str, Path], name: str
) -> None:
    llm = engines(checkpoints[name])
    base = {"temperature": 0.0, "gen_length": 12, "block_length": 6, "ignore_eos": True}
    jobs: list[tuple[list[int], SamplingParams, SparseConfig | None]] = [
        (helpers.random_prompt(n, 4 + n), SamplingParams(**base | given), sparse)
        for n, (given, sparse) in enumerate(KEPT)
    ]
    columns = [list(part) for part in zip(*jobs, strict=True)]
    outputs = llm.generate(*columns, use_tqdm=False, history=True)
    plain = llm.generate(*columns, use_tqdm=False)
    helpers.check_idle(llm)
    remasked = 0
    for job, output, without in zip(jobs, outputs, plain, strict=True):
        history = output.pop("history")
        assert output == without
        steps, confidence = watched(llm, *job)
        numbers = [forward["forward"] for forward in history]
        assert numbers == list(range(1, output["usage"]["forward_passes"] + 1))
        row, by = dict[int, tuple[int, float]](), dict[int, int]()
        for forward in history:
            remasked += len(forward["remasked"])
            for place in forward["remasked"]:
                del row[place]
            assert not {place for place, *_ in forward["written"]} & set(row)
            for place, token, value in forward["written"]:
                row[place], by[place] = (token, value), forward["forward"]
        assert [row[p][0] for p in range(12)] == output["token_ids"]
        assert [by[p] for p in range(12)] == output["steps"] == steps
        assert [row[p][1] for p in range(12)] == pytest.approx(confidence, abs=1e-6)
    assert remasked


def test_ends_chunks_and_blocks(engines: Engines, checkpoints: dict[str, Path]) -> None:
    """Prompts that take forwards of their own, and what is filled in behind an end id."""
    given: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
    llm = engines(helpers.GOLDEN / "qwen3-kv2of4", max_num_batched_tokens=16)
    params = SamplingParams(max_tokens=5, **given)
    (output,) = llm.generate([helpers.random_prompt(1, 40)], params, use_tqdm=False, history=True)
    written = [forward["written"] for forward in output["history"]]
    assert [[w[:2] for w in one] for one in written] == [
        [[place, token]] for place, token in enumerate(output["token_ids"])
    ]
    ending = engines(checkpoints["llada-eos"])
    params = SamplingParams(temperature=0.0, gen_length=16, steps=8, block_length=8, early_end=True)
    prompts = [helpers.random_prompt(n, 5) for n in range(8)]
    filled = 0
    for output in ending.generate(prompts, params, use_tqdm=False, history=True):
        cells = [w for forward in output["history"] for w in forward["written"]]
        assert len({place for place, *_ in cells}) == len(cells)
        filled += sum(value is None for *_, value in cells)
    assert filled
