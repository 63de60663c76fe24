"""Rules and refresh policies against their slow twins: tokens, forwards, computed tokens."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dllmserve import LLM, SamplingParams
from dllmserve.core.plan import StepPlan
from dllmserve.errors import OutOfMemoryError
from dllmserve.runtime.logits import LogitsHead
from tests.checkpoints import Shape, write_random
from tests.conftest import Engines
from tests.helpers import GOLDEN, check_idle, random_prompt
from tests.oracles import experts, models, policies

Options = dict[str, Any]

#: a quarter of the vocabulary ends an answer, so that answers end early
SHAPES = {
    "llada": Shape(family="llada", seed=3),
    "dream": Shape(family="dream", seed=5),
    "llada-ends": Shape(family="llada", eos_ids=tuple(range(10, 25)), seed=8, layers=3),
    "dream-ends": Shape(family="dream", eos_ids=tuple(range(10, 25)), seed=9, kv_heads=4),
}
#: random models are seldom sure: these write several positions a forward
RULES: dict[str, Options] = {
    "steps": {"steps": 11},
    "threshold": {"threshold": 0.4},
    "threshold_strict": {"threshold": 0.4},
    "factor": {"factor": 2.0},
    "factor_strict": {"factor": 2.0},
    "entropy_bound": {"entropy_bound": 3.0},
    "hierarchy": {"threshold": 0.5, "low_threshold": 0.1},
    "credit": {"threshold": 0.5},
    "klass": {"threshold": 0.3, "kl_threshold": 1.0, "kl_history": 1},
    "wino": {"threshold": 0.3, "threshold_back": 0.3},
}
POLICIES: dict[str, Options] = {
    "none": {},
    "none-suffix": {"suffix_window": 3},
    "prefix": {"cache": "prefix"},
    "prefix-often": {"cache": "prefix", "refresh_every": 3, "refresh_window": 2},
    "prefix-suffix": {"cache": "prefix", "suffix_window": 2},
    "dual": {"cache": "dual"},
    "dual-late": {"cache": "dual", "refresh_delay": 1},
    "dual-often": {"cache": "dual", "refresh_delay": 1, "refresh_every": 2},
    "dual-window": {"cache": "dual", "refresh_window": 4},
    "dual-all": {"cache": "dual", "refresh_window": 3, "suffix_window": 5, "refresh_every": 4},
    "rolling": {"cache": "rolling"},
    "rolling-suffix": {"cache": "rolling", "suffix_window": 4, "refresh_every": 3},
    "delayed": {"cache": "delayed"},
    "delayed-late": {"cache": "delayed", "refresh_delay": 1, "suffix_window": 6},
    "delayed-often": {"cache": "delayed", "refresh_every": 3},
    "drift": {"cache": "drift"},
    "drift-often": {"cache": "drift", "refresh_share": 0.4, "refresh_every": 2},
    "drift-suffix": {"cache": "drift", "refresh_share": 0.1, "suffix_window": 3},
}
LENGTHS: Options = {"gen_length": 21, "block_length": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("fewer")
    return {name: write_random(base / name, shape) for name, shape in SHAPES.items()}


@cache
def oracle(folder: Path) -> models.OracleModel:
    return experts.load(folder) if "moe" in folder.name else models.load(folder)


#: rules that are tried with every policy; the others with one of each kind
WIDELY = ("steps", "hierarchy", "wino")
FEW = ("none", "dual-all", "delayed-often", "drift-often")


def cases(early: bool) -> list[tuple[str, str, Options]]:
    """Every rule, and every policy."""
    found = []
    for rule, parameters in RULES.items():
        for policy, caching in POLICIES.items():
            if rule == "wino" and caching.get("cache", "none") not in ("none", "dual"):
                continue
            if rule == "wino" and early:
                continue
            if rule not in WIDELY and policy not in FEW:
                continue
            end: Options = {"early_end": True} if early else {}
            found.append((rule, policy, {"unmask": rule, **parameters, **caching, **end}))
    return found


def expected(
    folder: Path, prompt: list[int], options: Options, eos_ids: tuple[int, ...]
) -> policies.Result:
    given = {"cache": "none", **LENGTHS, **options}
    if options["unmask"] != "entropy_bound":
        given["entropy_bound"] = 0.1  # not read
    [result] = policies.generate(oracle(folder), [prompt], eos_ids=eos_ids, **given)
    return result


def sampling(options: Options) -> SamplingParams:
    ends = not options.get("early_end", False)
    return SamplingParams(temperature=0.0, ignore_eos=ends, **LENGTHS, **options)


def computed(llm: LLM, prompt: list[int], params: SamplingParams) -> tuple[dict[str, Any], int]:
    """A request alone, and the query tokens of its forwards."""
    tokens = 0

    def count(plan: StepPlan) -> None:
        nonlocal tokens
        plan.validate(256)
        tokens += plan.tokens

    llm._engine.observers.append(count)
    try:
        [output] = llm.generate([prompt], params, use_tqdm=False)
    finally:
        llm._engine.observers.remove(count)
    return output, tokens


@pytest.mark.parametrize("early", [False, True], ids=["whole", "early"])
@pytest.mark.parametrize("name", SHAPES)
def test_engine_equals_the_slow_twins(
    engines: Engines, folders: dict[str, Path], name: str, early: bool
) -> None:
    """Alone, with what it cost; then all at once, in small steps, with the same tokens."""
    if not early and name.endswith("-ends"):
        pytest.skip("whole answers do not look at end ids")
    compare(engines, folders[name], cases(early), SHAPES[name].eos_ids)


def test_experts(engines: Engines) -> None:
    """LLaDA-MoE with every policy."""
    batch = [case for case in cases(early=False) if case[0] in ("steps", "wino")]
    compare(engines, GOLDEN / "llada-moe-variant", batch, (99,))


def compare(
    engines: Engines,
    folder: Path,
    batch: list[tuple[str, str, Options]],
    eos_ids: tuple[int, ...],
) -> None:
    llm = engines(folder, page_size=5)
    prompts, params, answers = [], [], []
    for place, (rule, policy, options) in enumerate(batch):
        prompt, one = random_prompt(place, 1 + 5 * place % 17), sampling(options)
        result = expected(folder, prompt, options, eos_ids)
        output, tokens = computed(llm, prompt, one)
        assert output["token_ids"] == result.tokens, (rule, policy)
        assert output["usage"]["forward_passes"] == result.forwards, (rule, policy)
        assert tokens == result.computed, (rule, policy)
        prompts.append(prompt)
        params.append(one)
        answers.append(result.tokens)
    for options in ({}, {"max_num_batched_tokens": 150, "max_logit_rows": 40, "page_size": 5}):
        mixed = engines(folder, **options)
        outputs = mixed.generate(prompts, params, use_tqdm=False)
        check_idle(mixed)
        for case, output, ids in zip(batch, outputs, answers, strict=True):
            assert output["token_ids"] == ids, (case, options)


class Biased(models.OracleModel):
    """A model whose head adds a request's bias."""

    def __init__(self, model: models.OracleModel, bias: dict[int, float]) -> None:
        self.__dict__.update(vars(model))
        self._bias = bias

    def forward(self, *args: Any, **given: Any) -> models.Forward:
        found = super().forward(*args, **given)
        logits = found.logits.clone()
        for token, value in self._bias.items():
            logits[..., token] += value
        return found._replace(logits=logits)


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_a_bias_and_what_a_rule_does_to_logits_in_one_request(
    engines: Engines, folders: dict[str, Path], name: str
) -> None:
    """Edits and observers follow one another: bias, then credit; bias, then the divergence."""
    llm, prompts, given, answers, moved = engines(folders[name]), [], [], [], 0
    for place, rule in enumerate(("credit", "klass", "wino", "threshold", "credit", "klass")):
        bias = {(11 * place + 7 * k) % 59: (2.0, -3.0, 1.5, 4.0)[k % 4] for k in range(5 + place)}
        options = {"unmask": rule, **RULES[rule], "cache": "dual" if place % 2 else "none"}
        prompt, settings = random_prompt(place, 3 + place), {**LENGTHS, **options}
        [result] = policies.generate(
            Biased(oracle(folders[name]), bias),
            [prompt],
            eos_ids=SHAPES[name].eos_ids,
            entropy_bound=0.1,
            **settings,
        )
        params = SamplingParams(temperature=0.0, ignore_eos=True, logit_bias=bias, **settings)
        assert computed(llm, prompt, params)[0]["token_ids"] == result.tokens, rule
        without = expected(folders[name], prompt, options, SHAPES[name].eos_ids)
        moved += without.tokens != result.tokens
        prompts.append(prompt)
        given.append(params)
        answers.append(result.tokens)
    assert moved >= 4
    outputs = llm.generate(prompts, given, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == answers


def test_shadows_beside_guided_requests(engines: Engines, folders: dict[str, Path]) -> None:
    """A shadow's span lies behind the unconditional ones."""
    llm = engines(folders["dream"], page_size=5)
    wino = sampling({"unmask": "wino", "threshold": 0.3, "threshold_back": 0.6})
    guided = sampling({"steps": 11, "cfg_scale": 0.7, "cache": "dual"})
    plain = sampling({"steps": 11})
    params = [wino, guided, plain, wino, guided, wino]
    prompts = [random_prompt(seed, 3 + 2 * seed) for seed in range(len(params))]
    alone = [
        llm.generate([p], one, use_tqdm=False)[0] for p, one in zip(prompts, params, strict=True)
    ]
    assert llm.generate(prompts, params, use_tqdm=False) == alone
    check_idle(llm)


@pytest.mark.parametrize("rule", ["klass", "credit"])
def test_a_forward_that_runs_out_of_memory_is_run_again(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """What the failed attempt had kept of its first logits does not count."""
    llm = LLM(str(folders["llada"]), device="cpu", max_logit_rows=8)
    params = sampling({"unmask": rule, **RULES[rule]})
    prompts = [random_prompt(seed, 5) for seed in range(2)]
    expected = llm.generate(prompts, params, use_tqdm=False)
    product, calls, failing = LogitsHead._logits, 0, 0

    def failing_once(head: LogitsHead, *given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise torch.OutOfMemoryError("CUDA out of memory (not really)")
        return product(head, *given)

    monkeypatch.setattr(LogitsHead, "_logits", failing_once)
    for failing in range(6, 30, 4):
        calls = 0
        try:
            assert llm.generate(prompts, params, use_tqdm=False) == expected, failing
        except OutOfMemoryError:
            continue  # of a request by itself, which ends it
        assert calls > failing
    check_idle(llm)
