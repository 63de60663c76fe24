"""Canvases of noise: upstream's answers, in any company, and what a server shows of them."""

import json
from collections.abc import Iterable
from typing import Any

import pytest

from dllmserve import LLM, SamplingParams
from dllmserve.decoding.noise import Recorded, RecordedNoise
from tests.conftest import Engines
from tests.engine.test_growth import count_taken
from tests.helpers import GOLDEN, need_interpreter
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


def test_when_pages_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_counted_noise(engines: Engines) -> None:
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
