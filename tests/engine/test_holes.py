"""Canvases with holes in their middle: upstream's infilling, a plain loop, and any batch."""

import itertools
import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from dllmserve import LLM, SamplingParams, SparseConfig
from dllmserve.core.canvas import Canvas, template_canvas
from dllmserve.core.request import Request
from tests import helpers
from tests.conftest import Engines
from tests.oracles import models
from tests.oracles.llada import confidences, top
from tests.oracles.rules import split

MODELS = ("llada-kv2of4", "llada-kv4of4")
NUMBERS = itertools.count(10**6)


def request(canvas: Canvas, **given: Any) -> Request:
    sparse = given.pop("sparse", None)
    length = canvas.end - canvas.start
    base = {"temperature": 0.0, "ignore_eos": True, "gen_length": length, "sparse": sparse}
    params = SamplingParams(**{**base, **given})
    return Request(next(NUMBERS), canvas, params, seed=7)


def run(llm: LLM, requests: list[Request]) -> dict[int, tuple[list[int], int]]:
    """Whole rows, and forwards, by the requests' numbers."""
    engine, found = llm._engine, {}
    for one in requests:
        engine.add(one)
    while engine.has_work:
        for one, output in engine.step().finished:
            row = list(one.canvas.ids)
            row += [0] * (len(one.canvas) - len(row))
            assert len(output.token_ids) == one.canvas.end - one.canvas.start
            row[one.canvas.start : one.canvas.end] = output.token_ids
            found[one.id] = row, output.forward_passes
            assert output.prompt_tokens == one.canvas.given
            assert output.completion_tokens == sum(end - start for start, end in one.canvas.holes)
    helpers.check_idle(llm)
    return found


def golden(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((helpers.GOLDEN / name / "holes.json").read_text())
    return found


def of_case(case: dict[str, Any]) -> Request:
    canvas = template_canvas(
        case["tokens"], [tuple(hole) for hole in case["holes"]], case["block_size"] or 10**6
    )
    steps = case["steps_per_block"] * len(canvas.blocks)
    return request(canvas, steps=steps, cfg_scale=case["cfg_scale"])


@pytest.mark.parametrize("name", MODELS)
def test_alone(engines: Engines, name: str) -> None:
    llm = engines(helpers.GOLDEN / name)
    for case in golden(name):
        one = of_case(case)
        assert run(llm, [one])[one.id] == (case["expected"], case["forwards"]), case


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options", [{}, {"max_logit_rows": 3, "max_num_batched_tokens": 200, "max_num_seqs": 5}]
)
def test_mixed(engines: Engines, name: str, options: dict[str, int]) -> None:
    cases = random.Random(str(options)).sample(golden(name), len(golden(name)))
    requests = [of_case(case) for case in cases]
    found = run(engines(helpers.GOLDEN / name, **options), requests)
    assert [found[r.id][0] for r in requests] == [case["expected"] for case in cases]


def plain_loop(model: models.OracleModel, canvas: Canvas, per_block: int) -> list[int]:
    """LLaDA's rule on a row with holes, from its definition."""
    x = torch.tensor([[*canvas.ids, *[0] * (len(canvas) - len(canvas.ids))]])
    masked = torch.zeros_like(x, dtype=torch.bool)
    for start, end in canvas.holes:
        masked[0, start:end] = True
    x[masked] = model.mask_id
    for start, end in canvas.blocks:
        inside = torch.zeros_like(masked)
        inside[0, start:end] = True
        for count in split(int((masked & inside).sum()), per_block):
            if not count:
                continue
            z = model(x).clone()
            z[..., model.mask_id] = -torch.inf
            x0, open_ = z.argmax(dim=-1), masked & inside
            chosen = top(confidences(z, x0, open_, None, 0), torch.tensor([count]))
            x[chosen], masked[chosen] = x0[chosen], False
    ids: list[int] = x[0].tolist()
    return ids


def random_canvas(dice: random.Random) -> Canvas:
    """Given tokens anywhere: at the start, in the middle, at the end, or only a few."""
    holes, position = [], dice.randrange(9)
    for _ in range(dice.randrange(1, 5)):
        end = position + dice.randrange(1, 9)
        holes.append((position, end))
        position = end + dice.randrange(1, 9)
    length = max(position - dice.choice([0, 4]), holes[-1][1])
    ids = [dice.randrange(1, 59) for _ in range(dice.choice([length, holes[-1][0]]))]
    return template_canvas(ids, holes, dice.choice([3, 8, 16, 100]))


