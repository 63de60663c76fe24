"""LLM.infill: upstream's outputs, every rule and cache against plain loops, and any batch."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dllmserve import LLM, Hole, SamplingParams
from dllmserve.core.plan import StepPlan
from tests import helpers
from tests.checkpoints import write_random
from tests.conftest import SHAPES, Engines
from tests.engine.test_fewer_forwards import POLICIES, RULES
from tests.infilling import Range, joined, random_row, template, truths
from tests.oracles import infill, models
from tests.oracles.block_rules import Settings
from tests.oracles.spans import Policy

MODELS = ("llada-kv2of4", "llada-kv4of4")
Given = dict[str, Any]


def run(llm: LLM, templates: list[list[Any]], params: list[SamplingParams]) -> list[Any]:
    """Rows and forwards."""
    found = llm.infill(templates, params, use_tqdm=False)
    helpers.check_idle(llm)
    assert all(map(joined, found, templates))
    return [(one["token_ids"], one["usage"]["forward_passes"]) for one in found]


@pytest.mark.parametrize("schedule", ["mdlm", "uniform"])
@pytest.mark.parametrize("name", MODELS)
def test_upstream(engines: Engines, name: str, schedule: str) -> None:
    """Alone, and all in one batch; by the forwards of a window, and by those of the row."""
    llm, cases = engines(helpers.GOLDEN / name), truths(name)
    templates, params, expected = [], [], []
    for case in cases:
        given = case["params"]
        how = {
            "temperature": 0.0,
            "block_length": given["block_size"],
            "cfg_scale": given["cfg_scale"],
            "schedule": schedule,
        }
        truth = case if schedule == "mdlm" else case["llada_split"]
        for steps in ({"steps": given["steps"]}, {"steps_per_block": case["steps_per_block"]}):
            templates.append(template(case["tokens"], case["holes"]))
            params.append(SamplingParams(**how, **steps))
            expected.append((truth["expected"], truth["forwards"]))
    assert run(llm, templates, params) == expected
    for index in range(0, len(templates), 2):
        assert run(llm, templates[index : index + 1], params[index : index + 1]) == [
            expected[index]
        ], cases[index // 2]["id"]


@pytest.mark.parametrize("name", MODELS)
def test_upstreams_steps_and_log_probabilities(engines: Engines, name: str) -> None:
    """Of every position in a hole; given ones have none."""
    cases = truths(name)
    params = [
        SamplingParams(
            temperature=0.0,
            block_length=case["params"]["block_size"],
            steps=case["params"]["steps"],
            cfg_scale=case["params"]["cfg_scale"],
            schedule="mdlm",
            logprobs=place % 3,
        )
        for place, case in enumerate(cases)
    ]
    templates = [template(case["tokens"], case["holes"]) for case in cases]
    found = engines(helpers.GOLDEN / name).infill(templates, params, use_tqdm=False)
    for place, (case, one) in enumerate(zip(cases, found, strict=True)):
        steps = [step for hole in one["holes"] for step in hole["steps"]]
        assert steps == case["step_map"]
        told = [entry for hole in one["holes"] for entry in hole["logprobs"]]
        assert [t["logprob"] for t in told] == pytest.approx(case["logprobs"], abs=1e-3)
        assert all(len(t["top"]) == place % 3 for t in told)
        assert [t["token_id"] for t in one["logprobs"]] == one["token_ids"]
        open_ = {p for low, high in case["holes"] for p in range(low, high)}
        inside = [p in open_ for p in range(len(case["tokens"]))]
        assert [s for s, i in zip(one["steps"], inside, strict=True) if i] == steps
        assert {s for s, i in zip(one["steps"], inside, strict=True) if not i} <= {0}
        assert [t["logprob"] is not None for t in one["logprobs"]] == inside


@pytest.mark.parametrize("name", [*MODELS, "dream-kv2of4"])
def test_the_definition(engines: Engines, name: str) -> None:
    """Both schedules, guidance, and logits that are shifted."""
    dice, model = random.Random(name), models.load(helpers.GOLDEN / name)
    templates, params, expected = [], [], []
    for place in range(14):
        row, holes = random_row(dice)
        given: Given = {
            "block_length": dice.choice([None, 5, 8, 16]),
            "steps_per_block": dice.choice([1, 2, 3, 7, 100]),
            "schedule": ("mdlm", "uniform")[place % 2],
            "cfg_scale": dice.choice([0.0, 0.0, 0.8]),
        }
        templates.append(template(row, holes))
        params.append(SamplingParams(temperature=0.0, **given))
        expected.append(infill.fill(model, row, holes, **given)[:2])
    assert run(engines(helpers.GOLDEN / name), templates, params) == expected


@cache
def oracle(folder: Path) -> models.OracleModel:
    return models.load(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("infill")
    return {name: write_random(base / name, SHAPES[name]) for name in ("llada", "dream-odd")}


def variants() -> list[tuple[str, str]]:
    """Every rule with some caches, and every cache with some rules."""
    named = [name for name in POLICIES if "suffix_window" not in POLICIES[name]]
    few = ("none", "dual-often", "delayed-often", "drift-often")
    return [
        (rule, policy)
        for rule in RULES
        for policy in named
        if (rule in ("steps", "hierarchy") or policy in few)
        and (rule != "wino" or POLICIES[policy].get("cache", "none") in ("none", "dual"))
    ]


def of_oracle(
    model: models.OracleModel, row: list[int], holes: list[Range], rule: str, policy: str
) -> tuple[list[int], int, int]:
    """Row, forwards, and tokens that they compute."""
    given, caching = dict(RULES[rule]), dict(POLICIES[policy])
    given.pop("steps", None)
    names = {"refresh_delay": "delay", "refresh_every": "every", "refresh_window": "window"}
    names["refresh_share"] = "share"
    kind = caching.pop("cache", "none")
    how = {names[name]: value for name, value in caching.items()}
    result = infill.by_policy(
        model,
        row,
        holes,
        block_length=8,
        steps_per_block=3,
        settings=Settings(rule, **given),
        policy=Policy(kind, shift=int(model.shifted), **how),
    )
    return [*row[: holes[0][0]], *result.tokens], result.forwards, result.computed


def sampling(rule: str, policy: str) -> SamplingParams:
    given = {**RULES[rule], **POLICIES[policy]}
    if rule == "steps":
        given = {**given, "steps_per_block": 3}
        del given["steps"]
    return SamplingParams(temperature=0.0, unmask=rule, block_length=8, **given)


@pytest.mark.parametrize("name", ["llada", "dream-odd"])
def test_every_rule_and_cache(engines: Engines, folders: dict[str, Path], name: str) -> None:
    """Each alone, with the tokens that it computes, and all in batches of some sizes."""
    dice, llm, model = random.Random(name), engines(folders[name]), oracle(folders[name])
    templates, params, expected = [], [], []
    for rule, policy in variants():
        row, holes = random_row(dice)
        templates.append(template(row, holes))
        params.append(sampling(rule, policy))
        *truth, tokens = of_oracle(model, row, holes, rule, policy)
        expected.append(tuple(truth))
        plans = list[StepPlan]()
        with llm.observe(plans.append):
            assert run(llm, templates[-1:], params[-1:]) == expected[-1:], (rule, policy)
        # of a shifted model a row's first position needs no blind query of its own
        if not (rule == "wino" and model.shifted):
            assert sum(plan.tokens for plan in plans) == tokens, (rule, policy)
    for options in ({}, {"max_num_batched_tokens": 120, "max_num_seqs": 4, "page_size": 7}):
        llm = engines(folders[name], **options)
        assert run(llm, templates, params) == expected, options


def test_mixed_with_answers(engines: Engines, folders: dict[str, Path]) -> None:
    """Requests with and without holes in one step change nothing of each other."""
    dice, llm = random.Random(3), engines(folders["llada"])
    rows = [random_row(dice) for _ in range(6)]
    gaps = [SamplingParams(seed=place, temperature=0.7, block_length=6) for place in range(6)]
    whole = [SamplingParams(seed=place, gen_length=11, ignore_eos=True) for place in range(6)]
    prompts = [helpers.random_prompt(place, 3 + place) for place in range(6)]
    templates = [template(*row) for row in rows]
    alone = [run(llm, [t], [p])[0] for t, p in zip(templates, gaps, strict=True)]
    answers = helpers.answers(llm, list(zip(prompts, whole, strict=True)))
    core = llm._engine
    requests = []
    for place in range(6):
        row, holes = rows[place]
        found = tuple((low, Hole(high - low)) for low, high in holes)
        requests.append(core.make_request(row, gaps[place], holes=found))
        requests.append(core.make_request(prompts[place], whole[place]))
    ended = dict[int, Any]()
    for one in requests:
        core.add(one)
    while core.has_work:
        ended |= {request.id: output for request, output in core.step().finished}
    outputs = [ended[one.id] for one in requests]
    assert [(o.token_ids, o.forward_passes) for o in outputs[::2]] == alone
    assert [o.token_ids for o in outputs[1::2]] == answers


def test_holes_that_may_end(engines: Engines, checkpoints: dict[str, Path]) -> None:
    """They are cut at their first end id; what was written behind it stays in the row."""
    llm, dice = engines(checkpoints["llada-eos"]), random.Random(11)
    ends, early = set(SHAPES["llada-eos"].eos_ids), 0
    for _ in range(20):
        row, holes = random_row(dice, 9)
        params = SamplingParams(temperature=0.0, block_length=dice.choice([None, 6]))
        (whole,) = llm.infill([template(row, holes)], params, use_tqdm=False)
        pieces = template(row, holes, fill="up_to")
        (cut,) = llm.infill([pieces], params, use_tqdm=False)
        helpers.check_idle(llm)
        assert joined(cut, pieces)
        lasts = []
        for one, short in zip(whole["holes"], cut["holes"], strict=True):
            ids = one["token_ids"]
            stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
            assert short["token_ids"] == ids[:stop]
            lasts.append(ids[stop - 1] in ends)
        assert cut["finish_reason"] == ("stop" if all(lasts) else "length")
        assert whole["finish_reason"] == "length"
        assert cut["usage"]["completion_tokens"] == sum(len(h["token_ids"]) for h in cut["holes"])
        early += cut["usage"]["forward_passes"] < whole["usage"]["forward_passes"]
    assert early  # the last hole's end ends the request


def test_an_end_in_an_exact_hole_is_a_token(engines: Engines, checkpoints: dict[str, Path]) -> None:
    """It ends nothing, in the row's last hole or before it, also where early_end is on."""
    llm, (end, *_) = engines(checkpoints["llada-eos"]), SHAPES["llada-eos"].eos_ids
    pieces = [[3, 4], Hole(3), [5], Hole(3, fill="up_to"), [7]]
    for extra in ({}, {"early_end": True}, {"quality": "balanced"}):
        params = SamplingParams(temperature=0.0, logit_bias={end: 100.0}, **extra)
        (found,) = llm.infill([pieces], params, use_tqdm=False)
        assert [hole["token_ids"] for hole in found["holes"]] == [[end] * 3, [end]]
        assert found["token_ids"] == [3, 4, end, end, end, 5, end, 7]
        pieces_exact = [[3, 4], Hole(3), [5], Hole(3), [7]]
        (found,) = llm.infill([pieces_exact], params, use_tqdm=False)
        assert [hole["token_ids"] for hole in found["holes"]] == [[end] * 3, [end] * 3]


