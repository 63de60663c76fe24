"""Token edits against a loop that keeps nothing: block-causal and full attention, in any batch."""

import itertools
import random
from typing import Any

import pytest

from dllmserve import LLM, SamplingParams
from dllmserve.core.canvas import answer_canvas, template_canvas, window_template
from dllmserve.core.request import Request
from dllmserve.core.work import forwards_of
from dllmserve.outputs import RequestOutput
from tests import helpers
from tests.conftest import Engines
from tests.oracles import edits, models

NUMBERS = itertools.count(5 * 10**6)
ENDS = (3, 17, 40, 41, 42, 43)
Job = tuple[Request, edits.Row]


def jobs(model: models.OracleModel, seed: int, full: bool, count: int = 12) -> list[Job]:
    """Requests, and rows as they are when these are done."""
    dice = random.Random(seed)
    return [_job(model, dice, full) for _ in range(count)]


def _job(model: models.OracleModel, dice: random.Random, full: bool) -> Job:
    size, length = dice.choice([1, 4, 8, 16]), dice.choice([1, 9, 26])
    prompt = helpers.random_prompt(dice.randrange(99), dice.choice([1, 3, 8, 21, 48]))
    rule = dice.choice(["threshold_strict", "dynamic", "joint"])
    given: dict[str, Any] = {
        "threshold": dice.choice([0.1, 0.2, 0.4]),
        "edit_threshold": dice.choice([0.0, 0.1, 0.3, 1.0]),
        "max_edit_steps": dice.choice([0, 1, 3, 16]),
    }
    least, more = 1, dict[str, Any]()
    if rule == "joint":
        more["penalty_lambda"] = dice.choice([0.0, 1.5])
    else:
        more["min_tokens_per_step"] = least = dice.choice([1, 2, 5])
    ends = dice.random() < 0.4
    params = SamplingParams(
        temperature=0.0,
        gen_length=length,
        block_length=size,
        unmask=rule,
        ignore_eos=True,
        stop_token_ids=ENDS if ends else None,
        logprobs=dice.choice([None, 2]),
        steps_per_block=dice.choice([None, 2]) if rule == "dynamic" and not full else None,
        cache=dice.choice(["none", "prefix", "dual"]) if full else "none",
        **given,
        **more,
    )
    template = dice.random() < 0.3 and not ends
    ids, holes = list(prompt), [(len(prompt), len(prompt) + length)]
    if template and length > 3:  # a given token among those to fill
        place = len(prompt) + length // 2
        holes = [(len(prompt), place), (place + 1, len(prompt) + length)]
        ids += [0] * (place - len(prompt)) + [9]
    if full:
        canvas = template_canvas(ids, holes, size) if template else answer_canvas(ids, length, size)
    else:
        canvas = window_template(ids, holes, size, 0)
    request = Request(next(NUMBERS), canvas, params, 7)
    masked = [any(low <= p < high for low, high in canvas.holes) for p in range(len(canvas))]
    whole = ids + [0] * (len(canvas) - len(ids))
    row = edits.Row(model, whole, masked, 0 if full else size, params.cache)
    settings = edits.Settings(
        given["threshold"],
        given["edit_threshold"],
        given["max_edit_steps"],
        least,
        more.get("penalty_lambda", 0.0),
        request.quotas,
    )
    row.decode([range(*block) for block in canvas.blocks], settings, ENDS if ends else ())
    return request, row


def run(llm: LLM, requests: list[Request]) -> list[RequestOutput]:
    """Outputs; what was streamed never changes."""
    engine, found, sent = llm._engine, dict[int, RequestOutput](), dict[int, list[int]]()
    for one in requests:
        one.stream = True
        engine.add(one)
    while engine.has_work:
        events = engine.step()
        for one, ids, _ in events.streamed:
            sent.setdefault(one.id, []).extend(ids)
        for one, output in events.finished:
            found[one.id] = output
        engine.scheduler.check_integrity()
    helpers.check_idle(llm)
    for one in requests:
        already = sent.get(one.id, [])
        assert found[one.id].token_ids[: len(already)] == already
    return [found[one.id] for one in requests]


def check(job: Job, output: RequestOutput) -> None:
    request, row = job
    start, params = request.canvas.start, request.params
    count = len(output.token_ids)
    ids = row.ids[start : start + request.canvas.answer_len]
    if params.stop_token_ids:
        ends = [i for i, token in enumerate(ids) if token in ENDS and row.steps[start + i]]
        ids = ids[: ends[0] + 1] if ends else ids
    assert output.token_ids == ids, params
    assert output.steps == row.steps[start : start + count]
    assert (output.forward_passes, output.edits) == (row.forwards, row.edits)
    assert output.forward_passes <= forwards_of(request)
    if output.logprobs is not None:
        for one, place in zip(output.logprobs, range(start, start + count), strict=True):
            if row.steps[place]:
                assert one["logprob"] == pytest.approx(row.logprobs[place], abs=1e-4)


@pytest.mark.parametrize(("name", "full"), [("llada-kv2of4", False), ("llada-kv2of4", True)])
def test_against_the_plain_loop(engines: Engines, name: str, full: bool) -> None:
    """Alone; then all at once, with few pages, and in small steps."""
    model = models.load(helpers.GOLDEN / name)
    for job in jobs(model, 1, full):
        check(job, run(engines(helpers.GOLDEN / name), [job[0]])[0])
    options: list[dict[str, Any]] = [
        {"kv_pages": 40, "page_size": 4},
        {"max_num_batched_tokens": 80, "page_size": 3, "max_logit_rows": 9},
    ]
    for option in options:
        batch = jobs(model, 2, full)
        for job, output in zip(
            batch, run(engines(helpers.GOLDEN / name, **option), [r for r, _ in batch]), strict=True
        ):
            check(job, output)
