"""Noise: a pure function of its counters, uniform, and different wherever a counter is."""

import pytest
import torch
from scipy.stats import kstest

from dllmserve.decoding.noise import _uniform, mix, position_uniforms, row_keys, token_uniforms

MASK64 = (1 << 64) - 1


def splitmix64(x: int) -> int:
    """The published algorithm in Python integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


@pytest.mark.parametrize("x", [0, 1, -1, 12345, 2**63 - 1, -(2**63), 1 << 40])
def test_mix_is_splitmix64(x: int) -> None:
    assert int(mix(torch.tensor([x]))) & MASK64 == splitmix64(x & MASK64)


def test_known_value() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the generator's first output for seed 0


def keys(count: int, seed: int = 1) -> torch.Tensor:
    position = torch.arange(count)
    return row_keys(torch.full((count,), seed), position, torch.zeros(count, dtype=torch.int64))


def test_uniform() -> None:
    u = token_uniforms(keys(100), torch.arange(200)).flatten()
    assert bool(((u > 0) & (u < 1)).all())
    assert kstest(u.numpy(), "uniform").pvalue > 0.01
    assert kstest(position_uniforms(keys(5000)).numpy(), "uniform").pvalue > 0.01


def test_the_extreme_draws_are_inside() -> None:
    """ln 0 and ln(-ln 1) are infinite: such a draw would choose a token whatever its logit."""
    lowest, highest = _uniform(torch.tensor([0, -1])).tolist()
    assert 0.0 < lowest < highest < 1.0


def test_every_counter_matters() -> None:
    one = torch.tensor
    drawn = {
        int(row_keys(one([seed]), one([position]), one([step])))
        for seed in range(8)
        for position in range(8)
        for step in range(8)
    }
    assert len(drawn) == 512
    assert token_uniforms(keys(30), torch.arange(30)).unique().numel() == 900


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    whole = token_uniforms(keys(10), torch.arange(50))
    part = token_uniforms(keys(10)[3:5], torch.arange(50)[20:30])
    assert torch.equal(whole[3:5, 20:30], part)


def test_tokens_and_positions_are_drawn_apart() -> None:
    tokens = token_uniforms(keys(200), torch.arange(1))[:, 0]
    both = torch.stack((tokens, position_uniforms(keys(200))))
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.2
