"""Requests whose pages grow, on a real model: block-causal, in any batch, chunk and store."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from dllmserve import LLM, SamplingParams
from dllmserve.core.request import Request
from tests import helpers
from tests.conftest import Engines
from tests.oracles import models
from tests.oracles.llada import confidences, top
from tests.oracles.rules import split
from tests.paged import paged_request
from tests.rehearsal import rehearsing

NAME = "llada-kv2of4"
NUMBERS = itertools.count(10**6)


def request(prompt: list[int], **given: Any) -> Request:
    base = {"temperature": 0.0, "ignore_eos": True}
    return paged_request(next(NUMBERS), prompt, SamplingParams(**{**base, **given}), seed=5)


def run(llm: LLM, requests: list[Request]) -> list[tuple[list[int], int]]:
    """Answers and forwards."""
    engine, found = llm._engine, {}
    for one in requests:
        engine.add(one)
    while engine.has_work:
        for one, output in engine.step().finished:
            found[one.id] = output.token_ids, output.forward_passes
        engine.scheduler.check_integrity()
    helpers.check_idle(llm)
    return [found[one.id] for one in requests]


def plain_loop(model: models.OracleModel, one: Request, per_block: int) -> list[int]:
    """Block-causal decoding from its definition: everything is computed in every forward."""
    x = torch.full((1, len(one.canvas)), model.mask_id)
    x[0, : one.canvas.start] = torch.tensor(one.canvas.ids)
    masked = torch.zeros_like(x, dtype=torch.bool)
    masked[0, one.canvas.start :] = True
    size = one.params.resolved_block_length
    place = torch.arange(x.shape[1])
    sees = place[None, :] // size <= place[:, None] // size
    for start, end in one.blocks:
        inside = (place >= start) & (place < end)
        for quota in split(size, per_block):
            count = min(quota, int((masked & inside).sum()))
            if not count:
                continue
            z = model.forward(x, sees=sees).logits.clone()
            z[..., model.mask_id] = -torch.inf
            x0, open_ = z.argmax(dim=-1), masked & inside
            chosen = top(confidences(z, x0, open_, None, 0), torch.tensor([count]))
            x[chosen], masked[chosen] = x0[chosen], False
    ids: list[int] = x[0, one.canvas.start :].tolist()
    return ids[: one.params.gen_length]


def jobs() -> list[tuple[Request, int]]:
    """Requests and forwards of each of their blocks."""
    dice, made = random.Random(3), []
    for i in range(9):
        prompt = helpers.random_prompt(i, dice.choice([1, 3, 8, 30, 61]))
        block, gen, per_block = dice.choice([1, 4, 8]), dice.choice([5, 16, 33]), 1 + i % 3
        options = {"gen_length": gen, "block_length": block, "steps_per_block": per_block}
        made.append((request(prompt, **options), per_block))
    return made


def test_against_the_plain_loop(engines: Engines) -> None:
    """Chunks of any size, few pages and other requests change nothing."""
    model = models.load(helpers.GOLDEN / NAME)
    expected = [plain_loop(model, *job) for job in jobs()]
    for options in (
        {},
        {"max_num_batched_tokens": 32, "page_size": 4},
        {"kv_pages": 12, "page_size": 8, "max_num_seqs": 6},  # one needs up to 12
        {"max_num_seqs": 3, "max_logit_rows": 3, "page_size": 1},
    ):
        found = run(engines(helpers.GOLDEN / NAME, **options), [one for one, _ in jobs()])
        assert [ids for ids, _ in found] == expected, options


VARIANTS: list[dict[str, Any]] = [
    {"temperature": 0.9},
    {"unmask": "threshold", "threshold": 0.1},
    {"cfg_scale": 0.6, "steps": 8},
    {"unmask": "klass", "kl_threshold": 0.5, "threshold": 0.05},
    {"unmask": "credit", "threshold": 0.2, "logit_bias": {3: 1.5}},
    {"unmask": "factor", "temperature": 0.7, "top_p": 0.8},
    {"cache": "dual", "full": True},
    {"temperature": 1.0, "full": True},
]


def full_attention(options: dict[str, Any]) -> SamplingParams:
    given = {name: value for name, value in options.items() if name != "full"}
    return SamplingParams(gen_length=24, block_length=8, ignore_eos=True, **given)


def test_alone_or_beside_others_when_pages_are_short(engines: Engines) -> None:
    """Noise, and what rules keep, outlive the loss of pages; full attention shares the steps."""

    def made() -> list[Request]:
        return [
            request(helpers.random_prompt(i, 20 + i), gen_length=24, block_length=4, **options)
            if not options.get("full")
            else helpers.prompt_request(
                next(NUMBERS),
                helpers.random_prompt(i, 9),
                full_attention(options),
                seed=5,
            )
            for i, options in enumerate(VARIANTS)
        ]

    path = helpers.GOLDEN / NAME
    alone = [run(engines(path), [one])[0] for one in made()]
    options = {"kv_pages": 14, "page_size": 8, "max_num_seqs": 9}
    llm = engines(path, **options)
    taken = count_taken(llm)
    assert run(llm, made()) == alone
    assert taken


def count_taken(llm: LLM) -> list[int]:
    """Fills with the numbers of requests that lose pages while they run."""
    storage, taken = llm._engine.scheduler.storage, list[int]()
    take = storage.take_pages

    def counted(one: Request) -> None:
        if one in llm._engine.scheduler.running and one.pages:
            taken.append(one.id)
        take(one)

    storage.take_pages = counted  # type: ignore[method-assign]
    return taken


# padding tokens hold whatever lay in the memory, which numpy complains about
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_padded_steps_in_flight_when_pages_are_short(
    engines: Engines, checkpoints: dict[str, Path]
) -> None:
    """On kernels: what graphs replay, four steps ahead, while pages change hands."""
    helpers.need_interpreter()

    def made() -> list[Request]:
        guided = {"cfg_scale": 0.5, "temperature": 0.8}
        options: list[dict[str, Any]] = [{}, guided, {"temperature": 0.5}]
        return [
            request(helpers.random_prompt(3, 3), gen_length=4, block_length=2, steps=3, **given)
            for given in options
        ]

    path = checkpoints["llada"]
    alone = [run(engines(path), [one])[0] for one in made()]
    llm, pool = rehearsing(
        path,
        depth=4,
        kernels="triton",
        max_model_len=32,
        max_num_seqs=4,
        page_size=2,
        kv_pages=8,
        max_logit_rows=8,
    )
    taken = count_taken(llm)
    assert run(llm, made()) == alone
    assert pool.replays > 0 and taken
