"""max_tokens is another name of gen_length, wherever parameters are given, copied or sent."""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from dllmserve import LLM, SamplingParams
from dllmserve.errors import CapacityError, ContextLengthError, InvalidParameterError
from dllmserve.process.messages import plain
from dllmserve.server.fields import NativeFields
from dllmserve.tools.evaluation.settings import Setting, make_setting, parse_setting
from dllmserve.tools.lm_eval.asking import read_request, split_options
from tests.conftest import Engines


def lengths(params: SamplingParams) -> tuple[int, int, str]:
    return params.max_tokens, params.gen_length, params.length_name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (64, 128, "gen_length")),
        ({"max_tokens": 8}, (8, 8, "max_tokens")),
        ({"max_tokens": 64}, (64, 64, "max_tokens")),
        ({"max_tokens": 128}, (128, 128, "max_tokens")),
        ({"max_tokens": 8192}, (8192, 8192, "max_tokens")),
        ({"gen_length": 32}, (32, 32, "gen_length")),
        ({"gen_length": 64}, (64, 64, "gen_length")),
        ({"gen_length": 128}, (128, 128, "gen_length")),
        ({"max_tokens": 16, "gen_length": 16}, (16, 16, "gen_length")),
    ],
)
def test_one_length(given: dict[str, int], expected: tuple[int, int, str]) -> None:
    assert lengths(SamplingParams(**given)) == expected


def test_by_position_its_default_only_fills_the_place() -> None:
    assert SamplingParams(0.0, 64, False, 40).gen_length == 40
    assert SamplingParams(0.0, 64).gen_length == 64
    assert SamplingParams(0.0, 32, False).gen_length == 32
    with pytest.raises(InvalidParameterError, match="max_tokens=32 and gen_length=40"):
        SamplingParams(0.0, 32, False, 40)


@pytest.mark.parametrize(("tokens", "length"), [(8, 16), (64, 16), (8, 128), (64, 128)])
def test_two_lengths_are_an_error(tokens: int, length: int) -> None:
    text = (
        f"max_tokens={tokens} and gen_length={length} contradict each other: gen_length counts for "
        "diffusion models, .*max_tokens for autoregressive ones. Give one of them"
    )
    with pytest.raises(InvalidParameterError, match=text):
        SamplingParams(max_tokens=tokens, gen_length=length)
    with pytest.raises(InvalidParameterError, match=text):
        SamplingParams(gen_length=length, max_tokens=tokens, quality="fast")