@pytest.mark.parametrize("name", MODELS)
def test_any_canvas_against_the_plain_loop(engines: Engines, name: str) -> None:
    dice, model = random.Random(name), models.load(helpers.GOLDEN / name)
    canvases = [random_canvas(dice) for _ in range(12)]
    assert any(c.start == 0 for c in canvases) and any(c.end < len(c) for c in canvases)
    requests, expected = [], []
    for canvas in canvases:
        per_block = dice.choice([1, 2, 3, 100])
        requests.append(request(canvas, steps=per_block * len(canvas.blocks)))
        expected.append(plain_loop(model, canvas, per_block))
    found = run(engines(helpers.GOLDEN / name), requests)
    assert [found[r.id][0] for r in requests] == expected


VARIANTS: list[dict[str, Any]] = [
    {"cache": "dual"},
    {"cache": "prefix", "temperature": 0.8},
    {"cache": "rolling", "unmask": "threshold", "threshold": 0.2},
    {"cache": "delayed", "unmask": "factor"},
    {"cache": "drift", "refresh_every": 3},
    {"unmask": "wino", "threshold": 0.1, "threshold_back": 0.3},
    {"unmask": "klass", "kl_threshold": 0.5, "threshold": 0.1},
    {"unmask": "joint", "max_edit_steps": 2, "penalty_lambda": 0.5, "cache": "prefix"},
    {"unmask": "credit", "threshold": 0.3, "logit_bias": {5: 2.0, 9: -3.0}},
    {"unmask": "hierarchy", "cfg_scale": 0.7},
    {"sparse": SparseConfig(default_block_len=4)},
    {"confidence_eos_eot_inf": True, "schedule": "dream"},
]


def test_every_cache_and_rule_alone_or_in_any_batch(engines: Engines) -> None:
    """Each fills its holes, and what it fills does not depend on others."""
    dice, path = random.Random(5), helpers.GOLDEN / MODELS[0]

    def made() -> list[Request]:
        dice.seed(5)
        return [request(random_canvas(dice), **v) for v in VARIANTS for _ in range(2)]

    llm, alone = engines(path), []
    for one in made():
        alone.append(run(llm, [one])[one.id])
        (row, _), canvas = alone[-1], one.canvas
        given = set(range(len(canvas.ids))) - {p for s, e in canvas.holes for p in range(s, e)}
        assert all(row[p] == canvas.ids[p] for p in given)
    for options in ({}, {"max_num_batched_tokens": 120, "max_num_seqs": 4, "page_size": 7}):
        together = made()
        found = run(engines(path, **options), together)
        assert [found[r.id] for r in together] == alone, options


@pytest.mark.parametrize("holes", [[(0, 1), (3, 6)], [(1, 3), (5, 7)], [(0, 5)]])
def test_a_shifted_model_fills_from_the_first_position_on(
    engines: Engines, holes: list[tuple[int, int]]
) -> None:
    """Nothing stands before it: its logits are its own, also where written tokens are scored."""
    canvas = template_canvas([7] * 9, holes, 4)
    wino = {"unmask": "wino", "threshold": 0.01, "threshold_back": 0.9}
    made = [wino, {**wino, "cache": "dual"}, {"cache": "dual"}, {"cache": "delayed"}]
    made += [{"unmask": "joint", "max_edit_steps": 2, "logit_bias": {5: 1.0}}]
    llm = engines(helpers.GOLDEN / "dream-kv2of4")
    alone = []
    for options in made:
        one = request(canvas, **options)
        alone.append(run(llm, [one])[one.id])
    together = [request(canvas, **options) for options in made]
    found = run(llm, together)
    assert [found[one.id] for one in together] == alone


def test_watched_blocks_lie_in_the_answer(engines: Engines) -> None:
    """What is given before and behind it in its blocks is not shown."""
    llm = engines(helpers.GOLDEN / MODELS[0])
    engine = llm._engine
    one = request(template_canvas([7] * 12, [(3, 5), (8, 10)], 4), steps=4)
    one.watch, seen = True, []
    engine.add(one)
    while engine.has_work:
        seen += [step for _, step in engine.step().watched]
    assert [step.block for step in seen] == [(0, 1), (1, 5), (5, 7)]
    assert all(len(step.token_ids) == len(step.committed) == 7 for step in seen)


def test_given_ends_end_nothing(engines: Engines) -> None:
    """An end id that was given is text like any other; one that is written ends the row there."""
    llm = engines(helpers.GOLDEN / MODELS[0])
    (end, *_) = llm._engine.spec.eos_ids
    canvas = template_canvas([end, 5, 0, 0, end, 0, 0, 7], [(2, 4), (5, 7)], 4)
    one = request(canvas, steps=4)
    one.params = replace(one.params, ignore_eos=False, logit_bias={end: -100.0})
    row, _ = run(llm, [one])[one.id]
    assert row[4] == end and len(row) == 8
