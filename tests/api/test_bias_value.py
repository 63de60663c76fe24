"""SamplingParams.logit_bias as a value: natural to read, never changed, safe to hash and copy."""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any

import pytest

from dllmserve import SamplingParams


def params(bias: Any) -> SamplingParams:
    return SamplingParams(logit_bias=bias)


def test_it_is_a_sorted_copy() -> None:
    given = {9: 1, 2: -100}
    bias = params(given).logit_bias
    given[9] = 5
    assert bias == {2: -100.0, 9: 1.0}
    assert bias is not None
    assert list(bias) == [2, 9]
    assert all(type(value) is float for value in bias.values())
    assert repr(bias) == "{2: -100.0, 9: 1.0}"
    assert params(MappingProxyType({2: -100, 9: 1})).logit_bias == bias


def test_an_empty_one_is_none() -> None:
    assert params({}).logit_bias is None
    assert params({}) == SamplingParams()
    assert params({1: 0}).logit_bias == {1: 0.0}


def test_equal_ones_hash_alike() -> None:
    one, other = params({1: 2, 3: 4}), params({3: 4.0, 1: 2.0})
    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other, params({1: 2}), SamplingParams()}) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda bias: bias.__setitem__(1, 3.0),
        lambda bias: bias.__delitem__(1),
        lambda bias: bias.update({1: 3.0}),
        lambda bias: bias.pop(1),
        lambda bias: bias.popitem(),
        lambda bias: bias.setdefault(5, 1.0),
        lambda bias: bias.clear(),
        lambda bias: bias.__ior__({5: 1.0}),
    ],
)
def test_it_cannot_be_changed(change: Callable[[Any], Any]) -> None:
    given = params({1: 2})
    with pytest.raises(TypeError, match="cannot be changed"):
        change(given.logit_bias)
    assert given.logit_bias == {1: 2.0}


def test_copies() -> None:
    given = params({1: 2, 70: -3})
    for copied in (
        copy.deepcopy(given),
        copy.copy(given),
        pickle.loads(pickle.dumps(given)),
        replace(given, steps=128),
        SamplingParams(**asdict(given)),
    ):
        assert copied == given
        assert type(copied.logit_bias) is type(given.logit_bias)
    assert json.loads(json.dumps(asdict(given)))["logit_bias"] == {"1": 2.0, "70": -3.0}
