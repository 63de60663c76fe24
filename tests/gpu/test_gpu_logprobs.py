"""Step maps and log-probabilities on a CUDA device: graphs on and off, and a CPU."""

from pathlib import Path
from typing import Any

import pytest

from dllmserve import LLM, SamplingParams
from tests import helpers

VARIANTS: list[dict[str, Any]] = [
    {"steps": 12, "logprobs": 3},
    {"steps": 12},
    {"unmask": "threshold", "threshold": 0.05, "logprobs": 0},
    {"steps": 12, "cfg_scale": 0.7, "logprobs": 20},
    {"steps": 12, "temperature": 0.8, "logprobs": 1},
    {"steps": 12, "temperature": 0.9, "top_p": 0.8, "logit_bias": {7: 2.0}, "logprobs": 4},
    {"steps": 12, "confidence_eos_eot_inf": True, "logprobs": 2},
    {"unmask": "wino", "threshold": 0.01, "threshold_back": 0.9, "logprobs": 2},
    {"unmask": "joint", "penalty_lambda": 1.0, "max_edit_steps": 3, "logprobs": 2},
    {"unmask": "dynamic", "edit_threshold": 0.1, "steps": 12, "temperature": 0.6},
]


def outputs(llm: LLM, sets: int) -> list[dict[str, Any]]:
    """Several of each variant in one batch."""
    base = {"temperature": 0.0, "gen_length": 24, "block_length": 8, "cache": "dual"}
    params = [
        SamplingParams(**{**base, **VARIANTS[i % len(VARIANTS)]}, ignore_eos=True, seed=i)
        for i in range(sets * len(VARIANTS))
    ]
    prompts = [helpers.random_prompt(i, 3 + 7 * i % 29) for i in range(len(params))]
    found = llm.generate(prompts, params, use_tqdm=False)
    helpers.check_idle(llm)
    return found


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_graphs_and_devices_agree(checkpoints: dict[str, Path], name: str) -> None:
    options: dict[str, Any] = {"dtype": "float32", "kv_pages": 200, "page_size": 8}
    expected = outputs(LLM(str(checkpoints[name]), device="cpu", **options), 2)
    for more in ({}, {"enforce_eager": True}):
        llm = LLM(str(checkpoints[name]), device="cuda", **options, **more)
        for _ in range(3):  # shapes that come back are captured, then replayed
            for mine, theirs in zip(outputs(llm, 2), expected, strict=True):
                assert mine["token_ids"] == theirs["token_ids"]
                assert mine["steps"] == theirs["steps"]
                assert ("logprobs" in mine) == ("logprobs" in theirs)
                pairs = zip(mine.get("logprobs", []), theirs.get("logprobs", []), strict=True)
                for one, other in pairs:
                    assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-3)
                    values = [value for _, value in other["top"]]
                    assert [value for _, value in one["top"]] == pytest.approx(values, abs=1e-3)


def test_likelihoods(checkpoints: dict[str, Path]) -> None:
    asked: Any = ([[1, 2, 3]] * 3, [[4], [5, 6, 7], [8, 9, 10, 11]], 16)
    path, options = str(checkpoints["llada"]), {"dtype": "float32"}
    expected = LLM(path, device="cpu", **options).log_likelihood(*asked, use_tqdm=False)
    found = LLM(path, device="cuda", **options).log_likelihood(*asked, use_tqdm=False)
    assert found == pytest.approx(expected, abs=1e-3)
