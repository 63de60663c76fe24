"""Canvases of noise: upstream's answers, in any company, and what a server shows of them."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dllmserve import LLM, Hole, SamplingParams
from dllmserve.decoding.noise import Recorded, RecordedNoise
from dllmserve.errors import ConfigError, InvalidParameterError, InvalidRequestError, PromptError
from tests.conftest import Engines
from tests.engine.test_growth import count_taken
from tests.helpers import GOLDEN, need_interpreter
from tests.parallel.threads import threaded_llm
from tests.rehearsal import rehearsing

MODEL = GOLDEN / "diffusion-gemma-e6"
VOCAB, CANVAS = 131, 16
CASES: list[dict[str, Any]] = [
    case
    for case in json.loads((MODEL / "cases.json").read_text())["cases"]
    if case["kind"] != "forward"
]
IDS = [f"{case['kind'].rpartition('-')[2]}-{case['torch_seed']}" for case in CASES]


def params_of(case: dict[str, Any], seed: int) -> SamplingParams:
    """A case as we call it; its seed names its recorded draws."""
    given = dict(case["params"])
    ends, _ = given.pop("eos_token_id"), given.pop("pad_token_id")
    return SamplingParams(
        temperature=1.0 if case["kind"].endswith("replay") else 0.0,
        gen_length=given.pop("max_new_tokens"),
        unmask="renoise",
        ignore_eos=ends is None,
        stop_token_ids=None if ends is None else [ends],
        seed=seed,
        **given,
    )


def noise_of(cases: Iterable[tuple[int, dict[str, Any]]]) -> RecordedNoise:
    """The cases' draws, by seed."""
    found = {}
    for seed, case in cases:
        canvases = case["canvases"]
        found[seed] = Recorded(
            start=len(case["prompt_ids"]),
            first=[canvas["initial_canvas"] for canvas in canvases],
            fresh=[[step["renoise_canvas"] for step in canvas["steps"]] for canvas in canvases],
            drawn=[
                [step["sampled"] for step in canvas["steps"] if "sampled" in step]
                for canvas in canvases
            ],
        )
    return RecordedNoise(VOCAB, found)


def check(outputs: list[dict[str, Any]], cases: list[dict[str, Any]]) -> None:
    for output, case in zip(outputs, cases, strict=True):
        length = case["params"]["max_new_tokens"]
        assert output["token_ids"] == case["expected_trimmed"][:length], case["note"]
        assert output["usage"]["forward_passes"] == case["decoder_forwards"], case["note"]


def run_all(llm: LLM, order: list[int]) -> None:
    """All cases together."""
    prompts = [CASES[i]["prompt_ids"] for i in order]
    params = [params_of(CASES[i], i) for i in order]
    check(llm.generate(prompts, params, use_tqdm=False), [CASES[i] for i in order])


@pytest.fixture
def llm(engines: Engines) -> LLM:
    made = engines(MODEL, dtype="float32")
    made.use_noise(noise_of(enumerate(CASES)))
    return made


@pytest.mark.parametrize("number", range(len(CASES)), ids=IDS)
def test_alone(llm: LLM, number: int) -> None:
    run_all(llm, [number])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 3, "max_logit_rows": 2, "page_size": 1},
        {"max_num_batched_tokens": 17, "max_logit_rows": 7, "page_size": 4},
        {"prefix_caching": False, "phases": "separate"},
    ],
)
def test_mixed(options: dict[str, Any]) -> None:
    """Requests of different lengths, chunks of prompts and of logits, waiting requests."""
    llm = LLM(str(MODEL), device="cpu", dtype="float32", **options)
    llm.use_noise(noise_of(enumerate(CASES)))
    run_all(llm, [*range(len(CASES))][::-1])


