"""Random checkpoints of every shape against the slow decoder, for what upstream does not run."""

from pathlib import Path
from typing import Any

import pytest

from dllmserve import LLM, SamplingParams, SparseConfig
from tests.conftest import SHAPES, Engines
from tests.helpers import GOLDEN, check_idle, random_prompt
from tests.oracles import experts, models
from tests.reference import decode

Options = dict[str, Any]

#: uneven on purpose: lengths that no block divides, steps that no block count divides
RULES: dict[str, Options] = {
    "steps": {"steps": 11, "gen_length": 21, "block_length": 8},
    "few-steps": {"steps": 2, "gen_length": 26, "block_length": 6},
    "many-steps": {"steps": 99, "gen_length": 17, "block_length": 5},
    "one-block": {"steps": 7, "gen_length": 19},
    "wide-block": {"steps": 7, "gen_length": 9, "block_length": 100},
    "one-token": {"steps": 1, "gen_length": 1},
    "factor": {"unmask": "factor", "factor": 1.0, "gen_length": 21, "block_length": 8},
    "factor-wide": {"unmask": "factor", "factor": 2.5, "gen_length": 20, "confidence": "margin"},
    "threshold": {"unmask": "threshold", "threshold": 0.35, "gen_length": 22, "block_length": 9},
    "threshold-entropy": {
        "unmask": "threshold",
        "threshold": -1.5,
        "confidence": "neg_entropy",
        "gen_length": 18,
    },
    "entropy-bound": {"unmask": "entropy_bound", "entropy_bound": 2.0, "gen_length": 20},
    "margin": {"steps": 9, "gen_length": 20, "block_length": 7, "confidence": "margin"},
    "neg-entropy": {"steps": 9, "gen_length": 20, "block_length": 7, "confidence": "neg_entropy"},
    "dream": {"steps": 13, "gen_length": 22, "block_length": 12, "schedule": "dream"},
    "dream-filtered": {
        "steps": 10,
        "gen_length": 20,
        "schedule": "dream",
        "confidence": "neg_entropy",
        "top_p": 0.7,
        "top_k": 9,
    },
    "cfg": {"steps": 8, "gen_length": 18, "block_length": 7, "cfg_scale": 0.8},
    "random": {"steps": 8, "gen_length": 18, "block_length": 7, "remasking": "random", "seed": 5},
    "sampled": {"steps": 8, "gen_length": 18, "block_length": 7, "temperature": 0.8, "seed": 6},
    "sampled-filtered": {
        "steps": 12,
        "gen_length": 18,
        "temperature": 0.9,
        "schedule": "dream",
        "top_p": 0.8,
        "top_k": 12,
        "seed": 7,
        "cfg_scale": 0.3,
    },
}
CACHES: dict[str, tuple[str, SparseConfig | None]] = {
    "none": ("none", None),
    "prefix": ("prefix", None),
    "dual": ("dual", None),
    "sparse": ("none", SparseConfig(default_block_len=6)),
    "sparse-wide": ("none", SparseConfig(True, 0.3, 0, 12, False, 4)),
    "sparse-late": ("none", SparseConfig(retention_ratio=0.8, delay_step=2, pool_kernel=1)),
    "sparse-nothing": ("none", SparseConfig(retention_ratio=0.0)),
    "sparse-attention": ("none", SparseConfig(score="attention", default_block_len=6)),
    "sparse-shared": (
        "none",
        SparseConfig(score="attention", head_select=False, pool_kernel=1, min_keep=9),
    ),
    "sparse-all": ("none", SparseConfig(retention_ratio=1.0, default_block_len=3)),
}


def requests(cache: str) -> tuple[list[list[int]], list[SamplingParams], list[SparseConfig | None]]:
    """One request of each rule, with prompts of different lengths."""
    policy, sparse = CACHES[cache]
    prompts, params = [], []
    for place, options in enumerate(RULES.values()):
        prompts.append(random_prompt(place, 1 + 7 * place % 23))
        given = {"temperature": 0.0, "seed": 0, "cache": policy, **options}
        params.append(SamplingParams(**given))
    return prompts, params, [sparse] * len(prompts)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", SHAPES)
def test_engine_equals_the_slow_decoder(
    engines: Engines, checkpoints: dict[str, Path], name: str, cache: str
) -> None:
    llm = engines(checkpoints[name], max_num_batched_tokens=150, max_logit_rows=40, page_size=5)
    compare(llm, models.load(checkpoints[name]), cache, SHAPES[name].eos_ids)


@pytest.mark.parametrize("cache", CACHES)
def test_experts(engines: Engines, cache: str) -> None:
    """LLaDA-MoE with all that its code has."""
    folder = GOLDEN / "llada-moe-variant"
    llm = engines(folder, max_num_batched_tokens=150, max_logit_rows=40, page_size=5)
    compare(llm, experts.load(folder), cache, llm._engine.spec.eos_ids)


def compare(llm: LLM, oracle: models.OracleModel, cache: str, eos_ids: tuple[int, ...]) -> None:
    """One request of each rule, in one batch."""
    prompts, params, sparse = requests(cache)
    outputs = llm.generate(prompts, params, sparse, use_tqdm=False)
    check_idle(llm)
    for rule, prompt, one, config, output in zip(
        RULES, prompts, params, sparse, outputs, strict=True
    ):
        expected = decode(oracle, prompt, one, config, eos_ids=eos_ids)
        assert output["token_ids"] == expected.ids, rule
        assert output["usage"]["forward_passes"] == expected.forwards, rule
        assert output["finish_reason"] == expected.finish_reason, rule


def test_logits_follow_the_checkpoint(checkpoints: dict[str, Path]) -> None:
    """Wide embeddings, tied heads and biases all change the function that is compared above."""
    for name, shape in SHAPES.items():
        oracle = models.load(checkpoints[name])
        assert oracle.dims.tied == shape.tied
        biased = any(key.endswith(".bias") for key in oracle.weights)
        assert biased == (shape.bias or shape.family == "dream")
        embed = oracle.weights[oracle.names["embed"] + ".weight"]
        assert embed.shape == (shape.vocab + shape.extra_rows, shape.width)
    assert len(list(checkpoints["dream-odd"].glob("*.safetensors"))) == 3
