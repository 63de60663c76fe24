"""Soft caps and probabilities of logits, against torch."""

import pytest
import torch

from dllmserve.parallel.vocab import VocabShard
from dllmserve.runtime.logits import TorchReducer
from tests.helpers import need_interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 2500


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_as_torch_does(dtype: torch.dtype) -> None:
    if DEVICE == "cpu":
        need_interpreter()
    from dllmserve.runtime.kernels.reducer import TritonReducer

    vocab = VocabShard(VOCAB)
    fused, plain = TritonReducer(vocab), TorchReducer(vocab)
    wide = torch.randn(3, VOCAB + 7, generator=torch.Generator().manual_seed(0)) * 20
    z = wide.to(DEVICE, dtype)[:, :VOCAB]  # rows are longer
    z[0, :4] = torch.tensor([0.0, 1e4, -1e4, 1e-3])
    capped = fused.capped(z, 30.0)
    torch.testing.assert_close(capped, plain.capped(z.clone(), 30.0), atol=1e-5, rtol=1e-5)
    by = torch.tensor([0.5, 1.0, 3.7], device=DEVICE)
    divided = fused.capped(z, 30.0, by)
    torch.testing.assert_close(divided, plain.capped(z.clone(), 30.0, by), atol=1e-5, rtol=1e-5)
    assert torch.equal(divided, capped / by[:, None])
    totals = capped.logsumexp(dim=1)
    shares = fused.shares(capped, totals, dtype)
    torch.testing.assert_close(shares, plain.shares(capped.clone(), totals, dtype))
    torch.testing.assert_close(
        shares.float().sum(dim=1), torch.ones(3, device=DEVICE), atol=1e-2, rtol=0
    )
    assert fused.capped(z[:0], 30.0).shape == (0, VOCAB)
