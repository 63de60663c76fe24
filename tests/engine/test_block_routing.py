"""Experts with a capacity: every window is routed as a whole, whatever a step is made of."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dllmserve import LLM, Hole, SamplingParams
from dllmserve.errors import ConfigError, InvalidParameterError
from tests import helpers
from tests.helpers import answers
from tests.oracles import block_loops, experts
from tests.oracles.block_loops import Canvas
from tests.parallel.threads import threaded_llm

WINDOW = 8
BOUND: dict[str, Any] = {"expert_capacity": 3, "block_size": WINDOW}


def changed(folder: Path, **changes: Any) -> Path:
    """The LLaDA2.0 checkpoint with another config.json."""
    source = helpers.GOLDEN / "llada2-g4e8"
    shutil.copy(source / "model.safetensors", folder)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed(tmp_path_factory.mktemp("bound"), **BOUND)


Job = tuple[list[int], SamplingParams, list[int]]


@pytest.fixture(scope="module")
def batch(checkpoint: Path) -> list[Job]:
    """Prompts of many lengths, some alike, and the slow twin's answers."""
    model = experts.load(checkpoint)
    logits = partial(model.block_causal, block=WINDOW)
    common = helpers.random_prompt(1, 37)
    prompts = [common, common[:36], [*common, 5, 6, 7], common[:20], [3], common]
    prompts += [helpers.random_prompt(seed, 5 + 9 * seed) for seed in range(2, 6)]
    jobs: list[Job] = []
    for length, prompt in enumerate(prompts, start=12):
        params = SamplingParams(
            temperature=0.0,
            gen_length=length,
            unmask="dynamic",
            threshold=0.6,
            steps_per_block=4,
            ignore_eos=True,
        )
        canvas = Canvas(logits, model.mask_id, WINDOW, prompt, sane=True)
        answer = block_loops.llada20(canvas, gen_length=length, steps=4, threshold=0.6)
        jobs.append((prompt, params, answer.ids))
    return jobs


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "few-pages": {"kv_pages": 16, "page_size": 8, "max_num_seqs": 16},
    "pages-across-windows": {"page_size": 6, "max_num_batched_tokens": 48},
    "pages-of-one": {"page_size": 1, "max_num_batched_tokens": 24, "max_num_seqs": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_any_company_and_any_chunks(
    checkpoint: Path, batch: list[Job], options: dict[str, Any]
) -> None:
    llm = LLM(str(checkpoint), device="cpu", **options)
    expected = [job[2] for job in batch]
    assert answers(llm, batch) == expected
    before = llm._engine.scheduler.storage.cached
    assert answers(llm, batch[::-1]) == expected[::-1]  # of a cache that the first call has filled
    assert llm._engine.scheduler.storage.cached > before
    assert [answers(llm, [job])[0] for job in batch[:3]] == expected[:3]


def test_the_bound_matters(batch: list[Job]) -> None:
    llm = LLM(str(helpers.GOLDEN / "llada2-g4e8"), device="cpu", default_block_length=WINDOW)
    assert answers(llm, batch) != [job[2] for job in batch]


def test_on_two_ranks(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, batch: list[Job]) -> None:
    llm, _, _ = threaded_llm(monkeypatch, str(checkpoint), 2, kv_pages=40, page_size=8)
    assert answers(llm, batch) == [job[2] for job in batch]


def test_on_triton_kernels(checkpoint: Path, batch: list[Job]) -> None:
    """Under the interpreter on a CPU."""
    helpers.need_interpreter()
    llm = LLM(str(checkpoint), device="cpu", attention="triton", kernels="triton", page_size=16)
    jobs = [(job[0], replace(job[1], gen_length=2), job[2][:2]) for job in (batch[4], batch[7])]
    assert answers(llm, jobs) == [job[2] for job in jobs]


def test_infilling(checkpoint: Path) -> None:
    """A hole with given tokens behind it, whose window is not full: the forward is the twin's."""
    model, prompt = experts.load(checkpoint), helpers.random_prompt(7, 19)
    llm = LLM(str(checkpoint), device="cpu")
    params = SamplingParams(temperature=0.0, steps_per_block=1, ignore_eos=True)
    [output] = llm.infill([[prompt, Hole(2), [9, 8]]], params, use_tqdm=False)
    z = model.block_causal([*prompt, model.mask_id, model.mask_id, 9, 8], WINDOW)[19:21].clone()
    z[:, model.mask_id] = -torch.inf
    assert output["holes"][0]["token_ids"] == z.argmax(dim=-1).tolist()


def test_proposals_that_would_move_tokens_are_never_made(
    tmp_path: Path, checkpoint: Path, batch: list[Job]
) -> None:
    found = answers(LLM(str(checkpoint), device="cpu"), batch)
    common = sorted({token for ids in found for token in ids})[:2]
    moving = dict(zip(("delete_token_id", "split_token_id"), common, strict=True))
    llm = LLM(str(changed(tmp_path, **BOUND, **moving)), device="cpu")
    params = SamplingParams(temperature=1.0, seed=3, ignore_eos=True, logit_bias={common[0]: 100})
    for given in ([job[1] for job in batch], params):
        outputs = llm.generate([job[0] for job in batch], given, use_tqdm=False)
        assert not {*common} & {token for output in outputs for token in output["token_ids"]}


def test_parts_of_a_window_are_refused(checkpoint: Path) -> None:
    llm = LLM(str(checkpoint), device="cpu")
    for given, words in (
        ({"block_length": 16}, "block_length=16 does not work with .* blocks of 8: leave it out"),
        ({"cache": "sub_block", "sub_block_length": 4}, "cache='sub_block' computes parts"),
    ):
        with pytest.raises(InvalidParameterError, match=words):
            llm.generate([[1, 2]], SamplingParams(**given), use_tqdm=False)
    with pytest.raises(ConfigError, match="default_block_length=16 does not work"):
        LLM(str(checkpoint), device="cpu", default_block_length=16)
