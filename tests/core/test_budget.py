"""What one step may hold, and the memory equation."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from dllmserve.core.budget import GIB, MemoryBudget, StepBudget, size_text


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50), st.integers(1, 2)), max_size=30))
def test_no_share_goes_over(shares: list[tuple[int, int, int]]) -> None:
    budget = StepBudget(tokens=100, logit_rows=60, rows=8)
    taken: list[tuple[int, int, int]] = []
    for share in shares:
        before = (budget.tokens, budget.logit_rows, budget.rows)
        if budget.take(*share):
            taken.append(share)
        else:
            assert (budget.tokens, budget.logit_rows, budget.rows) == before
    assert sum(s[0] for s in taken) <= 100
    assert sum(s[2] for s in taken) <= 8
    assert len(taken) <= 1 or sum(s[1] for s in taken) <= 60


def test_logit_rows_never_block_an_empty_step() -> None:
    budget = StepBudget(tokens=100, logit_rows=10, rows=4)
    assert budget.take(20, 50, 1)
    assert not budget.take(20, 1, 1)


def test_the_memory_equation() -> None:
    memory = MemoryBudget(
        total=10 * GIB,
        free=9 * GIB,
        utilization=0.5,
        weights=GIB,
        activations=2 * GIB,
        logits=GIB // 2,
        tables=0,
        pages=0,
    )
    assert memory.planned == 3 * GIB + GIB // 2
    assert memory.allowed == 5 * GIB
    assert memory.equation() == (
        "weights 1.00 GiB + activations 2.00 GiB + logits 512.0 MiB + tables 0.0 MiB "
        "+ K,V pages 0.0 MiB = 3.50 GiB of 10.00 GiB x 0.5 = 5.00 GiB"
    )
    kept = replace(memory, graphs=GIB, history=GIB // 4)
    assert kept.planned == memory.planned + GIB + GIB // 4
    assert "+ tables 0.0 MiB + history 256.0 MiB + graphs 1.00 GiB +" in kept.equation()
    busy = replace(memory, free=2 * GIB)
    assert busy.allowed == 2 * GIB < busy.planned
    assert busy.equation().endswith("of free memory of 10.00 GiB = 2.00 GiB")
    assert size_text(0) == "0.0 MiB"