def test_when_pages_are_short() -> None:
    """Canvases go on where they were when their context was stored anew."""
    llm = LLM(str(MODEL), device="cpu", dtype="float32", page_size=2, kv_pages=45)
    llm.use_noise(noise_of(enumerate(CASES)))
    taken = count_taken(llm)
    run_all(llm, [*range(len(CASES))])
    assert taken


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_on_triton_kernels(llm: LLM) -> None:
    """Padded steps, as CUDA graphs take them."""
    need_interpreter()
    prompts = [[5, 6, 7], [9, 8]]
    how = {"block_length": 4, "max_denoising_steps": 2}
    params = [SamplingParams(gen_length=n, seed=n, **how) for n in (6, 4)]
    expected = llm.generate(prompts, params, use_tqdm=False)
    fused, pool = rehearsing(MODEL, kernels="triton", dtype="float32")
    assert fused.generate(prompts, params, use_tqdm=False) == expected
    assert pool.replays


def test_counted_noise() -> None:
    """Answers follow from seeds; they do not depend on the batch, and are not all the same."""
    llm = LLM(str(MODEL), device="cpu", dtype="float32")
    params = [SamplingParams(gen_length=20, max_denoising_steps=6, seed=s) for s in (1, 2, 1)]
    prompts = [[5, 6, 7], [5, 6, 7], [9, 8]]
    together = llm.generate(prompts, params, use_tqdm=False)
    alone = [
        llm.generate([p], [q], use_tqdm=False)[0] for p, q in zip(prompts, params, strict=True)
    ]
    assert [o["token_ids"] for o in together] == [o["token_ids"] for o in alone]
    assert together[0]["token_ids"] != together[1]["token_ids"]
    assert all(len(o["token_ids"]) <= 20 for o in together)


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, whose full layers have their one K,V head twice."""
    folder = tmp_path_factory.mktemp("two") / "heads"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    layers = config["text_config"]["per_layer_config"]
    weights = load_file(folder / "model.safetensors")
    for number, own in layers.items():
        own["num_key_value_heads"] *= 2
        name = f"model.decoder.layers.{number}.self_attn.k_proj.weight"
        weights[name] = weights[name].repeat(2, 1)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("divided", [False, True])
def test_on_two_ranks(monkeypatch: pytest.MonkeyPatch, two_heads: Path, divided: bool) -> None:
    """What is cut, or experts that are divided, and half a vocabulary each: no token changes."""
    options: dict[str, Any] = {"dtype": "float32", "expert_parallel": divided}
    llm, runner, _ = threaded_llm(monkeypatch, str(two_heads), 2, **options)
    for one in runner.runners:
        one.table.noise = noise_of(enumerate(CASES))
    run_all(llm, [*range(len(CASES))])


def test_prefixes_are_found(llm: LLM) -> None:
    """A canvas that was stored is part of what the next request begins with."""
    params = SamplingParams(gen_length=16, max_denoising_steps=4, seed=100, ignore_eos=True)
    prompt = [*range(30, 70)]
    first = llm.generate([prompt], params, use_tqdm=False)[0]
    longer = [*prompt, *first["token_ids"], 5]
    again = [llm.generate([longer], params, use_tqdm=False)[0] for _ in range(2)]
    assert (
        again[0]["usage"]["cached_tokens"] >= 32 and again[0]["token_ids"] == again[1]["token_ids"]
    )
    other = LLM(str(MODEL), device="cpu", dtype="float32", prefix_caching=False)
    alone = other.generate([longer], params, use_tqdm=False)[0]
    assert alone["token_ids"] == again[0]["token_ids"]


def test_canvases_are_watched(llm: LLM) -> None:
    """Until a canvas is done nothing of it is committed; then all of it, as it was shown."""
    params = SamplingParams(gen_length=20, max_denoising_steps=3, seed=5, ignore_eos=True)
    steps = list(llm.stream([5, 6, 7], params))
    assert [step.forward_passes for step in steps] == [1, 2, 3, 4, 5, 6]
    committed = [sum(step.committed) for step in steps]
    assert committed == [0, 0, 16, 16, 16, 20]
    assert [step.block for step in steps] == [(0, 16)] * 3 + [(16, 20)] * 3
    for step in steps:
        low, high = step.block
        assert None not in step.token_ids[low:high]
        assert all(0 <= c <= 1 for c in step.confidence[low:high] if c is not None)
    output = steps[-1].output
    assert output is not None and output.token_ids == steps[-1].token_ids
    assert steps[2].token_ids[:16] == output.token_ids[:16]
    assert output.steps == [3] * 16 + [6] * 4
    assert llm.generate([[5, 6, 7]], params, use_tqdm=False)[0]["token_ids"] == output.token_ids


def test_logprobs_are_of_what_is_written(llm: LLM) -> None:
    """Of the canvas's last forward, raw, and with the likeliest token first: it is the one."""
    case = next(c for c in CASES if c["kind"].endswith("greedy"))
    number = CASES.index(case)
    params = replace(params_of(case, number), logprobs=2)
    output = llm.generate([case["prompt_ids"]], params, use_tqdm=False)[0]
    check([output], [case])
    for token, entry in zip(output["token_ids"], output["logprobs"], strict=True):
        assert entry["token_id"] == token == entry["top"][0][0]
        assert entry["logprob"] == entry["top"][0][1] <= 0
        assert entry["top"][1][1] < entry["logprob"]
    assert any(entry["logprob"] < -0.01 for entry in output["logprobs"])


