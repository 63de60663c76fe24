"""Step maps, log-probabilities and candidates, against what the naive models say."""

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dllmserve import LLM, SamplingParams, SparseConfig
from dllmserve.core.canvas import Canvas, template_canvas
from dllmserve.core.request import Request
from dllmserve.errors import InvalidParameterError
from dllmserve.outputs import RequestOutput
from tests import helpers
from tests.conftest import Engines
from tests.oracles import models
from tests.parallel.threads import threaded_llm
from tests.rehearsal import rehearsing

TOLERANCE = 1e-4
NUMBERS = itertools.count(10**6)


def logits_at(model: models.OracleModel, x: Tensor, given: Tensor, scale: float) -> Tensor:
    """Logits [L, V] float64 of a canvas [L], guided away from one without the given tokens."""
    z = model(x[None]).double()
    if scale > 0:
        other = model(torch.where(given, model.mask_id, x)[None]).double()
        z = other + (scale + 1) * (z - other)
    return (models.shift(z) if model.shifted else z)[0]


def replayed(
    model: models.OracleModel, canvas: Canvas, output: RequestOutput, scale: float = 0.0
) -> list[list[tuple[int, float]]]:
    """What is likeliest at each position of the answer, by the forward that wrote it.

    A whole forward for each step of the map, over the canvas as it was.
    """
    length = len(canvas)
    x = torch.full((length,), model.mask_id)
    given = torch.ones(length, dtype=torch.bool)
    for low, high in canvas.holes:
        given[low:high] = False
    ids = torch.tensor([*canvas.ids, *[0] * (length - len(canvas.ids))])
    x[given] = ids[given]
    found: dict[int, list[tuple[int, float]]] = {}
    for forward in range(1, max(output.steps) + 1):
        logs = logits_at(model, x, given, scale).log_softmax(dim=-1)
        here = [i for i, step in enumerate(output.steps) if step == forward]
        for place in here:
            row = logs[canvas.start + place].tolist()
            found[place] = sorted(enumerate(row), key=lambda pair: (-pair[1], pair[0]))
        for place in here:
            x[canvas.start + place] = output.token_ids[place]
    return [found.get(place, []) for place in range(len(output.token_ids))]


def check_logprobs(
    expected: list[list[tuple[int, float]]], output: RequestOutput, likely: int
) -> None:
    assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
    for ranked, token, entry in zip(expected, output.token_ids, output.logprobs, strict=True):
        assert entry["token_id"] == token
        if not ranked:  # given
            assert entry["logprob"] is None and entry["top"] == []
            continue
        assert entry["logprob"] == pytest.approx(dict(ranked)[token], abs=TOLERANCE)
        assert len(entry["top"]) == likely
        values = [value for _, value in entry["top"]]
        assert values == pytest.approx([value for _, value in ranked[:likely]], abs=TOLERANCE)
        assert values == sorted(values, reverse=True)
        for id, value in entry["top"]:
            assert value == pytest.approx(dict(ranked)[int(id)], abs=TOLERANCE)


def run(llm: LLM, requests: list[Request]) -> list[RequestOutput]:
    """Outputs, in the order of the requests."""
    engine, found = llm._engine, dict[Request, RequestOutput]()
    for one in requests:
        engine.add(one)
    while engine.has_work:
        found.update(engine.step().finished)
    helpers.check_idle(llm)
    return [found[one] for one in requests]


