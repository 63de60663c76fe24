"""Settings: what their fields become, from text, files and built-in lists."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from dllmserve._values import NotGiven
from dllmserve.catalog import CACHES, RULES
from dllmserve.errors import ConfigError, DllmServeError, InvalidParameterError, UnknownOptionError
from dllmserve.presets import PRESETS
from dllmserve.sampling_params import SamplingParams, cache_names
from dllmserve.tools.evaluation.settings import (
    SAMPLING_FIELDS,
    SUITES,
    Setting,
    check_names,
    describe,
    make_setting,
    parse_setting,
    read_settings,
    suite,
)
from tests.helpers import PLAIN


def test_every_field_may_be_set() -> None:
    # sparse has fields of its own
    assert {*SAMPLING_FIELDS} == {f.name for f in fields(SamplingParams)} - {"sparse"}


@pytest.mark.parametrize(
    ("given", "gen_length", "steps"),
    [
        ({}, 64, 64),
        ({}, 20, 20),
        ({}, 40, 64),  # blocks of 32 and 8, with 32 steps each, as dllmserve generate does
        ({"tokens_per_step": 4}, 64, 16),
        ({"tokens_per_step": 4}, 32, 8),
        ({"tokens_per_step": 5}, 32, 7),
        ({"tokens_per_step": 100}, 64, 2),
        ({"tokens_per_step": 4, "block_length": 16}, 64, 16),
        ({"tokens_per_step": 4, "block_length": None}, 64, 16),
        ({"tokens_per_step": 4, "sparse": {"default_block_len": 16}}, 64, 16),
        ({"steps": 7}, 64, 7),
    ],
)
def test_steps(given: dict[str, Any], gen_length: int, steps: int) -> None:
    assert make_setting("a", given).params(gen_length).steps == steps


def test_lengths_and_defaults() -> None:
    params = Setting("a").params()
    assert (params.gen_length, params.temperature, params.block_length) == (64, 0.0, 32)
    assert Setting("a").params(48).gen_length == 48
    assert Setting("a", {"gen_length": 16}).params(48).gen_length == 16
    assert make_setting("a", {"sparse": True}).params().block_length is None


def test_presets_bring_their_own_blocks_and_steps() -> None:
    params = Setting("a", {"quality": "balanced"}).params(48)
    assert params == SamplingParams(temperature=0.0, gen_length=48, quality="balanced")


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("a:", {}),
        ("a b : unmask=threshold threshold=0.8", {"unmask": "threshold", "threshold": 0.8}),
        ("a: gen-length=16 steps=4", {"gen_length": 16, "steps": 4}),
        ("a: block_length=none ignore_eos=True", {"block_length": None, "ignore_eos": True}),
        ("a: cache=none", {"cache": "none"}),
        ("a: stop='x y'  seed=3", {"stop": "x y", "seed": 3}),
        ("a: quality=none stop='[x]'", {"quality": None, "stop": "[x]"}),
        ('a: stop=["x","y z"] top_k=2', {"stop": ["x", "y z"], "top_k": 2}),
        ('a: stop="x\\n"', {"stop": "x\n"}),
        ('a: logit_bias={"5": -3, "7": 1.5}', {"logit_bias": {5: -3, 7: 1.5}}),
        ("a: tokens_per_step=4", {"tokens_per_step": 4}),
        ("a: sparse=true", {"sparse": {}}),
        ("a: sparse.retention_ratio=0.3", {"sparse": {"retention_ratio": 0.3}}),
        (
            "a: delay_step=2 head-select=false",
            {"sparse": {"delay_step": 2, "head_select": False}},
        ),
        ("a: sparse=false", {}),
    ],
)
def test_parse(text: str, given: dict[str, Any]) -> None:
    setting = parse_setting(text)
    assert setting.given() == given
    assert make_setting(setting.name, json.loads(json.dumps(setting.given()))) == setting
    assert not text.startswith("a b") or setting.name == "a b"


BAD_TEXTS: list[tuple[str, type[Exception], str]] = [
    ("fast", ConfigError, "a setting is 'NAME: field=value ...', for example 'fast: unmask"),
    (" : steps=2", ConfigError, "a setting is 'NAME: field=value"),
    ("a: thresold=1", UnknownOptionError, "setting 'a' got an unknown option 'thresold'; did you"),
    ("a: max_new_tokens=5", UnknownOptionError, "'max_new_tokens'; did you mean 'gen_length'"),
    ("a: max_tokens=5 gen_length=6", InvalidParameterError, "'a': max_tokens=5 and gen_length=6 "),
    ("a: threshold=x", InvalidParameterError, r"setting 'a': threshold must be .*, got 'x' \(str"),
    ("a: threshold=2", InvalidParameterError, r"setting 'a': threshold must be a number in \[0, 1"),
    ("a: steps", ConfigError, "setting 'a': needs field=value, got 'steps'"),
    ("a: stop=''", InvalidParameterError, "stop strings must be non-empty strings, got ''"),
    ("a: stop=''[1]", ConfigError, r"stop goes on with '\[1\]' behind its value"),
    ("a: steps= 3", ConfigError, "setting 'a': needs field=value, got '3'"),
    ("a: steps=3 steps=4", ConfigError, "setting 'a': steps is given twice"),
    ("a: steps=3 tokens_per_step=4", InvalidParameterError, "exclude each other"),
    (
        "a: steps_per_block=3 tokens_per_step=4",
        InvalidParameterError,
        "steps_per_block and tokens_per_step=4 exclude each other",
    ),
    ("a: tokens_per_step=0", InvalidParameterError, "tokens_per_step must be an integer >= 1"),
    ("a: unmask=factor tokens_per_step=2", InvalidParameterError, "works with unmask='steps' only"),
    ("a: sparse=false delay_step=3", ConfigError, "sparse=false and delay_step exclude each other"),
    ("a: sparse=maybe", ConfigError, "sparse must be true, false or an object"),
    ("a: retention_ratio=2", InvalidParameterError, r"retention_ratio must be a number in \[0, 1"),
    ("a: logit_bias={1:2}", ConfigError, "setting 'a': logit_bias is not JSON"),
    ('a: logit_bias={"1":2,"1":3}', ConfigError, "logit_bias gives '1' twice"),
    ("a: stop='x'y", ConfigError, "stop goes on with 'y' behind its value"),
]


@pytest.mark.parametrize(("text", "kind", "message"), BAD_TEXTS, ids=lambda v: str(v)[:40])
def test_bad_texts(text: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        parse_setting(text)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"tokens_per_step": 1}, 4),
        ({"tokens_per_step": 2}, 2),
        ({"tokens_per_step": 3}, 2),
        ({"tokens_per_step": 8}, 1),
        ({"tokens_per_step": 4, "block_length": 16}, 4),
        ({"steps_per_block": 3}, 3),
        ({}, None),
    ],
)
def test_the_pace_of_models_with_blocks(given: dict[str, Any], steps: int | None) -> None:
    """steps are the whole answer's, and such models have no use for a number of those."""
    setting = make_setting("x", given)
    assert setting.on(PLAIN) is setting
    on = setting.on(replace(PLAIN, geometry="block", block_length=4))
    params = on.params(64)
    assert params.steps_per_block == steps and isinstance(params.steps, NotGiven)
    assert on.given() == given and on.name == "x"


