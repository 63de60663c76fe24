"""Requests with a logit bias, against the slow decoder and against themselves."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dllmserve import LLM, SamplingParams, SparseConfig
from dllmserve.runtime.edits import BiasEdit
from tests.conftest import SHAPES, Engines
from tests.helpers import answer, check_idle, need_interpreter, random_prompt
from tests.oracles import models
from tests.reference import decode
from tests.rehearsal import rehearsing

Options = dict[str, Any]
Job = tuple[list[int], SamplingParams, SparseConfig | None]

#: every rule, confidence, filter and sampler
WAYS: dict[str, Options] = {
    "steps": {"steps": 7, "block_length": 5},
    "threshold": {"unmask": "threshold", "threshold": 0.3},
    "factor": {"unmask": "factor", "factor": 2.0, "confidence": "margin", "block_length": 6},
    "entropy-bound": {"unmask": "entropy_bound", "entropy_bound": 2.0},
    "neg-entropy": {"steps": 6, "confidence": "neg_entropy", "cache": "prefix"},
    "guided": {"steps": 6, "cfg_scale": 0.7, "block_length": 7, "cache": "dual"},
    "sampled": {"steps": 6, "temperature": 0.8, "seed": 3},
    "top-p": {"steps": 6, "temperature": 0.9, "top_p": 0.7, "seed": 4},
    "top-k": {"steps": 6, "temperature": 1.1, "top_k": 6, "seed": 5, "cfg_scale": 0.4},
    "random": {"steps": 6, "remasking": "random", "seed": 6},
    "dream": {
        "steps": 6,
        "schedule": "dream",
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 9,
        "seed": 7,
    },
}


def bias_of(number: int) -> dict[int, float]:
    """Small and large values on a few ids, the mask id of most checkpoints (60) among them."""
    return {
        (7 * number + 3 * k) % 60: (-100.0, 1.5, 0.25, -2.0, 3.0)[k % 5] for k in range(2 + number)
    } | {60: 2.0}


@cache
def jobs(*, biased: int = 1, gen_length: int = 14) -> tuple[Job, ...]:
    """One job of each way; with a bias, if its number is a multiple of ``biased``."""
    made: list[Job] = []
    for number, options in enumerate(WAYS.values()):
        given = {"temperature": 0.0, "gen_length": gen_length, "ignore_eos": True, **options}
        bias = None if number % biased else bias_of(number)
        sparse = SparseConfig(default_block_len=4) if number == 6 else None
        params = SamplingParams(logit_bias=bias, **given)
        made.append((random_prompt(number, 3 + 5 * number % 17), params, sparse))
    return tuple(made)


def run(llm: LLM, batch: tuple[Job, ...] | list[Job]) -> list[list[int]]:
    prompts, params, sparse = (list(column) for column in zip(*batch, strict=True))
    outputs = llm.generate(prompts, params, sparse, use_tqdm=False)
    check_idle(llm)
    return [output["token_ids"] for output in outputs]


@pytest.mark.parametrize("name", SHAPES)
def test_engine_equals_the_slow_decoder(
    engines: Engines, checkpoints: dict[str, Path], name: str
) -> None:
    """Alone, together, and together with requests that have no bias."""
    llm = engines(checkpoints[name])
    oracle = models.load(checkpoints[name])
    batch = jobs()
    expected = [decode(oracle, *job).ids for job in batch]
    assert run(llm, batch) == expected
    assert [run(llm, [job])[0] for job in batch] == expected
    plain = [(prompt, replace(params, logit_bias=None), sparse) for prompt, params, sparse in batch]
    without = run(llm, plain)
    assert sum(a != b for a, b in zip(without, expected, strict=True)) >= 4
    mixed = [job for pair in zip(plain, batch, strict=True) for job in pair]
    both = [ids for pair in zip(without, expected, strict=True) for ids in pair]
    assert run(llm, mixed) == both


@pytest.mark.parametrize(
    "options",
    [
        {"max_logit_rows": 2},
        {"max_logit_rows": 7},
        {"max_num_batched_tokens": 70, "max_num_seqs": 3},
        {"kv_pages": 20, "page_size": 8},
    ],
    ids=str,
)
def test_chunks_and_batches_change_nothing(
    engines: Engines, checkpoints: dict[str, Path], options: Options
) -> None:
    batch = jobs(biased=2)
    alone = [run(engines(checkpoints["llada"]), [job])[0] for job in batch]
    assert run(engines(checkpoints["llada"], **options), batch) == alone


@pytest.mark.parametrize("name", ["dream"])
def test_on_triton_kernels(engines: Engines, checkpoints: dict[str, Path], name: str) -> None:
    """The fused reducer, and the step's twin, under the interpreter."""
    need_interpreter()
    llm = LLM(str(checkpoints[name]), device="cpu", kernels="triton", max_model_len=64)
    batch = jobs(biased=2, gen_length=4)
    expected = [answer(engines(checkpoints[name]), *job) for job in batch]
    assert run(llm, batch) == expected


