"""Models whose last block may be short, against plain loops over transformers' own layers.

Nemotron-Labs-Diffusion, which keeps causal K,V of blocks that it fills as a whole, and
Stable-DiffCoder.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllmserve import SamplingParams
from dllmserve.errors import InvalidParameterError
from tests import helpers
from tests.conftest import Engines
from tests.engine.test_growth import count_taken
from tests.helpers import answers
from tests.models.test_transformers import YARN, rewrite, saved
from tests.oracles import rules
from tests.oracles.generate import Choice, Logits, Loop, block_causal, framed
from tests.parallel.threads import threaded_llm
from tests.rehearsal import rehearsing

MASK, END = 96, 78
NEMOTRON, STABLE = "nemotron", "stable-diffcoder"
LOOPS: dict[str, Callable[[Loop, list[int], int, int], list[int]]] = {
    NEMOTRON: framed,
    STABLE: block_causal,
}
Checkpoints = dict[str, tuple[Path, Logits]]
Job = tuple[list[int], SamplingParams, list[int], int]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """A random checkpoint of each, and its logits by transformers."""
    root = tmp_path_factory.mktemp("short")
    rope = YARN | {"rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 1.0}
    rope |= {"llama_4_scaling_beta": 0.4, "beta_fast": 32.0, "beta_slow": 1.0}
    more = {"max_position_embeddings": 160, "initializer_range": 0.4}
    nemotron = saved(root / NEMOTRON, "Ministral3", rope_parameters=rope, **more)
    path = root / NEMOTRON / "model.safetensors"
    names = {"model.": "encoder.", "lm_head": "diffusion_head"}
    weights = load_file(path)
    for old, new in names.items():
        weights = {name.replace(old, new): x.clone() for name, x in weights.items()}
    save_file(weights, path)
    named = {"architectures": ["NemotronLabsDiffusionModel"], "block_size": 8}
    rewrite(root / NEMOTRON, mask_token_id=MASK, eos_token_id=END, **named)
    stable = saved(root / STABLE, "Llama", **more)
    rewrite(root / STABLE, architectures=["StableDiffcoderForCausalLM"], mask_token_id=MASK)
    return {
        name: (root / name, logits_of(model))
        for name, model in ((NEMOTRON, nemotron), (STABLE, stable))
    }


def logits_of(model: Any) -> Logits:
    def logits(ids: Tensor, sees: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(ids[None], attention_mask=sees[None, None]).logits[0]
        return found

    return logits


def at_least(tau: float) -> Choice:
    return lambda confidence, masked, step: rules.threshold(confidence, masked, tau)


def scheduled(steps: int) -> Choice:
    """The masks that a block begins with, shared out."""
    quotas: list[int] = []

    def choose(confidence: Sequence[float], masked: Sequence[bool], step: int) -> list[int]:
        if step == 0:
            quotas[:] = rules.split(sum(masked), steps)
        return rules.steps(confidence, masked, quotas[step])

    return choose


def jobs(made: Checkpoints, name: str) -> list[Job]:
    """Prompts, parameters, and the loop's answers and forwards."""
    dice, found = random.Random(name), []
    _, logits = made[name]
    for i in range(16):
        block = dice.choice([1, 2, 4, 8, 8, 16])
        prompt = helpers.random_prompt(i, dice.choice([1, 2, 7, 8, 33, 70]))
        length = dice.choice([1, 8, 13, 24, 37])
        given: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "block_length": block}
        tau, steps = dice.choice([0.15, 0.3, 0.6]), dice.choice([1, 3, 5, block])
        if i % 2:
            given |= {"unmask": "threshold", "threshold": tau}
        elif i % 4 or steps != block:
            given |= {"steps_per_block": steps}
        loop = Loop(logits, MASK, at_least(tau) if i % 2 else scheduled(steps))
        answer = LOOPS[name](loop, prompt, length, block)
        found.append((prompt, SamplingParams(gen_length=length, **given), answer, loop.forwards))
    return found


@pytest.mark.parametrize("name", LOOPS)
def test_against_the_plain_loop(engines: Engines, made: Checkpoints, name: str) -> None:
    """Alone with the same forwards; together in steps and pages of any size."""
    batch, folder = jobs(made, name), made[name][0]
    llm = engines(folder)
    for prompt, params, expected, forwards in batch:
        [output] = llm.generate([prompt], params, use_tqdm=False)
        assert output["token_ids"] == expected, params
        assert output["usage"]["forward_passes"] == forwards, params
    assert len({tuple(job[2][:8]) for job in batch}) > 8  # the model says different things
    for options in (
        {},
        {"max_num_batched_tokens": 32, "page_size": 4, "max_logit_rows": 5},
        {"page_size": 1, "max_num_seqs": 5},
    ):
        llm = engines(folder, **options)
        assert answers(llm, batch) == [job[2] for job in batch], options
        cached = llm._engine.scheduler.storage.cached
        assert answers(llm, batch) == [job[2] for job in batch], options
        assert llm._engine.scheduler.storage.cached > cached  # of the same prompts