def test_the_pace_of_an_answer_that_is_shorter_than_a_block() -> None:
    """Whole windows are filled to their end, and other blocks end with the answer."""
    setting = make_setting("x", {"tokens_per_step": 2})
    windows = replace(PLAIN, geometry="block", block_length=32)
    short, frames = replace(windows, short_blocks=True), replace(windows, causal_context=True)
    for spec, steps in ((windows, 16), (short, 4), (frames, 4)):
        assert setting.on(spec).params(8).steps_per_block == steps
        assert setting.on(spec).params(64).steps_per_block == 16


def test_an_autoregressive_model_has_one_pace() -> None:
    spec = replace(PLAIN, geometry="causal", block_length=1)
    assert make_setting("x", {"tokens_per_step": 4}).on(spec).params(64).steps_per_block == 1


def test_a_setting_changes_its_base() -> None:
    base = make_setting("base", {"cache": "dual", "temperature": 0.5, "tokens_per_step": 4})
    own = parse_setting("own: temperature=0.1", base)
    assert own.given() == {"cache": "dual", "temperature": 0.1, "tokens_per_step": 4}
    # what another rule, or another way to say the same, has no use for
    assert parse_setting("own: steps=3", base).params(64).steps == 3
    assert parse_setting("own: unmask=threshold", base).tokens_per_step is None
    counted = make_setting("base", {"steps": 8})
    assert parse_setting("own: tokens_per_step=2", counted).params(64).steps == 32
    paced = make_setting("base", {"steps_per_block": 2})
    assert parse_setting("own: tokens_per_step=2", paced).params(64).steps_per_block is None
    assert parse_setting("own: steps_per_block=3", base).tokens_per_step is None