# padding tokens hold whatever lay in the memory, which numpy complains about
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_padded_steps_in_flight(
    engines: Engines, checkpoints: dict[str, Path], kernels: str
) -> None:
    """What graphs replay, four steps in flight; rows pass from one request to the next."""
    need_interpreter()
    llm, pool = rehearsing(
        checkpoints["llada"],
        depth=4,
        kernels=kernels,
        max_model_len=64,
        max_num_seqs=4,
        page_size=3,
        kv_pages=60,
        max_logit_rows=3,
    )
    base = {"temperature": 0.0, "gen_length": 8, "block_length": 4, "cache": "dual"}
    variants: list[Options] = [
        {"steps": 4, "logit_bias": bias_of(3)},
        {"steps": 4},
        {"unmask": "threshold", "threshold": 0.2, "cfg_scale": 0.5, "logit_bias": bias_of(5)},
        {"steps": 4, "temperature": 0.8, "block_length": 9, "seed": 3, "logit_bias": bias_of(2)},
        {"steps": 3},
        {"steps": 5, "logit_bias": {17: 100}},
        {"steps": 4, "confidence_eos_eot_inf": True},
        {"steps": 4, "temperature": 0.7, "seed": 5, "logits_eos_inf": True},
    ]
    variants = variants[:: 2 if kernels == "triton" else 1]  # the interpreter is slow
    params = [SamplingParams(ignore_eos=True, **base | given) for given in variants]
    batch: list[Job] = [(random_prompt(n, 1 + 2 * n), one, None) for n, one in enumerate(params)]
    assert run(llm, batch) == [answer(engines(checkpoints["llada"]), *job) for job in batch]
    assert any(s.edits for shape in pool.shapes for s in shape.segments)
    assert any(s.last for shape in pool.shapes for s in shape.segments)


#: tests.conftest's checkpoints with the constant logits below: id 2 is likeliest, 4 the mask
LOGITS = [0.0, 1.0, 3.0, 2.0, 9.0]


#: the interpreter is slow
BANS = [
    *((way, dtype, "torch") for way in WAYS for dtype in ("float32", "bfloat16")),
    *((way, "bfloat16", "triton") for way in ("steps", "sampled", "top-k")),
]


@pytest.mark.parametrize(("way", "dtype", "kernels"), BANS)
def test_ban_and_force(
    engines: Engines,
    constant_checkpoint: Callable[[list[float]], Path],
    way: str,
    dtype: str,
    kernels: str,
) -> None:
    if kernels == "triton":
        need_interpreter()
    llm = engines(constant(constant_checkpoint), dtype=dtype, kernels=kernels, max_num_seqs=8)
    length = 3 if kernels == "triton" else 12
    given = {"temperature": 0.0, "gen_length": length, "ignore_eos": True, **WAYS[way]}

    def ids(bias: dict[int, float]) -> set[int]:
        return set(answer(llm, [1, 2, 3], SamplingParams(logit_bias=bias, **given)))

    greedy = given["temperature"] == 0
    assert 2 not in ids({2: -100})
    assert ids({2: -100, 3: -100, 0: -100}) == {1}
    assert ids({0: 100}) == {0}
    # the mask id is never proposed, however likely, and banning the others does not change that
    assert ids({4: 100}) <= {0, 1, 2, 3}
    assert 4 not in ids(dict.fromkeys(range(4), -100))
    # the choice among several forced tokens is the model's
    assert ids({0: 100, 1: 100}) == {1} if greedy else ids({0: 100, 1: 100}) <= {0, 1}


@cache
def constant(make: Callable[[list[float]], Path]) -> Path:
    """One checkpoint for all tests that ask for it."""
    return make(LOGITS)


def test_the_statistics_are_those_of_the_biased_distribution(
    engines: Engines, constant_checkpoint: Callable[[list[float]], Path]
) -> None:
    llm = engines(constant(constant_checkpoint), max_num_seqs=8)
    bias = {4: -100, 1: 2.0, 2: -1.0}  # 0, 3, 2, 2 are left: one best, two behind it
    weights = [1.0, 20.0855369, 7.3890561, 7.3890561]
    best, behind = weights[1] / sum(weights), weights[2] / sum(weights)
    for confidence, value in (("probability", best), ("margin", best - behind)):
        params = SamplingParams(
            temperature=0.0, gen_length=4, steps=4, confidence=confidence, logit_bias=bias
        )
        first = next(iter(llm.stream([1, 2], params)))
        assert first.token_ids == [1] * 4
        assert [c for c in first.confidence if c is not None] == pytest.approx([value] * 4)


def test_requests_without_a_bias_cause_no_work(
    engines: Engines, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engines(checkpoints["llada"])
    chunks: list[int] = []
    apply = BiasEdit.apply
    monkeypatch.setattr(BiasEdit, "apply", lambda *args: chunks.append(1) or apply(*args))
    plain = jobs(biased=100)[1:]
    expected = run(llm, plain)
    assert not chunks
    assert run(llm, [*jobs()[:1], *plain])[1:] == expected
    assert chunks
    chunks.clear()
    assert run(llm, plain) == expected
    assert not chunks


def test_at_most_as_many_ids_as_may_be(engines: Engines, tmp_path: Path) -> None:
    """All ids but the mask and one are banned, as many as a request may name."""
    from tests.checkpoints import Shape, write_random

    shape = Shape(family="llada", vocab=1026, mask_id=1025, eos_ids=(1,))
    llm = engines(write_random(tmp_path, shape))
    bias = dict.fromkeys((i for i in range(1025) if i != 77), -100.0)
    assert len(bias) == 1024
    jobs_ = [
        ([5, 6], SamplingParams(gen_length=6, steps=3, seed=1, logit_bias=bias), None),
        ([5, 6], SamplingParams(gen_length=6, steps=3, seed=1, temperature=0.0), None),
    ]
    first, second = run(llm, jobs_)
    assert first == [77] * 6
    assert second == answer(llm, *jobs_[1])