def prompts_and_params(seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Whole-canvas forwards of every kind: what the logits go through is not in log-probabilities.

    Log-probabilities are asked for by most, with different numbers.
    """
    variants: list[dict[str, Any]] = [
        {"temperature": 0.0, "steps": 3},
        {"temperature": 1.0, "steps": 12},
        {"temperature": 0.8, "top_p": 0.7, "top_k": 9, "steps": 5},
        {"temperature": 0.0, "logit_bias": {7: 4.0, 9: -100.0}, "steps": 4},
        {"temperature": 0.6, "cfg_scale": 0.7, "steps": 5},
        {"temperature": 0.0, "unmask": "threshold", "threshold": 0.05},
        {"temperature": 0.0, "unmask": "entropy_bound", "entropy_bound": 2.0},
        {"temperature": 0.9, "unmask": "factor", "factor": 1.5},
        {"temperature": 0.0, "remasking": "random", "steps": 4},
        {"temperature": 0.0, "unmask": "credit", "threshold": 0.1},
        {"temperature": 0.0, "unmask": "klass", "threshold": 0.05},
    ]
    made = []
    for number, variant in enumerate(variants):
        asked = (3, 0, 20, 5, 1, None, 7)[number % 7]
        base = {"gen_length": 12, "block_length": 6, "ignore_eos": True, "seed": number}
        params = SamplingParams(**base | variant, logprobs=asked)
        made.append((helpers.random_prompt(seed + number, 3 + number), params))
    return made


@pytest.mark.parametrize("name", ["llada", "dream", "llada-odd"])
@pytest.mark.parametrize(
    "options", [{}, {"max_logit_rows": 3, "max_num_batched_tokens": 60, "max_num_seqs": 5}]
)
def test_against_whole_forwards(
    engines: Engines, checkpoints: dict[str, Path], name: str, options: dict[str, int]
) -> None:
    """Of every decoding that computes whole canvases, mixed in a batch, with and without."""
    llm, model = engines(checkpoints[name], **options), models.load(checkpoints[name])
    batch = prompts_and_params(0)
    requests = [llm._engine.make_request(*one) for one in batch]
    outputs = run(llm, requests)
    plain = [replace(params, logprobs=None) for _, params in batch]
    alone = llm.generate([prompt for prompt, _ in batch], plain, use_tqdm=False)
    for request, output, without in zip(requests, outputs, alone, strict=True):
        assert output.token_ids == without["token_ids"] and output.steps == without["steps"]
        assert "logprobs" not in without
        assert max(output.steps) == output.forward_passes and min(output.steps) == 1
        likely = request.params.logprobs
        assert (output.logprobs is None) == (likely is None)
        if likely is not None:
            expected = replayed(model, request.canvas, output, request.params.cfg_scale)
            check_logprobs(expected, output, likely)


def watched(llm: LLM, prompt: list[int], *given: Any) -> tuple[list[int], list[float | None]]:
    """Step map and confidences of an answer, as whoever watches it sees them."""
    steps, confidence = dict[int, int](), dict[int, float | None]()
    before: list[bool] = []
    for canvas in llm.stream(prompt, *given):
        before = before or [False] * len(canvas.committed)
        for place, done in enumerate(canvas.committed):
            if done and not before[place]:
                steps[place], confidence[place] = canvas.forward_passes, canvas.confidence[place]
        before = canvas.committed
    places = range(len(before))
    return [steps.get(p, 0) for p in places], [confidence.get(p) for p in places]


#: masks positions again
DOUBTING = {"unmask": "wino", "threshold": 0.01, "threshold_back": 0.9, "block_length": 12}
KEPT: list[tuple[dict[str, Any], SparseConfig | None]] = [
    ({"cache": "dual", "steps": 4}, None),
    ({"cache": "prefix", "unmask": "threshold", "threshold": 0.05}, None),
    ({"cache": "rolling", "steps": 6}, None),
    ({"cache": "delayed", "steps": 8}, None),
    ({"cache": "drift", "steps": 8, "refresh_share": 0.2}, None),
    ({"steps": 4}, SparseConfig(default_block_len=4)),
    ({"unmask": "wino", "threshold": 0.05}, None),
    (DOUBTING, None),
    ({**DOUBTING, "cache": "dual"}, None),
    ({"cache": "dual", "suffix_window": 4, "steps": 4}, None),
]


@pytest.mark.parametrize("name", ["llada", "dream-tied"])
def test_every_cache_and_rules_that_mask_again(
    engines: Engines, checkpoints: dict[str, Path], name: str
) -> None:
    """A greedy confidence is the probability, so the last write's is the log-probability's."""
    llm = engines(checkpoints[name])
    base = {"temperature": 0.0, "gen_length": 12, "block_length": 6, "ignore_eos": True}
    jobs = [
        (helpers.random_prompt(n, 4 + n), SamplingParams(**base | given, logprobs=2), sparse)
        for n, (given, sparse) in enumerate(KEPT)
    ]
    outputs = llm.generate(*(list(part) for part in zip(*jobs, strict=True)), use_tqdm=False)
    for job, output in zip(jobs, outputs, strict=True):
        steps, confidence = watched(llm, *job)
        assert output["steps"] == steps, job[1]
        for entry, value in zip(output["logprobs"], confidence, strict=True):
            assert entry["logprob"] == pytest.approx(math.log(value or -1), abs=TOLERANCE)
            assert entry["top"][0] == [entry["token_id"], entry["logprob"]]


GROWING = [
    ("sdar-kv2of4", {"block_length": 4, "unmask": "dynamic", "threshold": 0.05}),
    ("sdar-kv2of4", {"block_length": 4, "steps_per_block": 2}),
    (
        "fdv2-kv2of4",
        {"unmask": "threshold", "threshold": 0.1, "cache": "sub_block", "sub_block_length": 4},
    ),
    ("fdv2-kv2of4", {"unmask": "sequential"}),
    ("qwen3-kv2of4", {}),
    ("llama-kv2of4", {"stop_token_ids": [3, 30, 44, 61, 99]}),
]


@pytest.mark.parametrize(("name", "given"), GROWING)
def test_block_causal_and_autoregressive(
    engines: Engines, name: str, given: dict[str, Any]
) -> None:
    llm = engines(helpers.GOLDEN / name)
    length = {"max_tokens" if llm.spec.geometry == "causal" else "gen_length": 14}
    params = SamplingParams(temperature=0.0, ignore_eos=True, logprobs=1, **length, **given)
    for seed in range(2):
        prompt = helpers.random_prompt(seed, 3 + 7 * seed)
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        steps, confidence = watched(llm, prompt, params)
        count = len(output["token_ids"])
        assert output["steps"] == steps[:count] and 0 not in output["steps"]
        for entry, value in zip(output["logprobs"], confidence, strict=False):
            assert entry["logprob"] == pytest.approx(math.log(value or -1), abs=TOLERANCE)
    helpers.check_idle(llm)


def test_preemption_changes_nothing(growing_checkpoints: dict[str, Path], engines: Engines) -> None:
    for family in ("sdar", "qwen3"):
        path = growing_checkpoints[family]
        few = engines(path, page_size=4, kv_pages=24, max_model_len=64)
        length = {"max_tokens" if few.spec.geometry == "causal" else "gen_length": 30}
        params = SamplingParams(temperature=0.0, ignore_eos=True, logprobs=2, **length)
        prompts = [helpers.random_prompt(n, 8) for n in range(5)]
        before = few._engine.scheduler.storage.preempted
        outputs = few.generate(prompts, params, use_tqdm=False)
        assert few._engine.scheduler.storage.preempted > before
        for prompt, output in zip(prompts, outputs, strict=True):
            (alone,) = engines(path).generate([prompt], params, use_tqdm=False)
            assert (output["token_ids"], output["steps"]) == (alone["token_ids"], alone["steps"])
            mine, theirs = ([e["logprob"] for e in o["logprobs"]] for o in (output, alone))
            assert mine == pytest.approx(theirs, abs=TOLERANCE)


def test_an_answer_that_ends(engines: Engines, checkpoints: dict[str, Path]) -> None:
    """Cut at an end id, with what lies behind it filled in or not."""
    llm = engines(checkpoints["llada-eos"])
    for early in (False, True):
        params = SamplingParams(
            temperature=0.0, gen_length=16, steps=8, block_length=8, early_end=early, logprobs=2
        )
        prompts = [helpers.random_prompt(n, 5) for n in range(8)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert "stop" in {o["finish_reason"] for o in outputs}
        for output in outputs:
            count = len(output["token_ids"])
            assert len(output["steps"]) == len(output["logprobs"]) == count
            assert all(0 < step <= output["usage"]["forward_passes"] for step in output["steps"])
            assert all(entry["logprob"] is not None for entry in output["logprobs"])


def test_what_is_filled_behind_an_end_has_its_step(
    engines: Engines, checkpoints: dict[str, Path]
) -> None:
    engine = engines(checkpoints["llada-eos"])._engine
    params = SamplingParams(
        temperature=0.0, gen_length=16, steps=8, block_length=8, early_end=True, logprobs=0
    )
    ended = 0
    for seed in range(8):
        request = engine.make_request(helpers.random_prompt(seed, 5), params)
        engine.add(request)
        while engine.has_work:
            events = engine.step()
        ((_, output),) = events.finished
        # the row is not used again before the next request
        ids, steps = engine._runner.table.read_written(request.row, 16)
        last = output.token_ids[-1]
        behind = range(len(output.token_ids), 16)
        filled = [p for p in behind if ids[p] == last and steps[p]]
        ended += bool(output.finish_reason == "stop" and filled)
        assert all(steps[p] <= output.forward_passes for p in filled)
    assert ended > 3


# padding tokens hold whatever lay in the memory, which numpy complains about
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_captured_steps(engines: Engines, checkpoints: dict[str, Path], kernels: str) -> None:
    """Padded shapes, as graphs replay them, with steps in flight, in both twins."""
    helpers.need_interpreter()
    llm, pool = rehearsing(
        checkpoints["llada"], depth=4, kernels=kernels, max_model_len=64, max_num_seqs=6
    )
    plain = engines(checkpoints["llada"])
    base = {"gen_length": 8, "block_length": 4, "cache": "dual", "ignore_eos": True}
    params = [
        SamplingParams(temperature=0.0, steps=4, logprobs=3, **base),
        SamplingParams(temperature=0.0, steps=6, **base),
        SamplingParams(temperature=0.8, steps=4, seed=3, logprobs=0, **base),
        SamplingParams(
            temperature=0.0, unmask="threshold", threshold=0.2, cfg_scale=0.5, logprobs=1, **base
        ),
        SamplingParams(temperature=0.9, top_p=0.8, steps=3, seed=4, logprobs=2, **base),
    ]
    prompts = [helpers.random_prompt(n, 2 + 2 * n) for n in range(len(params))]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert pool.replays
    for prompt, own, output in zip(prompts, params, outputs, strict=True):
        (alone,) = plain.generate([prompt], own, use_tqdm=False)
        for key in ("token_ids", "steps"):
            assert output[key] == alone[key], key
        assert ("logprobs" in output) == (own.logprobs is not None)
        for mine, theirs in zip(output.get("logprobs", []), alone.get("logprobs", []), strict=True):
            assert mine["logprob"] == pytest.approx(theirs["logprob"], abs=TOLERANCE)
            assert [id for id, _ in mine["top"]] == [id for id, _ in theirs["top"]]


@pytest.mark.parametrize(("name", "size"), [("llada-bias", 2), ("llada-tied", 2)])
def test_several_ranks(
    engines: Engines,
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    size: int,
) -> None:
    batch = prompts_and_params(50)
    prompts, params = ([*part] for part in zip(*batch, strict=True))
    expected = engines(checkpoints[name]).generate(prompts, params, use_tqdm=False)
    llm, _, _ = threaded_llm(monkeypatch, str(checkpoints[name]), size)
    with llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for mine, theirs in zip(outputs, expected, strict=True):
        assert mine["token_ids"] == theirs["token_ids"] and mine["steps"] == theirs["steps"]
        pairs = zip(mine.get("logprobs", []), theirs.get("logprobs", []), strict=True)
        for one, other in pairs:
            assert one["logprob"] == pytest.approx(other["logprob"], abs=TOLERANCE)
            assert [id for id, _ in one["top"]] == [id for id, _ in other["top"]]


def with_candidates(llm: LLM, canvas: Canvas, seed: int, **given: Any) -> Request:
    """A request for the log-probabilities of a few ids at each position, of some none."""
    dice = random.Random(seed)
    fills = sum(canvas.masks)
    named = tuple(
        tuple(dice.sample(range(llm.spec.embedding_size), dice.choice([0, 1, 2, 9])))
        for _ in range(fills)
    )
    base = {"temperature": 0.0, "ignore_eos": True, "gen_length": canvas.end - canvas.start}
    params = SamplingParams(**{**base, **given})
    return Request(next(NUMBERS), canvas, params, 7, candidates=named)


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_candidates(engines: Engines, checkpoints: dict[str, Path], name: str) -> None:
    """In one forward and in several, in holes anywhere, beside others that name none."""
    llm, model = engines(checkpoints[name], max_logit_rows=7), models.load(checkpoints[name])
    dice = random.Random(name)
    requests = []
    for number in range(12):
        low = 0 if number == 5 else dice.randrange(1, 6)
        holes = ((low, low + 2), (low + 4, low + 4 + dice.randrange(1, 7)))
        length = holes[-1][1] + dice.randrange(3)
        canvas = template_canvas(
            [dice.randrange(1, 59) for _ in range(length)], holes, dice.choice([4, 100])
        )
        given: dict[str, Any] = {"steps": dice.choice([1, 3]), "logprobs": dice.choice([None, 2])}
        if number % 3 == 0:
            given |= {"temperature": 0.9, "cfg_scale": dice.choice([0.0, 0.5])}
        one = with_candidates(llm, canvas, number, **given)
        requests.append(replace(one, candidates=()) if number % 4 == 1 else one)
    for request, output in zip(requests, run(llm, requests), strict=True):
        canvas = request.canvas
        assert output.candidate_logprobs is None or request.candidates
        expected = replayed(model, canvas, output, request.params.cfg_scale)
        if request.params.logprobs is not None:
            check_logprobs(expected, output, 2)
        places = [p - canvas.start for low, high in canvas.holes for p in range(low, high)]
        for place, ids, found in zip(
            places,
            request.candidates,
            output.candidate_logprobs or [],
            strict=bool(request.candidates),
        ):
            own = dict(expected[place])
            assert found == pytest.approx([own[i] for i in ids], abs=TOLERANCE)


def test_candidates_of_other_geometries(engines: Engines) -> None:
    """The written token is a candidate of its own, and has the same log-probability."""
    for name in ("sdar-kv2of4", "fdv2-kv2of4", "qwen3-kv2of4"):
        llm = engines(helpers.GOLDEN / name)
        engine = llm._engine
        length = {"max_tokens" if llm.spec.geometry == "causal" else "gen_length": 9}
        params = SamplingParams(temperature=0.0, ignore_eos=True, logprobs=0, **length)
        prompt = helpers.random_prompt(1, 6)
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        fills = sum(engine.make_request(prompt, params).masks)
        ids = [*output["token_ids"], *[0] * fills][:fills]
        named = tuple((token, 1) for token in ids)
        (again,) = run(llm, [engine.make_request(prompt, params, candidates=named)])
        assert again.token_ids == output["token_ids"] and again.candidate_logprobs is not None
        pairs = zip(again.candidate_logprobs, output["logprobs"], strict=False)
        assert all(found[0] == pytest.approx(entry["logprob"], abs=1e-9) for found, entry in pairs)
        assert [len(found) for found in again.candidate_logprobs] == [2] * 9 + [0] * (fills - 9)


@pytest.mark.parametrize(
    ("candidates", "words"),
    [
        (((1,),), "1 tuples for 8 positions to fill"),
        (((1,),) * 7 + ((-1,),), "token id -1, outside"),
        (((10**6,),) * 8, "token id 1000000, outside"),
    ],
)
def test_candidates_that_are_none(
    engines: Engines,
    checkpoints: dict[str, Path],
    candidates: tuple[tuple[int, ...], ...],
    words: str,
) -> None:
    engine = engines(checkpoints["llada"])._engine
    params = SamplingParams(gen_length=8)
    with pytest.raises(InvalidParameterError, match=words):
        engine.make_request([1, 2], params, candidates=candidates)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_what_constraints_write(byte_checkpoint: Path, kernels: str) -> None:
    """Tokens that nobody proposed have their own log-probability; those without a choice none."""
    if kernels == "triton":
        helpers.need_interpreter()
    llm = LLM(str(byte_checkpoint), device="cpu", kernels=kernels, max_model_len=64)
    model = models.load(byte_checkpoint)
    given: list[dict[str, Any]] = [
        {"choice": ["abc", "abd", "xyz"], "steps": 1},
        {"choice": ["abc", "xbz", "uvw"], "steps": 1, "cfg_scale": 0.6},
        {"regex": "[ab]{3}[cd]+", "steps": 2, "temperature": 0.9},
        {"regex": "(ab|cd)*", "unmask": "threshold", "threshold": 0.001},
        {"regex": "(abcd|efgh|ijkl)+", "steps": 3, "logit_bias": {101: 5.0}},
    ]
    base = {"temperature": 0.0, "gen_length": 12, "block_length": 12, "seed": 1, "logprobs": 2}
    requests = [
        llm._engine.make_request([5, 6, 7 + n], SamplingParams(**{**base, **one}))
        for n, one in enumerate(given)
    ]
    decided = forced = 0
    for request, output in zip(requests, run(llm, requests), strict=True):
        expected = replayed(model, request.canvas, output, request.params.cfg_scale)
        assert output.logprobs is not None
        for place, (ranked, entry) in enumerate(zip(expected, output.logprobs, strict=True)):
            assert (entry["logprob"] is None) == (request.canvas.start + place in request.forced)
            if entry["logprob"] is None:
                forced += 1
                continue
            decided += 1
            own = dict(ranked)[entry["token_id"]]
            assert entry["logprob"] == pytest.approx(own, abs=TOLERANCE)
    assert decided > 20 and forced


def test_an_answer_that_needs_no_forward(byte_checkpoint: Path, engines: Engines) -> None:
    llm = engines(byte_checkpoint)
    params = SamplingParams(gen_length=4, steps=4, choice=["abcd"], logprobs=1)
    (output,) = llm.generate([[5]], params, use_tqdm=False)
    assert output["usage"]["forward_passes"] == 0 and output["text"] == "abcd"
    assert [entry["logprob"] for entry in output["logprobs"]] == [None] * 4