@pytest.mark.parametrize("given", [0, -1, 8193, 10**8, 1.5, "8", True, None])
def test_bounds_speak_of_the_name_that_was_given(given: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        SamplingParams(max_tokens=given)
    assert str(caught.value).startswith("max_tokens must be an integer in [1, 8192], got ")


COPIES: dict[str, Callable[[SamplingParams], SamplingParams]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda params: pickle.loads(pickle.dumps(params)),
    "replace": lambda params: replace(params, temperature=0.5),
    "twice": lambda params: replace(replace(params, temperature=0.5), top_k=3),
    "asdict": lambda params: SamplingParams(**asdict(params)),
    "json": lambda params: SamplingParams(**json.loads(json.dumps(asdict(params)))),
    "wire": lambda params: msgspec.msgpack.decode(
        msgspec.msgpack.encode(params, enc_hook=plain), type=SamplingParams
    ),
}
MADE: list[dict[str, Any]] = [
    {},
    {"max_tokens": 8},
    {"max_tokens": 64},
    {"max_tokens": 128},
    {"gen_length": 32},
    {"gen_length": 64},
    {"max_tokens": 16, "gen_length": 16},
    {"quality": "balanced"},
    {"quality": "balanced", "max_tokens": 100},
    {"quality": "exact", "gen_length": 48},
]


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("given", MADE, ids=str)
def test_copies(way: str, given: dict[str, Any]) -> None:
    """A copy has the same lengths, and a later replace sets the name that was given."""
    made = SamplingParams(**given)
    found = COPIES[way](made)
    assert found.gen_length == made.gen_length and found.max_tokens in (made.gen_length, 64)
    names = {"max_tokens", "gen_length"} & set(given)
    plain = way in ("asdict", "json", "wire") or len(names) > 1
    for name in () if plain else names or {"max_tokens", "gen_length"}:
        for length in (4, 128):
            assert replace(found, **{name: length}).gen_length == length
    both = replace(found, max_tokens=5, gen_length=5)
    assert (both.max_tokens, both.gen_length) == (5, 5)
    with pytest.raises(InvalidParameterError, match="max_tokens=5 and gen_length=6"):
        replace(found, max_tokens=5, gen_length=6)


def test_the_name_is_lost_nowhere_it_matters() -> None:
    for way in ("copy", "deepcopy", "pickle", "replace"):
        assert COPIES[way](SamplingParams(max_tokens=8)).length_name == "max_tokens"
        assert COPIES[way](SamplingParams(max_tokens=64)).length_name == "max_tokens"
        assert COPIES[way](SamplingParams(gen_length=9)).length_name == "gen_length"


@pytest.mark.parametrize("given", MADE, ids=str)
def test_as_a_dictionary_all_is_plain(given: dict[str, Any]) -> None:
    found = asdict(SamplingParams(**given))
    assert type(found["max_tokens"]) is type(found["gen_length"]) is int
    for write, read in (
        (yaml.safe_dump, yaml.safe_load),
        (json.dumps, json.loads),
        (msgspec.msgpack.encode, msgspec.msgpack.decode),
    ):
        assert SamplingParams(**read(write({**found, "stop": None}))) == SamplingParams(**given)


def test_both_names_are_equal() -> None:
    one, other = SamplingParams(max_tokens=8), SamplingParams(gen_length=8)
    assert one == other and hash(one) == hash(other)
    assert one != SamplingParams() and one != SamplingParams(max_tokens=9)
    assert "max_tokens=64, ignore_eos=False, gen_length=128" in repr(SamplingParams())
    assert "max_tokens=8, ignore_eos=False, gen_length=8" in repr(one)


def test_presets_take_it_for_the_length() -> None:
    assert SamplingParams(quality="exact", max_tokens=48) == SamplingParams(
        quality="exact", gen_length=48
    )
    assert SamplingParams(quality="exact", max_tokens=48).steps == 64
    assert SamplingParams(quality="fast", max_tokens=48).gen_length == 48


def test_of_two_names_the_one_that_is_changed_counts() -> None:
    every: list[dict[str, int]] = [{}, {"max_tokens": 9}, {"gen_length": 9}]
    for given in [*every, {"max_tokens": 9, "gen_length": 9}]:
        made = SamplingParams(**given)
        for name in ("max_tokens", "gen_length"):
            for length in (8, 9, 64, 65, 128):
                changed = replace(made, **{name: length})
                assert (changed.gen_length, changed.length_name) == (length, name), given
                assert replace(changed, seed=1).gen_length == length
                assert replace(changed, seed=1).length_name == name


def test_the_engine(engines: Engines, checkpoints: dict[str, Path]) -> None:
    llm: LLM = engines(checkpoints["llada"], max_model_len=64, kv_pages=3, page_size=16)
    params = SamplingParams(temperature=0.0, max_tokens=6, steps=6, ignore_eos=True)
    (output,) = llm.generate([[1, 2]], params, use_tqdm=False)
    assert len(output["token_ids"]) == 6
    assert (
        output
        == llm.generate(
            [[1, 2]],
            SamplingParams(temperature=0.0, gen_length=6, steps=6, ignore_eos=True),
            use_tqdm=False,
        )[0]
    )
    for name in ("max_tokens", "gen_length"):
        long = SamplingParams(**{name: 60})
        with pytest.raises(ContextLengthError, match=f"has 5 tokens and {name} is 60: 65 together"):
            llm.generate([[1] * 5], long, use_tqdm=False)
        wide = SamplingParams(**{name: 50}, cache="dual")
        with pytest.raises(CapacityError, match=f"shorten the prompt or {name}"):
            llm.generate([[1] * 5], wide, use_tqdm=False)


def test_bodies() -> None:
    assert NativeFields(max_tokens=8).sampling_params().gen_length == 8
    assert NativeFields(max_tokens=8, gen_length=8).sampling_params().gen_length == 8
    with pytest.raises(InvalidParameterError, match="max_tokens=8 and gen_length=9"):
        NativeFields(max_tokens=8, gen_length=9).sampling_params()


def test_settings() -> None:
    """A setting's own length comes before an item's, by either name, and before its base's."""
    assert Setting("a", {"max_tokens": 16}).params(48).gen_length == 16
    assert Setting("a", {"max_tokens": 64}).params(48).gen_length == 64
    assert parse_setting("a: max-tokens=16").params(48).steps == 16
    for base, own, length in (
        ({"gen_length": 16}, {"max_tokens": 32}, 32),
        ({"max_tokens": 16}, {"gen_length": 32}, 32),
        ({"max_tokens": 16}, {"temperature": 0.5}, 16),
    ):
        assert make_setting("a", own, make_setting("base", base)).params(48).gen_length == length
    with pytest.raises(InvalidParameterError, match="setting 'a': max_tokens=8 and gen_length=9"):
        make_setting("a", {"max_tokens": 8, "gen_length": 9})


def test_lm_eval() -> None:
    _, base = split_options("tiny", None, None, {"max_tokens": 24})
    assert read_request({}, base).params.gen_length == 24
    assert read_request({"max_gen_toks": 16}, base).params.gen_length == 16
    assert read_request({"max_tokens": 12}, base).params.gen_length == 12
