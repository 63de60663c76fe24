"""What lm-eval asks for, in this engine's words; needs no lm-eval."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from dllmserve.config import EngineConfig
from dllmserve.errors import ConfigError, DllmServeError, InvalidParameterError, UnknownOptionError
from dllmserve.tools.evaluation.settings import Setting
from dllmserve.tools.lm_eval import asking
from dllmserve.tools.lm_eval.asking import cut, read_request, split_options


def test_what_it_imports() -> None:
    names = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse(Path(asking.__file__).read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert not {name for name in names if name.startswith("lm_eval")}


def test_model_args() -> None:
    config, base = split_options(
        "some/model",
        None,
        "cpu",
        {
            "dtype": "bfloat16",
            "max_num_seqs": 4,
            "engine_seed": 7,
            "seed": 3,
            "unmask": "threshold",
            "threshold": 0.8,
            "retention_ratio": 0.3,
        },
    )
    assert config == EngineConfig(
        model="some/model",
        device="cpu",
        dtype="bfloat16",
        max_num_seqs=4,
        seed=7,
        trust_remote_code=False,
    )
    assert base.given() == {
        "seed": 3,
        "unmask": "threshold",
        "threshold": 0.8,
        "sparse": {"retention_ratio": 0.3},
    }


def test_defaults_of_model_args() -> None:
    config, base = split_options(None, None, None, {})
    assert config == EngineConfig(trust_remote_code=False) and base.given() == {}
    # what lm-eval says where nobody gave a device, GPU or not
    assert split_options(None, "tiny", "cuda:0", {})[0].device == "auto"
    assert split_options(None, "tiny", "cuda:1", {})[0].device == "cuda:1"
    assert split_options("tiny", "tiny", None, {"trust_remote_code": True})[0].trust_remote_code


@pytest.mark.parametrize(
    ("names", "options", "kind", "message"),
    [
        (("a", "b"), {}, ConfigError, "give pretrained='a' or model='b', not both"),
        (("a", None), {"thresold": 1}, UnknownOptionError, "did you mean 'threshold'"),
        (("a", None), {"max_new_tokens": 1}, UnknownOptionError, "did you mean 'gen_length'"),
        (("a", None), {"dtype": "int8"}, ConfigError, "dtype must be one of"),
        (("a", None), {"steps": 0}, InvalidParameterError, "setting 'model_args': steps must be"),
    ],
)
def test_bad_model_args(
    names: tuple[str, str | None],
    options: dict[str, Any],
    kind: type[DllmServeError],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        split_options(*names, None, options)


@pytest.mark.parametrize(
    ("base", "given", "expected"),
    [
        ({}, {}, {"gen_length": 256, "steps": 256, "temperature": 0.0, "stop": None}),
        ({}, {"max_gen_toks": 32}, {"gen_length": 32, "steps": 32}),
        ({}, {"max_new_tokens": 16, "max_tokens": 32}, {"gen_length": 16}),
        ({"gen_length": 64}, {}, {"gen_length": 64, "steps": 64}),
        ({"gen_length": 64}, {"max_gen_toks": 32}, {"gen_length": 32}),
        ({"steps": 8}, {"max_gen_toks": 32}, {"gen_length": 32, "steps": 8}),
        ({}, {"temperature": 0.7}, {"temperature": 0.7}),
        ({}, {"temperature": 0.7, "do_sample": False}, {"temperature": 0.0}),
        ({"temperature": 0.5}, {"do_sample": False}, {"temperature": 0.0}),
        ({"temperature": 0.5}, {"do_sample": True}, {"temperature": 0.5}),
        ({}, {"do_sample": True}, {"temperature": 1.0}),
        ({}, {"do_sample": True, "temperature": 0.0}, {"temperature": 0.0}),
        ({"temperature": 0.5}, {}, {"temperature": 0.5}),
        ({}, {"top_k": -1, "top_p": 0.9, "seed": None}, {"top_k": 0, "top_p": 0.9, "seed": None}),
        ({}, {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}, {"top_k": 0}),
        ({}, {"until": ["\n", ""]}, {"stop": ("\n",)}),
        ({}, {"until": "Q:"}, {"stop": ("Q:",)}),
        ({"stop": "END"}, {"until": ["\n"]}, {"stop": ("\n", "END")}),
        ({"unmask": "threshold"}, {"threshold": 0.7, "cache": "dual"}, {"threshold": 0.7}),
    ],
)
def test_requests(base: dict[str, Any], given: dict[str, Any], expected: dict[str, Any]) -> None:
    params = read_request(given, Setting("base", base)).params
    assert {name: getattr(params, name) for name in expected} == expected


def test_tokens_per_step_follow_the_request() -> None:
    base = Setting("base", tokens_per_step=4)
    assert read_request({"max_gen_toks": 64}, base).params.steps == 16
    assert read_request({"max_gen_toks": 64, "tokens_per_step": 8}, base).params.steps == 8


def test_more_ends_than_the_engine_takes() -> None:
    ends = [f"end {n:02}" for n in range(40)]
    ask = read_request({"until": ends}, Setting("base"))
    assert ask.params.stop_strings == tuple(ends[:16]) and ask.until == tuple(ends)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"num_beams": 4}, InvalidParameterError, "num_beams=4 is not supported: leave it out"),
        ({"min_p": 0.1}, InvalidParameterError, "min_p=0.1 is not supported"),
        ({"temprature": 1}, UnknownOptionError, "did you mean 'temperature'"),
        ({"temperature": -1}, InvalidParameterError, "setting 'gen_kwargs': temperature must be"),
    ],
)
def test_bad_requests(given: dict[str, Any], kind: type[DllmServeError], message: str) -> None:
    with pytest.raises(kind, match=message):
        read_request(given, Setting("base"))


@pytest.mark.parametrize(
    ("text", "until", "expected"),
    [
        ("6 54 98\nSort", ["Q:", "\n"], "6 54 98"),
        ("a\n\nQ: b", ["Q:", "\n\n"], "a"),
        ("Q: b", ["Q:"], ""),
        ("a ", ["\n"], "a "),
        ("abc", [], "abc"),
    ],
)
def test_cut(text: str, until: list[str], expected: str) -> None:
    assert cut(text, until) == expected


def test_repeats_draw_differently_and_repeatably() -> None:
    ask = read_request({"temperature": 1.0, "seed": 3}, Setting("base"))
    seeds = [ask.seeded(context, repeat).seed for context in ("a", "b") for repeat in (0, 1)]
    assert len(set(seeds)) == 4
    assert seeds == [ask.seeded(c, r).seed for c in ("a", "b") for r in (0, 1)]
    assert read_request({}, Setting("base")).seeded("a", 0).seed is None
