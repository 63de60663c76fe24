"""Attention, selection, noise and statistics on a CUDA device against their CPU twins."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dllmserve.attention.select import select_tokens
from dllmserve.catalog import BACKENDS
from dllmserve.decoding.noise import position_uniforms, row_keys, token_uniforms
from tests.attention.bench import HEADS, LAYERS, Bench, mixed_plans, windows
from tests.oracles.sparse_dllm import Eviction, select

SETUPS = [(name, shift, page) for name in BACKENDS for shift, page in ((0, 1), (1, 5))]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("setup", SETUPS)
def test_backends(heads: tuple[int, int, int], setup: tuple[str, int, int]) -> None:
    mixed_plans(Bench(heads, *setup, device=torch.device("cuda")))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("times", [1, 16])
@pytest.mark.parametrize("setup", SETUPS)
def test_layers_that_attend_in_their_own_ways(
    setup: tuple[str, int, int], times: int, layer: int
) -> None:
    """Heads of 16 and 32, and of 256 and 512."""
    own = tuple(replace(one, head_dim=times * one.head_dim) for one in LAYERS)
    how: dict[str, Any] = {"attention": own, "layer": layer, "length": 220}
    windows(Bench((4, 2, 16), *setup, device=torch.device("cuda"), **how))


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_selection_breaks_ties_by_position(per_head: bool, kernel: int) -> None:
    generator = torch.Generator().manual_seed(kernel)
    q = torch.randn(2, 6, 4, 8, generator=generator)
    k = torch.randn(2, 33, 2, 8, generator=generator)
    kept = select_tokens(q.cuda(), k.cuda(), 16, kernel, per_head).cpu()
    how = Eviction(0.5, kernel, per_head, "position")
    for row in range(2):
        assert kept[row].T.tolist() == select(q[row], k[row], how)


def test_noise_is_the_same_on_every_device() -> None:
    seeds = torch.tensor([0, 1, 2**63 - 1, 77])
    keys = row_keys(seeds, torch.arange(4), torch.arange(4) * 3)
    on_device = row_keys(seeds.cuda(), torch.arange(4).cuda(), torch.arange(4).cuda() * 3)
    assert torch.equal(keys, on_device.cpu())
    ids = torch.arange(1000)
    assert torch.equal(token_uniforms(keys, ids), token_uniforms(on_device, ids.cuda()).cpu())
    assert torch.equal(position_uniforms(keys), position_uniforms(on_device).cpu())