@pytest.mark.parametrize("name", LOOPS)
def test_when_pages_are_short(engines: Engines, made: Checkpoints, name: str) -> None:
    """What a request stored is stored anew, in the middle of a block too."""
    batch = jobs(made, name)
    llm = engines(made[name][0], kv_pages=28, page_size=4, max_num_seqs=9)
    taken = count_taken(llm)
    assert answers(llm, batch) == [job[2] for job in batch]
    assert taken


@pytest.mark.parametrize("name", LOOPS)
def test_on_two_ranks(monkeypatch: pytest.MonkeyPatch, made: Checkpoints, name: str) -> None:
    batch = jobs(made, name)[::2]
    llm, _, _ = threaded_llm(monkeypatch, str(made[name][0]), 2, kv_pages=90, page_size=8)
    assert answers(llm, batch) == [job[2] for job in batch]


# padding tokens hold whatever lay in the memory, which numpy complains about
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", [*LOOPS][:1])  # the interpreter is slow
def test_padded_steps_in_flight_on_triton_kernels(made: Checkpoints, name: str) -> None:
    """Under the interpreter on a CPU: what graphs replay, four steps ahead."""
    helpers.need_interpreter()
    batch = sorted(jobs(made, name), key=lambda job: len(job[0]) + 2 * job[3])[3:5]
    sizes = {"max_model_len": 48, "max_num_seqs": 2, "page_size": 4, "max_logit_rows": 16}
    llm, pool = rehearsing(made[name][0], depth=4, kernels="triton", **sizes)
    assert answers(llm, batch) == [job[2] for job in batch]
    assert pool.replays


def test_every_rule_and_sampler_alone_or_together(engines: Engines, made: Checkpoints) -> None:
    """Also those that remember, whose blocks of one position are read at the one before."""
    variants: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.8, "top_p": 0.8, "seed": 4},
        {"unmask": "factor", "logit_bias": {5: 3.0, 7: -100}},
        {"unmask": "entropy_bound", "entropy_bound": 1.0},
        {"unmask": "klass", "threshold": 0.2, "kl_threshold": 0.3},
        {"unmask": "credit", "threshold": 0.4},
        {"unmask": "hierarchy", "threshold": 0.5},
        {"unmask": "dynamic", "steps_per_block": 3, "threshold": 0.5},
        {"confidence": "margin", "top_k": 5, "temperature": 0.7, "seed": 1},
        {"unmask": "sequential", "quality": "balanced"},
    ]
    base = {"temperature": 0.0, "gen_length": 29, "ignore_eos": True}
    params = [SamplingParams(**{**base, **given}) for given in variants]
    prompts = [helpers.random_prompt(index, 3 + 9 * index) for index in range(len(params))]
    batch: list[Job] = [(*pair, [], 0) for pair in zip(prompts, params, strict=True)]
    llm = engines(made[NEMOTRON][0])
    alone = [answers(llm, [job])[0] for job in batch]
    assert all(len(ids) == 29 for ids in alone)
    assert answers(llm, batch) == alone
    few = engines(made[NEMOTRON][0], kv_pages=16, page_size=8, max_num_batched_tokens=80)
    assert answers(few, batch) == alone


def test_ends_and_streams(engines: Engines, made: Checkpoints) -> None:
    """An id that ends the answer, wherever in a block; the stream gives what is written so far."""
    llm = engines(made[NEMOTRON][0])
    prompt, params, expected, _ = max(jobs(made, NEMOTRON), key=lambda job: len(set(job[2])))
    for at in (0, 1, 5, len(expected) - 1):
        ending = replace(params, stop_token_ids=[expected[at]])
        [output] = llm.generate([prompt], ending, use_tqdm=False)
        assert output["token_ids"] == expected[: expected.index(expected[at]) + 1]
        assert output["finish_reason"] == "stop"
    canvases = list(llm.stream(prompt, params))
    counts = [c.committed.count(True) for c in canvases]
    assert counts == sorted(counts)
    assert next(n for n in counts if n) == 1  # what the prompt's forward decides
    assert list(canvases[-1].token_ids) == expected


def test_an_end_id_of_the_checkpoint(engines: Engines, made: Checkpoints) -> None:
    """The answer ends with it unless it is to be ignored."""
    llm = engines(made[NEMOTRON][0])
    for prompt, params, expected, _ in jobs(made, NEMOTRON):
        ids = helpers.answer(llm, prompt, replace(params, ignore_eos=False))
        assert ids == (expected[: expected.index(END) + 1] if END in expected else expected)


def test_what_makes_no_sense_is_refused(engines: Engines, made: Checkpoints) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"sub_block_length": 4, "cache": "sub_block"}, "fills a block as a whole: leave it out"),
        ({"unmask": "joint"}, "first token of a block is decided with the block before"),
    ]
    for given, words in refused:
        params = SamplingParams(**given)
        with pytest.raises(InvalidParameterError, match=words):
            engines(made[NEMOTRON][0]).generate([[1, 2]], params, use_tqdm=False)
