"""Golden cases as engine arguments, and small things that many tests need."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dllmserve import LLM, SamplingParams, SparseConfig
from dllmserve.core.canvas import answer_canvas
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.request import Request

GOLDEN = Path(__file__).parent / "golden"
MODELS = ("llada-kv4of4", "llada-kv2of4", "dream-kv2of4")
#: mixtures of experts with full attention
EXPERTS = ("llada-moe-e8", "llada-moe-variant")
LLADA_MOE_EOS = 147  # of the first
DREAM_CONFIDENCE = {
    "maskgit_plus": "probability",
    "entropy": "neg_entropy",
    "topk_margin": "margin",
}


def need_interpreter() -> None:
    """Skip where Triton's kernels cannot run on a CPU: a machine with a GPU runs tests/gpu."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")


#: specs for tests that need no weights
PLAIN = ModelSpec(
    architecture="LLaDAModelLM",
    vocab_size=50,
    embedding_size=50,
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_size=8,
    max_model_len=128,
    rope_theta=1e4,
    norm_eps=1e-5,
    mask_id=49,
    eos_ids=(48,),
)
SHIFTED = replace(PLAIN, logit_shift=1)


@dataclass(frozen=True)
class Case:
    """A golden case as arguments of generate()."""

    kind: str
    prompt: list[int]
    output: list[int]
    params: SamplingParams
    sparse: SparseConfig | None


#: kinds of LLaDA-MoE's cases besides those of LLaDA, and the rule of each
DINFER = {
    "dinfer-fastdllm": "threshold",
    "dinfer-threshold": "threshold_dinfer",
    "dinfer-hierarchy": "hierarchy",
    "dinfer-credit": "credit",
}


def dinfers_own_way(given: dict[str, Any]) -> bool:
    """Whether blocks are cut from position 0, as those of a template, or ids follow the end."""
    return bool(given.get("start_block_align") or ("eos_id" in given and given["early_stop"]))


def dinfer_case(case: dict[str, Any]) -> Case:
    """The same for one of dInfer's."""
    given = case["params"]
    options = {"unmask": DINFER[case["kind"]], "threshold": given["threshold"]}
    if given["threshold"] is None:
        options = {"unmask": "factor", "factor": given["factor"]}
    if "low_threshold" in given:
        options["low_threshold"] = given["low_threshold"]
    sizes = {name: given[name] for name in ("gen_length", "block_length")}
    expected = case["output"]
    if case["kind"] == "dinfer-fastdllm" and given["early_stop"]:
        options |= {"early_end": True, "end_padding": True}
        expected = expected[: expected.index(LLADA_MOE_EOS) + 1]
    params = SamplingParams(temperature=0.0, ignore_eos=not given["early_stop"], **sizes, **options)
    return Case(case["kind"], case["prompt_ids"], expected, params, None)


def golden_case(case: dict[str, Any]) -> Case:
    """The engine's parameters for an upstream script's."""
    if case["kind"] in DINFER:
        return dinfer_case(case)
    given = case["params"]
    options: dict[str, Any] = {"gen_length": given["gen_length"], "steps": given["steps"]}
    sparse = None
    if case["kind"] == "dream":
        options |= {"schedule": "dream", "eps": given["eps"]}
        options |= {"confidence": DREAM_CONFIDENCE[given["alg"]]}
    else:
        options |= {
            "block_length": given["block_length"],
            "remasking": given.get("remasking", "low_confidence"),
        }
    if case["kind"] == "llada":
        options |= {"cfg_scale": given["cfg_scale"]}
    if case["kind"] == "fast-dllm":
        options |= {"cache": given["cache"]}
        if given["threshold"] is not None:
            options |= {"unmask": "threshold", "threshold": given["threshold"]}
    if case["kind"] == "sparse-dllm":
        names = ("retention_ratio", "pool_kernel", "delay_step", "head_select")
        sparse = SparseConfig(**{name: given[name] for name in names})
    params = SamplingParams(temperature=0.0, ignore_eos=True, **options)
    prompt = case["prompt_ids"] if "prompt_ids" in case else case["prompt"]
    return Case(case["kind"], prompt, case["output"], params, sparse)


@cache
def golden_raw(name: str) -> list[dict[str, Any]]:
    """All cases of a golden checkpoint, as they are in its file."""
    cases: list[dict[str, Any]] = json.loads((GOLDEN / name / "cases.json").read_text())["cases"]
    return cases


@cache
def golden(name: str) -> list[Case]:
    """The generation cases of a golden checkpoint."""
    return [
        golden_case(c)
        for c in golden_raw(name)
        if c["kind"] not in ("forward", "router") and not dinfers_own_way(c["params"])
    ]


def run_cases(llm: LLM, cases: list[Case]) -> list[list[int]]:
    """Token ids of all cases, mixed in one call; rows and pages must add up afterwards."""
    outputs = llm.generate(
        [c.prompt for c in cases],
        [c.params for c in cases],
        [c.sparse for c in cases],
        use_tqdm=False,
    )
    check_idle(llm)
    return [output["token_ids"] for output in outputs]


def answers(llm: LLM, batch: Sequence[tuple[Any, ...]]) -> list[list[int]]:
    """The same of tuples that begin with a prompt's ids and its parameters."""
    outputs = llm.generate([job[0] for job in batch], [job[1] for job in batch], use_tqdm=False)
    check_idle(llm)
    return [output["token_ids"] for output in outputs]


def answer(
    llm: LLM, prompt: list[int], params: SamplingParams, sparse: SparseConfig | None = None
) -> list[int]:
    """Token ids of one prompt alone."""
    ids: list[int] = llm.generate([prompt], params, sparse, use_tqdm=False)[0]["token_ids"]
    return ids


def check_idle(llm: LLM) -> None:
    """Nothing waits or runs, and rows and pages are all free."""
    scheduler = llm._engine.scheduler
    scheduler.check_integrity()
    assert not scheduler.has_work
    assert scheduler.storage.pages.num_free == scheduler.limits.num_pages


def prompt_request(number: int, ids: list[int], params: SamplingParams, seed: int = 0) -> Request:
    """A request for an answer behind a prompt."""
    canvas = answer_canvas(ids, params.gen_length, params.resolved_block_length)
    return Request(number, canvas, params, seed)


def random_prompt(seed: int, length: int) -> list[int]:
    """Seeded ids 1..58: no mask id and no end id of the checkpoints in conftest.SHAPES."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(1, 59, (length,), generator=generator).tolist()
    return ids


def with_turn_ends(
    llm: LLM, turn_ids: tuple[int, ...], eos_ids: tuple[int, ...] | None = None
) -> LLM:
    """The engine with other ids that end a turn, and if given other end ids."""
    engine = llm._engine
    ids = engine.spec.eos_ids if eos_ids is None else eos_ids
    engine.spec = replace(engine.spec, turn_end_ids=turn_ids, eos_ids=ids)
    engine._validator = replace(engine._validator, spec=engine.spec)
    return llm