def test_bias_and_filters(llm: LLM) -> None:
    """A token that is biased away is never written; top_k=1 draws the likeliest."""
    base = {"gen_length": 16, "max_denoising_steps": 4, "seed": 9, "ignore_eos": True}
    plain = llm.generate([[5, 6]], SamplingParams(**base), use_tqdm=False)[0]["token_ids"]
    banned = dict.fromkeys(set(plain), -100.0)
    other = SamplingParams(**base, logit_bias=banned)
    assert not set(llm.generate([[5, 6]], other, use_tqdm=False)[0]["token_ids"]) & set(plain)
    best, greedy = (SamplingParams(**base, **more) for more in ({"top_k": 1}, {"temperature": 0.0}))
    outputs = llm.generate([[5, 6]] * 2, [best, greedy], use_tqdm=False)
    assert outputs[0]["token_ids"] == outputs[1]["token_ids"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"unmask": "threshold"}, "canvas of noise"),
        ({"unmask": "steps"}, "canvas of noise"),
        ({"regex": "a"}, "all at once"),
        ({"choice": ["a"]}, "all at once"),
        ({"cfg_scale": 1.0}, "cfg_scale"),
        ({"steps_per_block": 4}, "max_denoising_steps"),
        ({"steps": 4}, "max_denoising_steps"),
        ({"block_length": 17}, "canvas of 16"),
        ({"cache": "dual"}, "exact in any case"),
        ({"sub_block_length": 4}, "as a whole"),
        ({"early_end": True}, "early_end"),
        ({"confidence_eos_eot_inf": True}, "at once"),
        ({"t_min": 0.9}, "t_max"),
        ({"unmask": "joint"}, "canvas of noise"),
        ({"schedule": "dream"}, "schedule"),
        ({"gen_length": 1024}, "max_model_len"),
        ({"gen_length": 1010}, "may be 1008 at most"),
    ],
)
def test_refused(llm: LLM, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate([[5, 6, 7]], SamplingParams(**{"gen_length": 16, **given}), use_tqdm=False)


def test_refused_elsewhere(llm: LLM, engines: Engines) -> None:
    masked = engines(GOLDEN / "sdar-kv2of4", dtype="float32")
    with pytest.raises(ConfigError, match="this model has masks"):
        masked.use_noise(noise_of(enumerate(CASES)))
    with pytest.raises(InvalidRequestError, match="by 15 tokens"):
        llm.generate([[5] * 1023], SamplingParams(gen_length=1), use_tqdm=False)
    with pytest.raises(InvalidParameterError, match="this model has masks"):
        masked.generate([[5]], SamplingParams(unmask="renoise"), use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="fills a block as a whole"):
        llm.log_likelihood([[5]], [[6]])
    with pytest.raises(PromptError, match="does not see what stands behind"):
        llm.infill([[[5], Hole(3), [6]]], use_tqdm=False)
    with pytest.raises(InvalidParameterError, match="all at once"):
        llm.infill([[[5], Hole(3, regex="a")]], use_tqdm=False)
    filled = llm.infill([[[5, 6], Hole(3)]], SamplingParams(seed=1), use_tqdm=False)[0]
    assert len(filled["holes"][0]["token_ids"]) == 3
    with pytest.raises(ConfigError, match="no mask"):
        LLM(str(MODEL), device="cpu", mask_id=4)
