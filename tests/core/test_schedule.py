"""Blocks, steps and quotas: they always add up, and count as upstream counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllmserve.core.canvas import answer_canvas
from dllmserve.core.schedule import (
    block_quotas,
    dream_split,
    split,
    steps_per_block,
)
from tests.oracles import rules

SIZES = st.integers(1, 300)


@given(SIZES, st.integers(1, 40))
def test_steps_are_spread_evenly(steps: int, blocks: int) -> None:
    counts = steps_per_block(steps, blocks)
    assert len(counts) == blocks
    assert max(counts) - min(counts) <= 1
    assert list(counts) == sorted(counts, reverse=True)
    assert sum(counts) == max(steps, blocks)


@given(SIZES, SIZES)
def test_split_is_lladas(n: int, steps: int) -> None:
    assert split(n, steps) == rules.split(n, steps)


@given(SIZES, SIZES)
def test_dream_split_is_dreams(n: int, steps: int) -> None:
    assert dream_split(n, steps, 1e-3) == rules.dream_counts(n, steps, 1e-3)


@given(SIZES, SIZES, st.floats(1e-9, 1.0))
def test_dream_split_for_any_eps(n: int, steps: int, eps: float) -> None:
    """Where a share falls on an integer, upstream's own counts depend on the CPU's vectors."""
    counts = dream_split(n, steps, eps)
    assert sum(counts) == n
    left = n
    for i, count in enumerate(counts[:-1]):
        exact = left * (1 - eps) / (steps - i * (1 - eps))
        assert exact - 1.01 < count < exact + 0.01
        left -= count


@pytest.mark.parametrize("steps", [512, 1000, 4096, 8192])
def test_dream_split_of_long_answers(steps: int) -> None:
    assert dream_split(steps, steps, 1e-3) == rules.dream_counts(steps, steps, 1e-3)


@given(SIZES, st.integers(1, 64), SIZES, st.sampled_from(["uniform", "dream"]))
def test_quotas_fill_every_block(
    gen_length: int, block_length: int, steps: int, schedule: str
) -> None:
    blocks = answer_canvas([1], gen_length, block_length).masks
    quotas = block_quotas(blocks, steps, schedule, 1e-3)
    assert [sum(q) for q in quotas] == list(blocks)
    assert all(k > 0 for q in quotas for k in q)
    assert sum(len(q) for q in quotas) <= min(max(steps, len(blocks)), gen_length)
