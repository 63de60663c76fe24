"""Logits of the package's decoder against upstream's and the slow twin's."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dllmserve.attention.backend import KVStore, unpadded_step
from dllmserve.catalog import BACKENDS
from dllmserve.core.plan import Span, StepEntry, StepPlan
from dllmserve.layers.ops import LayerOps, rms_norm
from dllmserve.models import loader
from dllmserve.parallel.partition import Partition
from tests.conftest import SHAPES
from tests.helpers import GOLDEN, MODELS, golden_raw
from tests.oracles import models

CPU = torch.device("cpu")


def logits(folder: Path, sequences: list[list[int]]) -> list[Tensor]:
    """Raw logits of whole sequences, packed into one forward."""
    spec = loader.read_spec(loader.read_config(folder))
    decoder = loader.load_decoder(
        folder, Partition(spec), dtype=torch.float32, device=CPU, max_len=spec.max_model_len
    )
    kv = KVStore.create(
        spec, num_pages=0, page_size=1, num_rows=8, pages_per_row=1, dtype=torch.float32, device=CPU
    )
    spans = [Span(i, 0, len(s), 0, 0, 0, 0, len(s)) for i, s in enumerate(sequences)]
    plan = StepPlan(tuple(StepEntry(s, None, 0, "steps") for s in spans))
    context = BACKENDS["sdpa"].load()(spec).prepare(unpadded_step(plan, kv))
    ids = torch.tensor([token for s in sequences for token in s])
    positions = torch.tensor([p for s in sequences for p in range(len(s))])
    hidden = decoder(ids, positions, context)
    return list((hidden @ decoder.head.weight.T).split([len(s) for s in sequences]))


@pytest.mark.parametrize("name", [*MODELS, "llada-moe-e8", "llada-moe-variant"])
def test_upstreams_logits(name: str) -> None:
    cases = [c for c in golden_raw(name) if c["kind"] == "forward"]
    found = logits(GOLDEN / name, [case["tokens"] for case in cases])
    for z, case in zip(found, cases, strict=True):
        expected = torch.tensor(case["logits"])  # [rows, 24]
        assert float((z[case["logits_rows"], :24] - expected).abs().max()) < 1e-4
        assert z.argmax(dim=-1).tolist() == case["argmax"]


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(checkpoints: dict[str, Path], name: str) -> None:
    sequences = [[1, 2, 3, 4, 5], [9], list(range(40)), [60, 60, 7]]
    oracle = models.load(checkpoints[name])
    for got, tokens in zip(logits(checkpoints[name], sequences), sequences, strict=True):
        assert got.shape[1] == SHAPES[name].vocab + SHAPES[name].extra_rows
        torch.testing.assert_close(got, oracle(torch.tensor([tokens]))[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm(dtype: torch.dtype) -> None:
    x = torch.randn(5, 12, generator=torch.manual_seed(0)).to(dtype)
    weight = torch.randn(12, generator=torch.manual_seed(1)).to(dtype)
    wide = x.float() * torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + 1e-5)
    expected = wide.to(dtype) * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, atol=1e-6, rtol=1e-5)


def test_rotary_is_a_rotation_by_position() -> None:
    ops = LayerOps(8, 100.0, 64, CPU)
    x = torch.randn(6, 2, 8, generator=torch.manual_seed(0))
    positions = torch.tensor([0, 1, 5, 20, 33, 63])
    turned = ops.rotate(x, 2, ops.at(positions))
    torch.testing.assert_close(turned[0], x[0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angles = positions[:, None, None] * 100.0 ** (-torch.arange(4) / 4)
    expected = pairs * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(
        turned, torch.cat((expected.real, expected.imag), dim=-1), atol=1e-5, rtol=1e-5
    )
