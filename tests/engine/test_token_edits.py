"""Token edits against a loop that keeps nothing: block-causal and full attention, in any batch."""

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dllmserve import LLM, SamplingParams
from dllmserve.core.canvas import answer_canvas, template_canvas, window_template
from dllmserve.core.request import Request
from dllmserve.core.work import forwards_of
from dllmserve.models.loader import find_model
from dllmserve.outputs import RequestOutput
from dllmserve.server.native import _changes
from tests import helpers
from tests.conftest import Engines
from tests.oracles import edits, models
from tests.parallel.threads import threaded_llm

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
        sub_block_length=dice.choice([None, None, 2]) if size > 2 and not full else None,
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
        canvas = window_template(ids, holes, size, 0, params.sub_block_length)
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
    asked = canvas.start + canvas.answer_len
    blocks = [range(*block) for block in canvas.blocks if block[0] < asked]
    row.decode(blocks, settings, ENDS if ends else ())
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
        {"kv_pages": 24, "page_size": 4},
        {"max_num_batched_tokens": 80, "page_size": 3, "max_logit_rows": 9},
    ]
    for option in options:
        batch = jobs(model, 2, full)
        for job, output in zip(
            batch, run(engines(helpers.GOLDEN / name, **option), [r for r, _ in batch]), strict=True
        ):
            check(job, output)


def drawn(
    cfg_scale: float = 0.0, length: int = 8, most: int = 8
) -> list[tuple[list[int], SamplingParams]]:
    """Requests of every kind that edit, some of which draw their tokens, beside one that does not.

    Args:
        cfg_scale: of one of them.
        length: of each answer.
        most: steps of a block for edits alone.
    """
    base: dict[str, Any] = {"gen_length": length, "block_length": 4, "ignore_eos": True}
    base |= {"max_edit_steps": most}
    variants: list[dict[str, Any]] = [
        {"unmask": "joint", "temperature": 0.0, "penalty_lambda": 1.0, "logprobs": 2},
        {"unmask": "joint", "temperature": 0.7, "seed": 3},
        {"unmask": "dynamic", "temperature": 0.0, "edit_threshold": 0.0, "logit_bias": {8: 3.0}},
        {
            "unmask": "threshold_strict",
            "temperature": 1.0,
            "top_p": 0.9,
            "seed": 4,
            "edit_threshold": 0.05,
            "max_edit_steps": 3,
            "min_tokens_per_step": 3,
        },
        {"unmask": "factor", "temperature": 0.0, "max_edit_steps": 16},
    ]
    variants[2]["cfg_scale"] = cfg_scale
    prompts = [helpers.random_prompt(i, 3 + 2 * i) for i in range(len(variants))]
    return [(p, SamplingParams(**{**base, **v})) for p, v in zip(prompts, variants, strict=True)]


def same(llm: LLM, batch: list[tuple[list[int], SamplingParams]], expected: list[Any]) -> None:
    """The batch at once gives what each request gave alone."""
    found = llm.generate([p for p, _ in batch], [s for _, s in batch], use_tqdm=False)
    helpers.check_idle(llm)
    for one, other in zip(found, expected, strict=True):
        pairs = zip(one.pop("logprobs", ()), other.get("logprobs", ()), strict=True)
        assert all(a["logprob"] == pytest.approx(b["logprob"], abs=1e-4) for a, b in pairs)
        assert one == {key: value for key, value in other.items() if key != "logprobs"}


def alone(llm: LLM, batch: list[tuple[list[int], SamplingParams]]) -> list[Any]:
    return [llm.generate([p], s, use_tqdm=False)[0] for p, s in batch]


