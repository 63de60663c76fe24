"""Log-probabilities of rows, against a sort of all of them, on any number of ranks."""

import random

import pytest
import torch

from dllmserve.decoding.logprobs import Wanted, rounded, row_logprobs
from dllmserve.parallel.vocab import VocabShard
from tests.parallel.threads import on_all, thread_groups


def rows(seed: int, count: int, size: int) -> torch.Tensor:
    """Logits with many ties, of both signs and both zeros, some of which cannot be."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(-8, 9, (count, size), generator=generator) / 2
    z = torch.where(torch.rand(z.shape, generator=generator) < 0.1, -0.0, z)
    return torch.where(torch.rand(z.shape, generator=generator) < 0.1, -torch.inf, z)


@pytest.mark.parametrize(("size", "ranks"), [(300, 1), (300, 2), (300, 3), (70, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(size: int, ranks: int, dtype: torch.dtype) -> None:
    dice = random.Random(size)
    z, wanted = rows(size, 6, size).to(dtype), Wanted(likely=5, candidates=3)
    token = torch.tensor([dice.randrange(size) for _ in z])
    named = torch.tensor([[dice.randrange(-1, size) for _ in range(3)] for _ in z])
    shards = [VocabShard(size, group) for group in thread_groups(ranks)] if ranks > 1 else []
    found = (
        on_all(
            [
                lambda s=s: row_logprobs(z[:, s.start : s.stop], token, wanted, named, s)  # type: ignore[misc]
                for s in shards
            ]
        )
        if shards
        else [row_logprobs(z, token, wanted, named, VocabShard(size))]
    )
    assert all(torch.equal(one, found[0]) for one in found)
    logs = z.double().log_softmax(dim=-1).tolist()
    assert found[0].shape == (6, wanted.columns)
    for row, own, ids, one in zip(found[0].tolist(), logs, named.tolist(), token, strict=True):
        ranked = sorted(range(size), key=lambda i: (-own[i], i))[:5]
        ranked += [-1] * (5 - len(ranked))
        assert row[0] == one and row[1] == pytest.approx(own[one], abs=1e-6)
        assert row[2:7] == ranked
        below = [own[i] if i >= 0 else -torch.inf for i in [*ranked, *ids]]
        assert row[7:] == pytest.approx(below, abs=1e-6)


def test_near_certainty_is_told_apart() -> None:
    """A float32 softmax would give 1 for both."""
    z = torch.tensor([[0.0, -20.0, -20.0], [0.0, -25.0, -25.0]])
    found = row_logprobs(z, torch.tensor([0, 0]), Wanted(0), None, VocabShard(3))[:, 1].tolist()
    assert found == pytest.approx([-4.1223072e-9, -2.7775888e-11], rel=1e-5)


def test_sizes() -> None:
    assert [rounded(k) for k in range(21)] == [0] + [5] * 5 + [20] * 15