def test_holes_that_touch_are_filled_as_one(engines: Engines) -> None:
    llm, row = engines(helpers.GOLDEN / MODELS[0]), helpers.random_prompt(1, 20)
    params = SamplingParams(temperature=0.0, block_length=6)
    one, two = llm.infill(
        [
            [row, Hole(7), [8]],
            [row, Hole(3, name="a"), [], Hole(4, name="b"), [8]],
        ],
        params,
        use_tqdm=False,
    )
    assert one["token_ids"] == two["token_ids"]
    assert [(hole["name"], len(hole["token_ids"])) for hole in two["holes"]] == [("a", 3), ("b", 4)]


def test_names_and_numbers(engines: Engines) -> None:
    llm = engines(helpers.GOLDEN / MODELS[0])
    params = SamplingParams(temperature=0.0, gen_length=5)
    (found,) = llm.infill([[[1, 2], Hole(2, name="x"), [3], Hole(3)]], params, use_tqdm=False)
    assert [hole["name"] for hole in found["holes"]] == ["x", None]
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 5)
    assert llm.infill([], params, use_tqdm=False) == []


@pytest.mark.parametrize("name", ["sdar-kv2of4", "fdv2-kv2of4", "qwen3-kv2of4"])
def test_a_hole_at_the_end_is_an_answer(engines: Engines, name: str) -> None:
    """Of models that do not see what stands behind."""
    llm = engines(helpers.GOLDEN / name)
    for length in (1, 6, 13):
        prompt = helpers.random_prompt(length, 5 + length)
        given = {"temperature": 0.0, "gen_length": length}
        for fill, ends in (("exact", False), ("up_to", True)):
            params = SamplingParams(**given, ignore_eos=not ends)
            (answer,) = llm.generate([prompt], params, use_tqdm=False)
            how = SamplingParams(**given)
            (found,) = llm.infill([[prompt, Hole(length, fill=fill)]], how, use_tqdm=False)
            (hole,) = found["holes"]
            assert hole["token_ids"] == answer["token_ids"]
            assert found["usage"] == answer["usage"]
            assert found["finish_reason"] == answer["finish_reason"]
