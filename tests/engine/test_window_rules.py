"""Every rule on block-causal and autoregressive canvases, against a loop that keeps nothing."""

import itertools
import random
from typing import Any

import pytest

from dllmserve import SamplingParams
from dllmserve.core.request import Request
from tests import helpers
from tests.conftest import Engines
from tests.engine.test_growth import run
from tests.oracles import models
from tests.oracles.block_rules import Settings
from tests.oracles.windows import by_rule
from tests.paged import paged_request

NUMBERS = itertools.count(3 * 10**6)
RULES: list[dict[str, Any]] = [
    {"unmask": "steps"},
    {"unmask": "threshold", "threshold": 0.3},
    {"unmask": "threshold_strict", "threshold": 0.2},
    {"unmask": "factor", "factor": 0.8},
    {"unmask": "factor_strict", "factor": 0.8},
    {"unmask": "entropy_bound", "entropy_bound": 1.2},
    {"unmask": "hierarchy", "threshold": 0.5, "low_threshold": 0.1},
    {"unmask": "credit", "threshold": 0.4},
    {"unmask": "klass", "threshold": 0.1, "kl_threshold": 0.3},
]
Job = tuple[Request, list[int], int]


def jobs(model: models.OracleModel, seed: int) -> list[Job]:
    """Requests with their answers and forwards."""
    dice, made = random.Random(seed), []
    for rule in RULES:
        window, part = dice.choice([(1, None), (4, None), (6, 2), (8, 4), (12, None), (16, 4)])
        steps = dice.choice([None, 1, 3]) if rule["unmask"] == "steps" else None
        prompt = helpers.random_prompt(dice.randrange(99), dice.choice([1, 3, window, 21, 48]))
        length = dice.choice([1, 9, 26])
        given = {"gen_length": length, "block_length": window, "sub_block_length": part}
        params = SamplingParams(
            temperature=0.0, ignore_eos=True, steps_per_block=steps, **given, **rule
        )
        request = paged_request(next(NUMBERS), prompt, params, shift=int(model.shifted))
        loop = by_rule(model, prompt, length, window, Settings(**rule), part=part, steps=steps)
        made.append((request, *loop))
    return made


@pytest.mark.parametrize("name", ["llada-kv2of4", "dream-kv2of4"])
def test_every_rule(engines: Engines, name: str) -> None:
    """Alone; then all at once, with few pages, and in small steps on a warm prefix cache."""
    model = models.load(helpers.GOLDEN / name)
    for request, ids, forwards in jobs(model, 1):
        found = run(engines(helpers.GOLDEN / name), [request])
        assert found == [(ids, forwards)], request.params
    for options in (
        {"kv_pages": 24, "page_size": 4},
        {"max_num_batched_tokens": 40, "page_size": 3, "max_logit_rows": 9},
    ):
        batch = jobs(model, 2)
        for _ in range(2):
            again = [
                paged_request(next(NUMBERS), list(r.canvas.ids), r.params, shift=r.canvas.shift)
                for r, _, _ in batch
            ]
            found = run(engines(helpers.GOLDEN / name, **options), again)
            assert found == [(ids, forwards) for _, ids, forwards in batch]
