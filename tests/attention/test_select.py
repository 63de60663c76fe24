"""Selection: dLLM-Serve's own choices, and the slow twin's."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllmserve.attention.select import select_tokens
from tests.helpers import GOLDEN
from tests.oracles.sparse_dllm import Eviction, select

CASES = json.loads((GOLDEN / "head_select.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=[f"{c['num_heads']}-{c['candidates']}" for c in CASES])
def test_golden(case: dict) -> None:  # type: ignore[type-arg]
    q, k = torch.tensor(case["q"])[None], torch.tensor(case["k"])[None]
    keep = int(case["candidates"] * case["retention_ratio"])
    kept = select_tokens(q, k, keep, case["pool_kernel"], per_head=True)
    assert kept[0].T.tolist() == case["selected_per_kv_head"]


@given(
    st.integers(0, 10_000),
    st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)]),
    st.integers(1, 40),
    st.integers(1, 9),
    st.floats(0.0, 1.0),
    st.booleans(),
)
def test_twin(
    seed: int,
    heads: tuple[int, int],
    candidates: int,
    kernel: int,
    ratio: float,
    per_head: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 5, heads[0], 8, generator=generator)
    k = torch.randn(2, candidates, heads[1], 8, generator=generator)
    keep = int(candidates * ratio)
    kept = select_tokens(q, k, keep, kernel, per_head)
    assert kept.shape == (2, keep, heads[1])
    for row in range(2):
        expected = select(q[row], k[row], Eviction(ratio, kernel, per_head))
        assert kept[row].T.tolist() == expected


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(3, 4, 4, 8, generator=generator)
    k = torch.randn(3, 20, 2, 8, generator=generator)
    together = select_tokens(q, k, 7, 3, True)
    for row in range(3):
        alone = select_tokens(q[row : row + 1], k[row : row + 1], 7, 3, True)
        assert torch.equal(alone[0], together[row])
