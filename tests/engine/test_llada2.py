"""LLaDA2's and SGLang's loops against the engine: random requests, together, on random models."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dllmserve import LLM, SamplingParams
from tests.checkpoints import write
from tests.expert_checkpoints import random_tensors, settings
from tests.helpers import GOLDEN, answers
from tests.oracles import block_loops, experts
from tests.oracles.block_loops import Answer, Canvas
from tests.oracles.experts import ExpertModel

#: what config.json says beside the rest; None for a golden checkpoint
MODELS: dict[str, dict[str, Any] | None] = {
    "llada2-maskprop": None,  # which often proposes the mask
    "llada21-g4e12": None,
    "ungrouped": {"n_group": 1, "topk_group": 1, "num_experts": 10, "num_experts_per_tok": 3},
    "biased": {"num_shared_experts": 2, "use_qkv_bias": True, "use_bias": True},
    "pooled": {"expert_capacity": 3, "block_size": 8, "delete_token_id": 4, "split_token_id": 5},
}
Job = tuple[list[int], SamplingParams, list[int]]
Loop = Callable[[Canvas], Answer]


def checkpoint(name: str, folder: Path) -> Path:
    changes = MODELS[name]
    if changes is None:
        return GOLDEN / name
    config = settings("LLaDA2MoeModelLM", **changes)
    return write(folder, config, random_tensors(config, seed=len(name)))


def loop(dice: random.Random, length: int, block: int, end: int) -> tuple[Loop, dict[str, Any]]:
    """A loop, and the engine's parameters for the same."""
    tau, edit = dice.choice([0.2, 0.5, 0.7, 0.95, 1.0]), dice.choice([0.0, 0.3, 0.6, 0.9])
    most, least = dice.choice([0, 1, 4, 16]), dice.choice([1, 2, 5])
    penalty, steps = dice.choice([0.0, 1.5]), dice.choice([1, 3, block, 2 * block])
    edits: dict[str, Any] = {"edit_threshold": edit, "max_edit_steps": most}
    common: dict[str, Any] = {"threshold": tau, "eos_id": end}
    two, one = block_loops.llada21, block_loops.llada20
    post: dict[str, Any] = {"editing_threshold": edit, "max_post_steps": most}
    edits["threshold"] = tau
    match dice.choice(["2.0", "2.1", "2.1 dynamic", "low", "joint"]):
        case "2.0":
            made = partial(one, gen_length=length, steps=steps, **common)
            quotas = {"steps_per_block": min(steps, length)}
            return made, {"unmask": "dynamic", "threshold": tau, **quotas}
        case "2.1":
            made = partial(two, gen_length=length, num_to_transfer=least, **post, **common)
            return made, {"unmask": "threshold_strict", "min_tokens_per_step": least, **edits}
        case "2.1 dynamic":
            made = partial(two, gen_length=length, **post, **common)
            return made, {"unmask": "dynamic", **edits}
        case "low":
            made = partial(block_loops.low_confidence, length=length, **common)
            return made, {"unmask": "threshold_strict", "threshold": tau}
    given: dict[str, Any] = {"edit_threshold": edit, "max_post_edit_steps": most}
    given["penalty_lambda"] = penalty
    made = partial(block_loops.joint_threshold, length=length, **given, **common)
    return made, {"unmask": "joint", "penalty_lambda": penalty, **edits}


def job(dice: random.Random, model: ExpertModel, vocab: int, end: int) -> Job:
    router = model.shape.router
    block = router.window or dice.choice([4, 8, 16])
    length = dice.choice([1, block - 1, block, 2 * block + 3])
    size = dice.choice([1, 3, block - 1, block, block + 1, 29])
    prompt = [dice.randrange(vocab - 2) for _ in range(size)]
    if dice.random() < 0.3:
        prompt[dice.randrange(size)] = end  # which ends nothing
    ends = dice.random() < 0.6
    never = [4, 5] if router.window else []

    def logits(ids: list[int]) -> Tensor:
        z = model.block_causal(ids, block).clone()
        z[:, never] = -torch.inf
        return z

    made, params = loop(dice, length, block, end if ends else -1)
    expected = made(Canvas(logits, model.mask_id, block, prompt, sane=True)).ids
    params |= {"gen_length": length, "block_length": block, "ignore_eos": not ends}
    return prompt, SamplingParams(temperature=0.0, **params), expected


@pytest.mark.parametrize("name", MODELS)
def test_random_requests(tmp_path: Path, name: str) -> None:
    folder = checkpoint(name, tmp_path)
    llm, model = LLM(str(folder), device="cpu"), experts.load(folder)
    spec, dice = llm.spec, random.Random(name)
    batch = [job(dice, model, spec.vocab_size, spec.eos_ids[0]) for _ in range(24)]
    expected = [one[2] for one in batch]
    assert answers(llm, batch) == expected
    small = LLM(str(folder), device="cpu", page_size=6, max_num_batched_tokens=96, kv_pages=30)
    assert answers(small, batch) == expected
