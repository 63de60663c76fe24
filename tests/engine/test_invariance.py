"""What a request answers depends on nothing but the request."""

import random
from pathlib import Path
from typing import Any

import pytest

from dllmserve import LLM, SamplingParams, SparseConfig
from dllmserve._settings import with_sparse
from tests.conftest import Engines
from tests.helpers import answer, check_idle, random_prompt
from tests.ordered import use_ordered_products

Job = tuple[list[int], SamplingParams, SparseConfig | None]


def jobs(count: int = 14) -> list[Job]:
    """Sampled, guided, cached and filtered requests of many lengths, with seeds."""
    variants: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 20, "cache": "dual"},
        {"temperature": 1.0, "cfg_scale": 0.5},
        {"temperature": 0.8, "unmask": "threshold", "threshold": 0.3, "cache": "prefix"},
        {"temperature": 0.0, "unmask": "entropy_bound", "entropy_bound": 1.0},
        {"temperature": 1.0, "remasking": "random"},
    ]
    made: list[Job] = []
    for i in range(count):
        length = 6 + 5 * i % 19
        options = {"gen_length": length, "steps": 1 + i, "seed": 100 + i, "block_length": 7}
        params = SamplingParams(**options, **variants[i % len(variants)])
        sparse = SparseConfig(default_block_len=4) if i % 7 in (0, 6) else None
        made.append((random_prompt(i, 3 + 11 * i % 29), params, sparse))
    return made


def run(llm: LLM, batch: list[Job]) -> list[dict[str, Any]]:
    prompts, params, sparse = (list(column) for column in zip(*batch, strict=True))
    outputs = llm.generate(prompts, params, sparse, use_tqdm=False)
    check_idle(llm)
    return outputs


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_alone_or_in_any_batch(engines: Engines, checkpoints: dict[str, Path], name: str) -> None:
    batch = jobs()
    llm = engines(checkpoints[name])
    alone = [run(llm, [job])[0] for job in batch]
    assert run(llm, batch) == alone
    for options in (
        {"max_logit_rows": 3},
        {"max_num_batched_tokens": 110, "max_num_seqs": 3},
        {"kv_pages": 8, "page_size": 8},
    ):
        order = random.Random(str(options)).sample(range(len(batch)), len(batch))
        mixed = run(engines(checkpoints[name], **options), [batch[i] for i in order])
        assert mixed == [alone[i] for i in order], options


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_numbers_alone_or_in_any_batch(
    engines: Engines, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Where products have one order of summation, no bit of any confidence depends on others."""
    use_ordered_products(monkeypatch)
    batch = jobs()
    alone = [list(engines(checkpoints[name]).stream(*job)) for job in batch]
    for options in ({}, {"max_logit_rows": 7}, {"max_num_batched_tokens": 110}):
        llm = engines(checkpoints[name], **options)
        streams = [llm.stream(*job) for job in batch]
        first = [next(stream) for stream in streams]  # all are under way, and share steps
        seen = [[step, *stream] for step, stream in zip(first, streams, strict=True)]
        assert seen == alone, options
        check_idle(llm)


def test_arrival_in_the_middle(engines: Engines, checkpoints: dict[str, Path]) -> None:
    """Requests that join a running engine one step apart answer as they do alone."""
    batch = jobs(6)
    llm = engines(checkpoints["llada"])
    alone = [run(llm, [job])[0]["token_ids"] for job in batch]
    engine = llm._engine
    ids: list[int] = []
    answers: dict[int, list[int]] = {}
    for prompt, params, sparse in batch:
        request = engine.make_request(prompt, with_sparse(params, sparse))
        ids.append(request.id)
        engine.add(request)
        answers |= {r.id: o.token_ids for r, o in engine.step().finished}
    while engine.has_work:
        answers |= {r.id: o.token_ids for r, o in engine.step().finished}
    assert [answers[i] for i in ids] == alone
    check_idle(llm)


def test_seeds(engines: Engines, checkpoints: dict[str, Path]) -> None:
    llm = engines(checkpoints["llada"])
    prompt = random_prompt(1, 8)

    def sampled(seed: int | None) -> SamplingParams:
        return SamplingParams(gen_length=24, steps=24, seed=seed, ignore_eos=True)

    first, again, other = answers_of(llm, prompt, [sampled(1), sampled(1), sampled(2)])
    assert first == again
    assert first != other
    unseeded = answers_of(llm, prompt, [sampled(None)] * 3)
    assert len({tuple(ids) for ids in unseeded}) == 3
    assert answer(llm, prompt, sampled(1)) == first


def answers_of(llm: LLM, prompt: list[int], params: list[SamplingParams]) -> list[list[int]]:
    outputs = llm.generate([prompt] * len(params), params, use_tqdm=False)
    return [output["token_ids"] for output in outputs]


def test_the_engines_seed_fixes_unseeded_requests(checkpoints: dict[str, Path]) -> None:
    params = SamplingParams(gen_length=16, steps=16, ignore_eos=True)
    prompt = random_prompt(2, 5)
    runs = []
    for seed in (3, 3, 4):
        llm = LLM(str(checkpoints["llada"]), device="cpu", seed=seed)
        runs.append([answer(llm, prompt, params) for _ in range(2)])
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_temperature_zero_ignores_the_seed(engines: Engines, checkpoints: dict[str, Path]) -> None:
    llm = engines(checkpoints["llada"])
    params = [SamplingParams(temperature=0.0, gen_length=12, steps=6, seed=s) for s in (1, 2)]
    first, second = answers_of(llm, random_prompt(3, 4), params)
    assert first == second
