"""Holes of models that do not see all of the row: block-causal and autoregressive ones."""

import itertools
import random
from typing import Any

import pytest

from dllmserve import Hole, SamplingParams
from dllmserve.core.canvas import Canvas, window_template
from dllmserve.core.request import Request
from dllmserve.errors import PromptError
from tests import helpers
from tests.conftest import Engines
from tests.engine.test_growth import run
from tests.engine.test_window_rules import RULES
from tests.oracles import models
from tests.oracles.block_rules import Settings
from tests.oracles.windows import fill

NUMBERS = itertools.count(7 * 10**6)


def random_canvas(dice: random.Random, window: int, part: int | None, shift: int) -> Canvas:
    """Holes with given tokens behind them in their windows, the last one at the end or not."""
    start = dice.randrange(3 * window)
    first, holes = start + 1, list[tuple[int, int]]()
    border = start // window * window + window
    while first <= border and len(holes) < 3:
        end = dice.randrange(first, border + 1)
        holes.append((start, end))
        start = min(end + dice.randrange(1, 3), border)
        first = start + 1
    length = border - dice.randrange(border - holes[-1][1] + 1)
    if length < border or dice.random() < 0.5:
        ids = [dice.randrange(1, 59) for _ in range(length)]
    else:  # a last hole from this window into later ones
        holes.append((border, border + dice.randrange(1, 2 * window)))
        ids = [dice.randrange(1, 59) for _ in range(holes[-1][1])]
        if holes[-2][1] == border:
            holes[-2:] = [(holes[-2][0], holes[-1][1])]
    return window_template(ids, holes, window, shift, part)


@pytest.mark.parametrize("name", ["llada-kv2of4", "dream-kv2of4"])
def test_holes_in_windows(engines: Engines, name: str) -> None:
    """By every rule, against a loop that keeps nothing; alone, and all at once on a warm cache."""
    model, dice = models.load(helpers.GOLDEN / name), random.Random(name)
    jobs, expected = list[tuple[Canvas, SamplingParams]](), []
    for rule in (*RULES, *RULES):
        window, part = dice.choice([(4, None), (6, 2), (8, 4), (12, None), (5, None)])
        steps = dice.choice([None, 1, 3]) if rule["unmask"] == "steps" else None
        canvas = random_canvas(dice, window, part, int(model.shifted))
        given: dict[str, Any] = {"block_length": window, "sub_block_length": part}
        params = SamplingParams(
            temperature=0.0, ignore_eos=True, steps_per_block=steps, **given, **rule
        )
        jobs.append((canvas, params))
        ids = [*canvas.ids, *[0] * (len(canvas) - len(canvas.ids))]
        masked = [any(low <= p < high for low, high in canvas.holes) for p in range(len(ids))]
        ids = [model.mask_id if m else token for m, token in zip(masked, ids, strict=True)]
        asked = canvas.start + canvas.answer_len
        forwards = fill(model, ids, masked, asked, window, Settings(**rule), part=part, steps=steps)
        expected.append((ids[canvas.start : asked], forwards))
    for job, found in zip(jobs, expected, strict=True):
        one = Request(next(NUMBERS), *job, seed=0)
        assert run(engines(helpers.GOLDEN / name), [one]) == [found], job
    for options in ({"kv_pages": 40, "page_size": 4}, {"max_num_batched_tokens": 60}):
        for _ in range(2):
            again = [Request(next(NUMBERS), *job, seed=0) for job in jobs]
            assert run(engines(helpers.GOLDEN / name, **options), again) == expected


def test_what_a_hole_sees_nothing_of_is_refused(engines: Engines) -> None:
    """Tokens behind its beginning's block, and where logits are shifted, its own block's, too."""
    params = SamplingParams(temperature=0.0)
    llm = engines(helpers.GOLDEN / "sdar-kv2of4")  # blocks of 4
    good: list[list[Any]] = [
        [[1] * 5, Hole(2), [8]],
        [[1] * 4, Hole(2), [8], Hole(7)],
        [Hole(1), [2, 3]],
        [Hole(1), [2], Hole(1), [3], Hole(9)],
    ]
    for pieces in good:
        (found,) = llm.infill([pieces], params, use_tqdm=False)
        lengths = [piece.length for piece in pieces if isinstance(piece, Hole)]
        assert [len(hole["token_ids"]) for hole in found["holes"]] == lengths
    why = r"a hole from position 5 on and a token behind it at position 8: .* positions before 8 \("
    for pieces in ([[1] * 5, Hole(2), [8, 9]], [[1] * 5, Hole(2), [7], Hole(4), [8]]):
        with pytest.raises(PromptError, match=r"templates\[0\] has a hole from position 5"):
            llm.infill([pieces], params, use_tqdm=False)
    with pytest.raises(PromptError, match=why):
        llm.infill([[[1] * 5, Hole(2), [8, 9]]], params, use_tqdm=False)
    shifted = engines(helpers.GOLDEN / "fdv2-kv2of4")
    assert shifted.infill([[[1] * 33, Hole(2), [8]]], params, use_tqdm=False)
    with pytest.raises(PromptError, match="positions before 32"):
        shifted.infill([[[1] * 32, Hole(2), [8]]], params, use_tqdm=False)


def test_autoregressive_models_only_go_on(engines: Engines) -> None:
    llm = engines(helpers.GOLDEN / "qwen3-kv2of4")
    with pytest.raises(PromptError, match="an autoregressive model does not see what stands"):
        llm.infill([[[1, 2], Hole(2), [3]]], use_tqdm=False)
    with pytest.raises(PromptError, match="needs a token before the hole"):
        llm.infill([[Hole(2)]], use_tqdm=False)