@pytest.mark.parametrize("name", ["llada2-g4e8", "llada-kv2of4"])
def test_alone_together_and_on_two_ranks(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What is drawn, too, depends on nothing else."""
    folder = helpers.GOLDEN / name
    batch = drawn(cfg_scale=float(name == "llada-kv2of4"))
    expected = alone(engines(folder), batch)
    assert sum(output["usage"]["edits"] > 0 for output in expected) >= 3
    same(engines(folder), batch, expected)
    two, _, _ = threaded_llm(monkeypatch, str(folder), 2, kv_pages=40, page_size=8)
    same(two, batch, expected)


def test_on_triton_kernels(engines: Engines, checkpoints: dict[str, Path]) -> None:
    """Under the interpreter on a CPU."""
    helpers.need_interpreter()
    folder, batch = checkpoints["llada-odd"], drawn(cfg_scale=1.0, length=4, most=1)
    triton = LLM(str(folder), device="cpu", kernels="triton")
    expected = alone(engines(folder), batch)
    assert sum(output["usage"]["edits"] > 0 for output in expected) >= 3
    same(triton, batch, expected)


def test_what_a_watcher_sees(engines: Engines) -> None:
    """Tokens that are replaced are marked; the history has them with their probabilities."""
    llm = engines(helpers.GOLDEN / "llada2-g4e8")
    params = SamplingParams(temperature=0.0, gen_length=8, block_length=8, unmask="joint")
    before: list[int | None] = []
    seen = 0
    for step in llm.stream([1, 2, 3], params):
        for place in step.edited:
            assert step.committed[place] and step.token_ids[place] != before[place]
            assert step.confidence[place] is not None
        told = _changes(None, step, str)["changed"]
        assert [c["position"] for c in told if c.get("edited")] == step.edited
        kept = set(range(len(before))) - set(step.edited)
        assert all(step.token_ids[p] == before[p] for p in kept if before[p] is not None)
        pairs = zip(step.token_ids, step.committed, strict=True)
        before = [token if written else None for token, written in pairs]
        seen += len(step.edited)
    assert step.output is not None and seen > 0
    [output] = llm.generate([[1, 2, 3]], params, use_tqdm=False, history=True)
    assert output["token_ids"] == step.output.token_ids
    counts = [len(forward["written"]) for forward in output["history"]]
    assert sum(counts) == 8 + seen


def test_what_is_stored_is_final(engines: Engines) -> None:
    """A request that goes on from an edited answer finds its K,V, which are those of its tokens."""
    folder = helpers.GOLDEN / "llada2-g4e8"
    given: dict[str, Any] = {"block_length": 8, "threshold": 0.5, "edit_threshold": 0.3}
    params = SamplingParams(
        temperature=0.0, gen_length=24, unmask="joint", max_edit_steps=4, ignore_eos=True, **given
    )
    llm, cold = engines(folder, page_size=4), engines(folder, page_size=4, prefix_caching=False)
    first = llm.generate([helpers.random_prompt(3, 19)], params, use_tqdm=False)[0]
    assert first["usage"]["edits"] > 0
    prompt = [*helpers.random_prompt(3, 19), *first["token_ids"], 5, 6]
    warm, other = (e.generate([prompt], params, use_tqdm=False)[0] for e in (llm, cold))
    assert warm["usage"]["cached_tokens"] == 40
    assert (warm["token_ids"], warm["steps"]) == (other["token_ids"], other["steps"])


def test_a_stop_string_is_looked_for_in_final_text(engines: Engines) -> None:
    llm, dice, edits = engines(find_model("tiny")), random.Random(1), 0
    for number in range(5):
        params = SamplingParams(
            temperature=0.0,
            gen_length=32,
            block_length=dice.choice([4, 8, 16]),
            unmask="joint",
            threshold=dice.choice([0.1, 0.3]),
            max_edit_steps=dice.choice([0, 1, 3]),
            ignore_eos=True,
        )
        prompt = [f"Tell me {number} things"]
        text = llm.generate(prompt, params, use_tqdm=False)[0]["text"]
        place = dice.randrange(len(text) - 3)
        stop = text[place : place + 3]
        output = llm.generate(prompt, replace(params, stop=stop), use_tqdm=False)[0]
        assert (output["text"], output["finish_reason"]) == (text[: text.index(stop)], "stop")
        edits += output["usage"]["edits"]
    assert edits > 0
