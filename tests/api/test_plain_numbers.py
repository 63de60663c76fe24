"""Numbers, flags and texts of any kind become Python's own, or an error; nothing is cut off."""

from copy import deepcopy
from dataclasses import fields
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from dllmserve import SamplingParams, SparseConfig
from dllmserve.config import EngineConfig
from dllmserve.errors import ConfigError, InvalidParameterError
from dllmserve.process.messages import plain


class Size(IntEnum):
    """An integer of another class."""

    SMALL = 16


INTEGERS = [
    *(kind(16) for kind in (np.int8, np.int16, np.int64, np.uint8, np.uint64)),
    np.array(16),
    torch.tensor(16),
    Size.SMALL,
]
REALS = [
    *(kind(0.5) for kind in (np.float16, np.float32, np.float64)),
    np.array(0.5),
    torch.tensor(0.5),
    torch.tensor(0.5, dtype=torch.bfloat16),
    Fraction(1, 2),
    Decimal("0.5"),
]
NO_INTEGERS = [
    *(np.float64(8.5), np.float64(8.0), np.float32(8), np.array(8.0), torch.tensor(8.0)),
    *(np.array([8]), np.array([[8]]), torch.tensor([8]), np.array([8, 9])),
    *(np.bool_(True), np.array(True), torch.tensor(True)),
    *(Fraction(8), Decimal(8), np.complex64(8), np.datetime64("2026-01-01"), np.str_("8")),
]
NO_REALS = [
    *(np.float32("nan"), np.float64("inf"), torch.tensor(float("nan")), Decimal("Infinity")),
    *(Decimal("sNaN"), Fraction(10**400), np.array([0.5]), torch.tensor([0.5])),
    *(np.bool_(True), torch.tensor(True), np.complex64(0.5), np.str_("0.5"), 0.5j),
]


def shown(value: Any) -> str:
    return f"{type(value).__name__}-{value}"


@pytest.mark.parametrize("value", INTEGERS, ids=shown)
def test_integers(value: Any) -> None:
    params = SamplingParams(
        gen_length=value, steps=value, top_k=value, seed=value, block_length=value
    )
    assert params == SamplingParams(gen_length=16, steps=16, top_k=16, seed=16, block_length=16)
    for name in ("steps", "top_k", "seed", "block_length"):
        assert type(getattr(params, name)) is int
    for length in (params.gen_length, SamplingParams(max_tokens=value).max_tokens):
        assert isinstance(length, int) and type(deepcopy(length)) is int
    assert SamplingParams(max_tokens=value).gen_length == 16
    sparse = SparseConfig(delay_step=value, pool_kernel=value)
    assert sparse == SparseConfig(delay_step=16, pool_kernel=16)
    config = EngineConfig(max_num_seqs=value, max_model_len=value, kv_pages=value, seed=value)
    assert config == EngineConfig(max_num_seqs=16, max_model_len=16, kv_pages=16, seed=16)
    assert type(config.kv_pages) is int
    # an integer is a real number as well
    assert type(SamplingParams(temperature=value).temperature) is int


@pytest.mark.parametrize("value", REALS, ids=shown)
def test_reals(value: Any) -> None:
    params = SamplingParams(temperature=value, top_p=value, threshold=value, cfg_scale=value)
    assert params == SamplingParams(temperature=0.5, top_p=0.5, threshold=0.5, cfg_scale=0.5)
    for name in ("temperature", "top_p", "threshold", "cfg_scale"):
        assert type(getattr(params, name)) is float
    assert type(SparseConfig(retention_ratio=value).retention_ratio) is float
    config = EngineConfig(gpu_memory_utilization=value)
    assert type(config.gpu_memory_utilization) is float


@pytest.mark.parametrize("value", NO_INTEGERS, ids=shown)
def test_what_is_no_integer(value: Any) -> None:
    for name in ("gen_length", "max_tokens", "top_k"):
        with pytest.raises(InvalidParameterError, match=f"{name} must be an integer"):
            SamplingParams(**{name: value})
    with pytest.raises(InvalidParameterError, match="delay_step must be an integer"):
        SparseConfig(delay_step=value)
    with pytest.raises(ConfigError, match="page_size must be an integer"):
        EngineConfig(page_size=value)


@pytest.mark.parametrize("value", NO_REALS, ids=shown)
def test_what_is_no_finite_number(value: Any) -> None:
    with pytest.raises(InvalidParameterError, match="temperature must be a finite number"):
        SamplingParams(temperature=value)
    with pytest.raises(InvalidParameterError, match="retention_ratio must be a number"):
        SparseConfig(retention_ratio=value)
    with pytest.raises(ConfigError, match="gpu_memory_utilization must be a number"):
        EngineConfig(gpu_memory_utilization=value)


def test_flags_and_texts() -> None:
    params = SamplingParams(
        ignore_eos=np.bool_(True), cache=np.str_("dual"), quality=np.array("fast")
    )
    assert params.ignore_eos is True
    assert type(params.cache) is str and type(params.quality) is str
    assert SparseConfig(head_select=torch.tensor(False)).head_select is False
    assert EngineConfig(enforce_eager=np.array(True)).enforce_eager is True


def test_lists() -> None:
    assert SamplingParams(stop=np.array(["a", "bc"])) == SamplingParams(stop=["a", "bc"])
    assert SamplingParams(stop=np.str_("a")).stop == "a"
    assert all(type(text) is str for text in SamplingParams(stop=np.array(["a"])).stop_strings)
    with pytest.raises(InvalidParameterError, match="stop strings must be"):
        SamplingParams(stop=np.array([1, 2]))
    bias = SamplingParams(logit_bias={np.int64(9): np.float32(1.5), np.uint8(2): -3}).logit_bias
    assert bias == {2: -3.0, 9: 1.5}
    assert all(type(t) is int and type(v) is float for t, v in bias.items())
    with pytest.raises(InvalidParameterError, match="token id of logit_bias"):
        SamplingParams(logit_bias={np.float64(9.0): 1})


def test_a_sweep_reaches_the_engines_process() -> None:
    for steps, temperature in zip(np.arange(2, 4), np.linspace(0, 1, 2), strict=True):
        params = SamplingParams(steps=steps, temperature=temperature, max_tokens=np.int16(8))
        sent = msgspec.msgpack.encode(params, enc_hook=plain)
        assert msgspec.msgpack.decode(sent, type=SamplingParams) == params
        values = [getattr(params, field.name) for field in fields(params)]
        assert all(isinstance(value, int | float | str | None) for value in values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "torch.bfloat16", "bfloat16"])
def test_a_dtype_of_torch(dtype: Any) -> None:
    assert EngineConfig(dtype=dtype).dtype == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, np.float32, None, "half"])
def test_other_dtypes(dtype: Any) -> None:
    with pytest.raises(ConfigError, match="dtype must be one of 'auto', 'float32'"):
        EngineConfig(dtype=dtype)