def test_a_setting_changes_the_sparse_attention_of_its_base() -> None:
    base = make_setting("base", {"retention_ratio": 0.3})
    assert parse_setting("own: delay_step=2", base).sparse == {
        "retention_ratio": 0.3,
        "delay_step": 2,
    }
    assert parse_setting("own:", base).sparse == {"retention_ratio": 0.3}
    assert parse_setting("own: sparse=false", base).sparse is None
    assert make_setting("own", {"sparse": {"enabled": False}}, base).sparse is None


def test_read(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(
        '{"careful": {}, "fast": {"unmask": "threshold", "sparse": {"delay_step": 2}}}\n'
    )
    careful, fast = read_settings(path, Setting("base", {"temperature": 0.3}))
    assert careful == Setting("careful", {"temperature": 0.3})
    assert fast.given() == {
        "temperature": 0.3,
        "unmask": "threshold",
        "sparse": {"delay_step": 2},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold an object of settings"),
        ("{}", "must hold an object of settings"),
        ("{", "settings.json is not JSON"),
        ('{"a": {}} {}', "goes on behind its object with '{}'"),
        ('{"a": {}, "a": {}}', "settings.json gives 'a' twice"),
        ('{"a": 3}', "settings.json: setting 'a' must be an object of fields, got 3"),
        ('{"a": {"thresold": 1}}', "settings.json: setting 'a' got an unknown option"),
        ('{"a": {"sparse": {"keep": 1}}}', "sparse got an unknown option 'keep'"),
        ('{" ": {}}', "needs a name"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(DllmServeError, match=message):
        read_settings(path)


@pytest.mark.parametrize("name", SUITES)
def test_suites(name: str) -> None:
    settings = suite(name)
    check_names(settings)
    for setting in settings:
        for length in (16, 32, 64, 100):
            assert setting.params(length).gen_length == length


def test_the_frontier() -> None:
    settings = {setting.name: setting for setting in suite("frontier")}
    assert next(iter(settings)) == "one token a step"
    assert settings["8 tokens a step"].params(64).steps == 8
    # a rule that is for one kind of model alone is not compared
    rules = {name for name, info in RULES.items() if not info.noise}
    assert {setting.params(64).unmask for setting in settings.values()} == rules
    cached = {setting.name: setting for setting in suite("caches")}
    # the caches of full attention
    named = {name for name in cache_names() if not CACHES[name].windowed}
    assert {setting.params(64).cache for setting in cached.values()} == named
    assert cached["sparse 0.5"].sparse == {"retention_ratio": 0.5}
    assert [setting.params(64).quality for setting in suite("quality")] == list(PRESETS)
    base = Setting("base", {"block_length": 16, "unmask": "threshold"})
    assert suite("frontier", base)[1].params(64).unmask == "steps"
    with pytest.raises(ConfigError, match="suite must be one of 'frontier', 'caches', 'quality'"):
        suite("frontiers")


def test_names_differ() -> None:
    with pytest.raises(ConfigError, match="two settings are named 'a'"):
        check_names([Setting("a"), Setting("b"), Setting("a")])


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "one token a step"),
        ({"tokens_per_step": 4}, "4 tokens a step"),
        ({"steps": 7}, "7 steps"),
        ({"steps_per_block": 1}, "1 step a block"),
        ({"unmask": "threshold"}, "threshold 0.9"),
        ({"unmask": "threshold", "threshold": 0.8, "cache": "dual"}, "threshold 0.8, dual"),
        ({"unmask": "factor", "gen_length": 128}, "factor 1, gen_length 128"),
        ({"retention_ratio": 0.3}, "one token a step, sparse 0.3"),
        ({"temperature": 0.5, "seed": 3}, "one token a step, temperature 0.5, seed 3"),
    ],
)
def test_describe(given: dict[str, Any], name: str) -> None:
    assert describe(make_setting("x", given)) == name
