"""Wrong input raises before anything runs, and says what was wrong, the limit and the value."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dllmserve import LLM, SamplingParams, SparseConfig
from dllmserve import errors as errors_module
from dllmserve.errors import (
    CapacityError,
    ContextLengthError,
    DllmServeError,
    InvalidParameterError,
    InvalidRequestError,
    OutOfMemoryError,
    PromptError,
    TokenizerError,
    UnknownOptionError,
)
from tests.conftest import Engines
from tests.helpers import check_idle

NAN, INF = float("nan"), float("inf")
GREEDY = SamplingParams(temperature=0.0, gen_length=6, steps=3)


def fails(kind: type[DllmServeError], parts: list[str], call: Callable[[], Any]) -> None:
    with pytest.raises(kind) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)


def numbers(name: str, low: str, *values: Any) -> list[tuple[dict[str, Any], list[str]]]:
    return [({name: value}, [name, low, f"got {value!r}"]) for value in values]


HUGE = 10**400
WRONG_PARAMS = [
    *numbers("temperature", ">= 0", -0.1, NAN, INF, -INF, "1", None, True, [1], HUGE),
    *numbers("gen_length", "[1, 8192]", 0, -1, 8193, 10000, 1.0, "64", True, None, NAN, HUGE),
    *numbers("steps", "[1, 8192]", 0, -1, 8193, 10000, 2.5, "8", False, None),
    *numbers("max_tokens", "[1, 8192]", 0, -1, 8193, 10**8, 1.5, "64", True, None),
    *numbers("cfg_scale", ">= 0", -1, NAN, INF, "0", None, False),
    *numbers("block_length", "[1, 8192]", 0, -1, 10000, 1.5, "8", True),
    *numbers("threshold", "[0, 1]", -0.1, 1.1, NAN, INF, "0.9", None, True),
    *numbers("factor", ">= 0", -1, NAN, INF, "1", None),
    *numbers("entropy_bound", ">= 0", -1, NAN, INF, "1", None),
    *numbers("eps", "(0, 1]", 0.0, 1.5, -1, NAN, "1", None),
    *numbers("top_p", "(0, 1]", 0.0, 1.01, -0.5, NAN, INF, "1", None, True),
    *numbers("top_k", ">= 0", -1, 1.0, "5", True, None, NAN),
    *numbers("seed", "[0, 9223372036854775807]", -1, 2**63, 1.0, "1", True),
    *numbers("ignore_eos", "True or False", 1, 0, "yes", None),
    *numbers("remasking", "'low_confidence', 'random'", "high", "", None, 1, ["random"]),
    *numbers("unmask", "'steps', 'threshold', 'factor'", "step", None, 3, {}),
    *numbers("confidence", "'probability', 'margin', 'neg_entropy'", "p", None),
    *numbers("schedule", "'uniform', 'dream'", "linear", None, True),
    *numbers("cache", "'none', 'prefix', 'dual'", "full", None, True),
    ({"cache": "sparse"}, ["SparseConfig", "sparse_configs="]),
    ({"stop": 3}, ["stop", "3 (int)"]),
    ({"stop": ["a", ""]}, ["stop strings", "''"]),
    ({"stop": ["a", 5]}, ["stop strings", "got 5"]),
    ({"stop": ""}, ["stop strings", "''"]),
    ({"stop": ["x"] * 17}, ["at most 16", "got 17"]),
    *numbers("logit_bias", "mapping of token ids to numbers", [5], "5", 5, {5}, ((5, 1.0),)),
    ({"logit_bias": {"5": 1.0}}, ["token id of logit_bias", ">= 0", "'5' (str)"]),
    ({"logit_bias": {True: 1.0}}, ["token id of logit_bias", "True (bool)"]),
    ({"logit_bias": {5.0: 1.0}}, ["token id of logit_bias", "5.0 (float)"]),
    ({"logit_bias": {-1: 1.0}}, ["token id of logit_bias", ">= 0", "got -1"]),
    ({"logit_bias": {5: 100.5}}, ["logit_bias[5]", "[-100, 100]", "got 100.5"]),
    ({"logit_bias": {5: -101}}, ["logit_bias[5]", "[-100, 100]", "got -101"]),
    ({"logit_bias": {5: NAN}}, ["logit_bias[5]", "got nan"]),
    ({"logit_bias": {5: INF}}, ["logit_bias[5]", "got inf"]),
    ({"logit_bias": {5: HUGE}}, ["logit_bias[5]", "[-100, 100]"]),
    ({"logit_bias": {5: True}}, ["logit_bias[5]", "True (bool)"]),
    ({"logit_bias": {5: "1"}}, ["logit_bias[5]", "'1' (str)"]),
    ({"logit_bias": {5: None}}, ["logit_bias[5]", "None (NoneType)"]),
    ({"logit_bias": dict.fromkeys(range(1025), 1)}, ["at most 1024 token ids", "got 1025"]),
    ({"remasking": "random", "unmask": "factor"}, ["remasking='random'", "unmask='factor'"]),
    ({"schedule": "dream", "unmask": "threshold"}, ["schedule='dream'", "unmask='threshold'"]),
    ({"unmask": "factor", "confidence": "neg_entropy"}, ["unmask='factor'", "'neg_entropy'"]),
    *numbers("low_threshold", "[0, 1]", -0.1, 1.5, NAN, "0.5", None, True),
    *numbers("kl_threshold", ">= 0", -0.1, NAN, INF, "0.5", None, True),
    *numbers("kl_history", "[1, 64]", 0, 65, 1.0, "2", None, True),
    *numbers("threshold_back", "[0, 1]", -0.1, 1.5, NAN, "0.5", None, True),
    *numbers("edit_threshold", "[0, 1]", -0.1, 1.5, NAN, "0.5", True),
    *numbers("max_edit_steps", "[0, 256]", -1, 257, 1.0, "1", None, True),
    *numbers("min_tokens_per_step", "[1, 8192]", 0, 8193, 1.0, "1", None, True),
    *numbers("penalty_lambda", "[0, 100]", -0.1, 101, NAN, "1", None, True),
    *numbers("refresh_delay", "[0, 8192]", -1, 8193, 1.0, "1", None, True),
    *numbers("refresh_every", "[1, 8192]", 0, 8193, 1.0, "1", True),
    *numbers("refresh_window", "[0, 8192]", -1, 8193, 1.0, "1", None, True),
    *numbers("refresh_share", "[0, 1]", -0.1, 1.1, NAN, "0.5", None, True),
    *numbers("suffix_window", "[0, 8192]", -1, 8193, 1.0, "1", True),
    *numbers("early_end", "True or False", 1, "yes", None),
    *numbers("quality", "'exact', 'balanced', 'fast'", "best", 3, True),
    ({"quality": "fast", "gen_length": 0}, ["gen_length", "got 0"]),
    ({"quality": "fast", "block_length": "8"}, ["block_length", "'8' (str)"]),
    ({"refresh_delay": 1}, ["refresh_delay=1", "'prefix' or 'dual'", "cache='none'"]),
    ({"refresh_every": 2, "cache": "none"}, ["refresh_every=2", "'drift'", "cache='none'"]),
    ({"refresh_window": 2, "cache": "rolling"}, ["refresh_window=2", "cache='rolling'"]),
    *numbers("end_padding", "True or False", 1, "yes", None),
    ({"end_padding": True}, ["end_padding=True", "give early_end"]),
    ({"early_end": True, "ignore_eos": True}, ["early_end=True", "ignore_eos=True"]),
    ({"unmask": "wino", "cfg_scale": 1.0}, ["unmask='wino'", "cfg_scale=1"]),
    ({"unmask": "wino", "early_end": True}, ["unmask='wino'", "early_end=True"]),
    ({"unmask": "wino", "cache": "prefix"}, ["unmask='wino'", "'none' or 'dual'", "'prefix'"]),
    ({"edit_threshold": 0.5}, ["edit_threshold=0.5", "'threshold_strict'", "unmask='steps'"]),
    ({"unmask": "dynamic", "max_edit_steps": 3}, ["max_edit_steps=3", "give an edit_threshold"]),
    ({"unmask": "joint", "min_tokens_per_step": 2}, ["min_tokens_per_step=2", "'dynamic'"]),
    ({"unmask": "dynamic", "penalty_lambda": 1}, ["penalty_lambda=1", "unmask='joint' only"]),
    ({"unmask": "joint", "cache": "rolling"}, ["'joint', which edits", "'dual', got 'rolling'"]),
    ({"unmask": "joint", "early_end": True}, ["early_end=True", "may replace an end id"]),
    ({"unmask": "joint", "regex": "a"}, ["'joint', which edits", "write tokens for good"]),
    (
        {"early_end": True, "end_padding": True, "cache": "delayed"},
        ["end_padding=True", "'none' or 'prefix' or 'dual'", "'delayed'"],
    ),
    (
        {"early_end": True, "end_padding": True, "regex": "a"},
        ["end_padding=True", "leave one of them out"],
    ),
    ({"unmask": "joint", "sparse": SparseConfig()}, ["leave the SparseConfig out"]),
    ({"unmask": "klass", "confidence": "margin"}, ["unmask='klass'", "'probability'", "'margin'"]),
    ({"unmask": "factor_strict", "confidence": "neg_entropy"}, ["'factor_strict'", "neg_entropy"]),
    (
        {"unmask": "threshold_strict", "confidence": "neg_entropy", "threshold": 0.5},
        ["neg_entropy", "<= 0", "got 0.5"],
    ),
    (
        {"unmask": "threshold", "confidence": "neg_entropy", "threshold": 0.5},
        ["neg_entropy", "<= 0", "got 0.5"],
    ),
]
WRONG_SPARSE = [
    *numbers("enabled", "True or False", 1, "yes", None),
    *numbers("retention_ratio", "[0, 1]", -0.1, 1.5, NAN, INF, "0.5", None, True),
    *numbers("delay_step", ">= 0", -1, 1.0, "1", True, None),
    *numbers("default_block_len", ">= 1", 0, -1, 32.0, "32", True, None),
    *numbers("head_select", "True or False", 1, None),
    *numbers("pool_kernel", ">= 1", 0, -3, 3.0, "3", True, None),
    *numbers("score", "'mean_query', 'attention'", "mean", None, True),
    *numbers("min_keep", ">= 0", -1, 3.0, "3", True, None),
]


@pytest.mark.parametrize(("options", "parts"), WRONG_PARAMS, ids=lambda v: str(v)[:40])
def test_sampling_params(options: dict[str, Any], parts: list[str]) -> None:
    fails(InvalidParameterError, parts, lambda: SamplingParams(**options))


@pytest.mark.parametrize(("options", "parts"), WRONG_SPARSE, ids=lambda v: str(v)[:40])
def test_sparse_config(options: dict[str, Any], parts: list[str]) -> None:
    fails(InvalidParameterError, parts, lambda: SparseConfig(**options))


def test_the_limits_themselves_are_fine() -> None:
    SamplingParams(temperature=0, gen_length=8192, steps=8192, top_p=1, seed=2**63 - 1)
    SamplingParams(gen_length=1, steps=1, threshold=0, eps=1.0, block_length=1)
    SamplingParams(stop=["x"] * 16)
    SamplingParams(logit_bias=dict.fromkeys(range(1023), -100) | {10**30: 100})
    SparseConfig(retention_ratio=0, delay_step=0, default_block_len=1, pool_kernel=1)
    SparseConfig(retention_ratio=1)


@pytest.mark.parametrize(
    ("make", "given", "suggested"),
    [
        (SamplingParams, "temprature", "'temperature'"),
        (SamplingParams, "gen_len", "'gen_length'"),
        (SamplingParams, "zzz", "known options: "),
        (SparseConfig, "retention", "'retention_ratio'"),
        (SparseConfig, "block_len", "'default_block_len'"),
        (LLM, "max_len", "'max_model_len'"),
        (LLM, "tensor_parallel", "'tensor_parallel_size'"),
        (LLM, "zzz", "known options: "),
    ],
)
def test_unknown_options(make: Callable[..., Any], given: str, suggested: str) -> None:
    parts = [make.__name__, repr(given), suggested]
    fails(UnknownOptionError, parts, lambda: make(**{given: 1}))
    with pytest.raises(TypeError):
        make(**{given: 1})


@pytest.fixture
def llm(engines: Engines, checkpoints: dict[str, Path]) -> LLM:
    return engines(checkpoints["llada"], max_model_len=64, kv_pages=3, page_size=16)


BAD_REQUESTS: list[tuple[type[DllmServeError], list[str], tuple[Any, ...]]] = [
    (PromptError, ["prompts must be a list", "str"], ("text",)),
    (PromptError, ["prompts must be a list", "bytes"], (b"text",)),
    (PromptError, ["prompts must be a list", "int"], (3,)),
    (PromptError, ["prompts must be a list", "NoneType"], (None,)),
    (PromptError, ["prompts[1] must be", "int"], ([[1], 2],)),
    (PromptError, ["prompts[0] must be", "bytes"], ([b"abc"],)),
    (PromptError, ["prompts[1] is empty"], ([[1], []], GREEDY)),
    (PromptError, ["prompts[0][1]", "1.5"], ([[1, 1.5]],)),
    (PromptError, ["prompts[0][0]", "True"], ([[True]],)),
    (PromptError, ["prompts[0][0]", "None"], ([[None]],)),
    (PromptError, ["prompts[0][2] is 61", "0..60"], ([[1, 2, 61]],)),
    (PromptError, ["prompts[0][0] is -1", "0..60"], ([[-1]],)),
    (PromptError, ["prompts[0][0]", f"{2**70}"], ([[2**70]],)),
    (TokenizerError, ["prompts[1]", "no tokenizer", "token ids"], ([[1], "text"],)),
    (
        ContextLengthError,
        ["prompts[0] has 60 tokens", "gen_length is 6", "66", "max_model_len=64: shorten one"],
        ([[1] * 60], GREEDY),
    ),
    (
        InvalidRequestError,
        ["sampling_params has 2 entries for 3 prompts"],
        ([[1]] * 3, [GREEDY] * 2),
    ),
    (InvalidRequestError, ["sampling_params has 0 entries"], ([[1]], [])),
    (InvalidRequestError, ["sparse_configs has 3 entries"], ([[1]], GREEDY, [None] * 3)),
    (InvalidParameterError, ["sampling_params[1]", "dict"], ([[1]] * 2, [GREEDY, {}])),
    (InvalidParameterError, ["sampling_params[0]", "NoneType"], ([[1]], [None])),
    (InvalidParameterError, ["sampling_params must be", "dict"], ([[1]], {})),
    (InvalidParameterError, ["sampling_params must be", "SparseConfig"], ([[1]], SparseConfig())),
    (InvalidParameterError, ["sparse_configs must be", "float"], ([[1]], GREEDY, 0.5)),
    (InvalidParameterError, ["sparse_configs[0]", "SamplingParams"], ([[1]], GREEDY, [GREEDY])),
    (
        InvalidParameterError,
        ["SparseConfig", "cache='dual'", "exclude each other"],
        ([[1]], SamplingParams(cache="dual", gen_length=6), SparseConfig()),
    ),
    (
        CapacityError,
        ["4 K,V pages of 16 tokens", "kv_pages=3"],
        ([[1] * 50], SamplingParams(cache="dual", gen_length=6)),
    ),
    (InvalidParameterError, ["stop", "tokenizer"], ([[1]], SamplingParams(stop="x", gen_length=6))),
    (
        InvalidParameterError,
        ["logit_bias has token id 61", "vocabulary 0..60"],
        ([[1]], SamplingParams(logit_bias={61: 1, 3: 1}, gen_length=6)),
    ),
]


@pytest.mark.parametrize(("kind", "parts", "arguments"), BAD_REQUESTS, ids=lambda v: str(v)[:30])
def test_requests(
    llm: LLM, kind: type[DllmServeError], parts: list[str], arguments: tuple[Any, ...]
) -> None:
    fails(kind, parts, lambda: llm.generate(*arguments, use_tqdm=False))
    check_idle(llm)


@pytest.mark.parametrize("bad", [[], [99], [1] * 64])
def test_one_bad_request_stops_the_batch_before_anything_runs(
    llm: LLM, bad: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ran(_: object) -> None:
        raise AssertionError("a step ran")

    monkeypatch.setattr(llm._engine._runner, "execute", ran)
    with pytest.raises(InvalidRequestError):
        llm.generate([[1, 2], [3], bad], GREEDY, use_tqdm=False)
    check_idle(llm)
    monkeypatch.undo()
    assert len(llm.generate([[1, 2]], GREEDY, use_tqdm=False)) == 1


def test_empty_lists(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert llm.generate([]) == []
    assert llm.generate([], [], []) == []
    assert llm.generate([], GREEDY, SparseConfig(), use_tqdm=True) == []
    assert capsys.readouterr().err == ""


def test_one_value_or_a_list_or_nothing(llm: LLM) -> None:
    prompts = [[1], [2]]
    one = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert llm.generate(prompts, [GREEDY, GREEDY], None, use_tqdm=False) == one
    assert llm.generate(tuple(prompts), (GREEDY, GREEDY), [None, None], use_tqdm=False) == one
    off = SparseConfig(enabled=False)
    assert llm.generate([(1,), range(2, 3)], GREEDY, off, use_tqdm=False) == one


def test_large_numbers_that_are_allowed(llm: LLM) -> None:
    """Values without an upper limit must run, not overflow somewhere below."""
    for params, sparse in (
        (SamplingParams(top_k=10**30, gen_length=4, steps=4), None),
        (SamplingParams(factor=1e308, unmask="factor", gen_length=4), None),
        (SamplingParams(entropy_bound=1e308, unmask="entropy_bound", gen_length=4), None),
        (SamplingParams(cfg_scale=1e30, gen_length=4, temperature=0.0), None),
        (GREEDY, SparseConfig(default_block_len=10**30)),
        (GREEDY, SparseConfig(delay_step=10**30)),
        (GREEDY, SparseConfig(pool_kernel=10**30)),
        (GREEDY, SparseConfig(pool_kernel=4)),
    ):
        output = llm.generate([[1, 2, 3]], params, sparse, use_tqdm=False)[0]
        assert output["token_ids"]
        assert 60 not in output["token_ids"]


def test_stream_checks_too(llm: LLM) -> None:
    fails(PromptError, ["prompt is empty"], lambda: list(llm.stream([])))
    fails(PromptError, ["prompt[0] is 99"], lambda: list(llm.stream([99], GREEDY)))
    fails(PromptError, ["prompt must be", "int"], lambda: list(llm.stream(3)))  # type: ignore[arg-type]
    fails(TokenizerError, ["prompt is a text"], lambda: list(llm.stream("text")))
    wrong: Any = {"enabled": True}
    fails(InvalidParameterError, ["sparse_config"], lambda: list(llm.stream([1], GREEDY, wrong)))
    fails(InvalidParameterError, ["sampling_params"], lambda: list(llm.stream([1], wrong)))
    check_idle(llm)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nsecond line"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
def test_out_of_memory_in_a_step(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    expected = llm.generate([[1, 2]], GREEDY, use_tqdm=False)

    def full(_: object) -> None:
        raise error

    monkeypatch.setattr(llm._engine._runner, "execute", full)
    parts = [
        str(error).splitlines()[0],
        "reduce max_model_len",
        "use sparse attention",
        "enable tensor parallelism",
        "max_num_seqs",
    ]
    many = [[1, 2]] * 100
    fails(OutOfMemoryError, parts, lambda: llm.generate(many, GREEDY, use_tqdm=False))
    with pytest.raises(MemoryError):
        list(llm.stream([1], GREEDY))
    check_idle(llm)
    monkeypatch.undo()
    assert llm.generate([[1, 2]], GREEDY, use_tqdm=False) == expected


def test_other_failures_pass_through_and_leave_nothing_behind(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (RuntimeError("a kernel failed"), KeyboardInterrupt()):

        def broken(_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(llm._engine._runner, "execute", broken)
        with pytest.raises(type(error)):
            llm.generate([[1], [2]], GREEDY, use_tqdm=False)
        check_idle(llm)
        monkeypatch.undo()
    assert llm.generate([[1]], GREEDY, use_tqdm=False)


BUILTINS = {
    "InvalidRequestError": ValueError,
    "InvalidParameterError": ValueError,
    "PromptError": ValueError,
    "DecisionError": ValueError,
    "ContextLengthError": ValueError,
    "CapacityError": ValueError,
    "UnknownOptionError": TypeError,
    "ConfigError": ValueError,
    "ModelNotFoundError": FileNotFoundError,
    "UnsupportedModelError": ValueError,
    "WeightsError": ValueError,
    "TokenizerError": ValueError,
    "OutOfMemoryError": MemoryError,
    "OverloadedError": RuntimeError,
    "QuotaError": RuntimeError,
    "DeadlineError": TimeoutError,
    "JobStoreError": RuntimeError,
    "EngineError": RuntimeError,
    "EngineStartError": RuntimeError,
    "EngineDiedError": RuntimeError,
    "RankError": RuntimeError,
    "RequestAbortedError": RuntimeError,
}


def test_error_classes_are_also_builtin_ones() -> None:
    classes = {
        name: kind
        for name, kind in vars(errors_module).items()
        if isinstance(kind, type) and issubclass(kind, DllmServeError)
    }
    assert set(BUILTINS) | {"DllmServeError", "ModelError"} == set(classes)
    for name, builtin in BUILTINS.items():
        assert issubclass(classes[name], builtin)
    for name in ("ModelNotFoundError", "UnsupportedModelError", "WeightsError", "TokenizerError"):
        assert issubclass(classes[name], errors_module.ModelError)
    codes = [kind.code for kind in classes.values()]
    assert len(set(codes)) == len(codes)
    assert all(400 <= kind.http_status < 600 for kind in classes.values())
