"""Masked is a flag: a row may be given the mask id, no prompt may, and it is never an answer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dllmserve import LLM, Hole, RequestOutput, SamplingParams, SparseConfig
from dllmserve._settings import with_sparse
from dllmserve.errors import PromptError
from tests.conftest import SHAPES, Engines
from tests.helpers import answer, check_idle, prompt_request, random_prompt
from tests.oracles import models
from tests.reference import decode

#: the mask id is the best by far, then id 2
LOGITS = [0.0, 1.0, 3.0, 2.0, 9.0]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "hot": {"temperature": 50.0},
    "top-k-of-one": {"temperature": 0.0, "top_k": 1},
    "top-p-of-one": {"temperature": 1.0, "top_p": 0.01},
    "dream": {"temperature": 0.5, "top_k": 1, "schedule": "dream"},
    "threshold": {"temperature": 0.0, "unmask": "threshold"},
    "factor": {"temperature": 0.0, "unmask": "factor"},
    "entropy": {"temperature": 1.0, "unmask": "entropy_bound"},
    "guided": {"temperature": 0.0, "cfg_scale": 2.0, "cache": "dual"},
}


@pytest.mark.parametrize("way", WAYS)
def test_never_proposed_though_its_logit_is_the_largest(
    engines: Engines, constant_checkpoint: Callable[[list[float]], Path], way: str
) -> None:
    llm = engines(constant_checkpoint(LOGITS), max_num_seqs=4)
    params = SamplingParams(gen_length=40, steps=10, ignore_eos=True, seed=1, **WAYS[way])
    ids = answer(llm, [1, 2, 3], params)
    assert len(ids) == 40
    assert 4 not in ids
    if params.temperature == 0 or params.top_k == 1 or params.top_p < 1:
        assert set(ids) == {2}


def test_the_first_id_is_no_fallback(engines: Engines, tmp_path: Path) -> None:
    """A filter that leaves the mask id alone must not end in id 0, which may be the mask."""
    from tests.checkpoints import constant_logits, write

    settings, tensors = constant_logits([9.0, 1.0, 3.0, 2.0, 0.0])
    folder = write(tmp_path, settings | {"mask_token_id": 0, "eos_token_id": 4}, tensors)
    params = SamplingParams(temperature=0.0, top_k=1, gen_length=6, steps=3, ignore_eos=True)
    assert answer(engines(folder), [1, 2], params) == [2] * 6


def unchecked(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[RequestOutput]:
    """Answers behind prompts that were not checked."""
    core, ended = llm._engine, dict[int, RequestOutput]()
    for number, prompt in enumerate(prompts, 10**6):
        core.add(prompt_request(number, prompt, params))
    while core.has_work:
        ended |= {request.id: output for request, output in core.step().finished}
    check_idle(llm)
    return [ended[number] for number in range(10**6, 10**6 + len(prompts))]


@pytest.mark.parametrize("name", ["llada", "llada-bias", "dream"])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "sparse"])
def test_a_row_may_be_given_it(
    engines: Engines, checkpoints: dict[str, Path], name: str, cache: str
) -> None:
    """As rows without guidance are: the flag alone says what is masked."""
    mask = SHAPES[name].mask_id
    sparse = SparseConfig(default_block_len=5) if cache == "sparse" else None
    policy = "none" if sparse else cache
    oracle, llm = models.load(checkpoints[name]), engines(checkpoints[name])
    params = SamplingParams(
        temperature=0.0, gen_length=13, steps=9, block_length=5, cache=policy, ignore_eos=True
    )
    # never masks alone: positions that look alike would tie
    prompts = [[7, mask], [mask] * 6 + [9], [*random_prompt(1, 4), mask], [3, mask, mask, 5]]
    for prompt, output in zip(
        prompts, unchecked(llm, prompts, with_sparse(params, sparse)), strict=True
    ):
        assert output.token_ids == decode(oracle, prompt, params, sparse).ids
        assert output.prompt_tokens == len(prompt)


def test_a_given_mask_id_stays_as_it_is(engines: Engines, checkpoints: dict[str, Path]) -> None:
    llm, prompt = engines(checkpoints["llada"]), [60, 1, 60, 60]
    unchecked(llm, [prompt], SamplingParams(temperature=0.0, gen_length=8, steps=4))
    row = llm._engine._runner.table.tokens[:, :4].tolist()
    assert prompt in row


@pytest.mark.parametrize("name", ["llada", "llada-bias", "dream"])
def test_a_prompt_with_it_is_refused(
    engines: Engines, checkpoints: dict[str, Path], name: str
) -> None:
    """Whoever writes it wants it filled in, which holes are for."""
    llm, mask = engines(checkpoints[name]), SHAPES[name].mask_id
    why = rf"prompts\[1\] has the model's mask token, {mask}, at position 2, .* use LLM.infill"
    with pytest.raises(PromptError, match=why):
        llm.generate([[1, 2], [3, 4, mask]], use_tqdm=False)
    with pytest.raises(PromptError, match=r"templates\[0\] has the model's mask token"):
        llm.infill([[[3], Hole(4), [mask, 5]]], use_tqdm=False)
