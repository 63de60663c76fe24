"""What the triton backend decides on the host: which kernels a step needs, padded or not."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dllmserve.attention import triton as backend
from dllmserve.attention.backend import AttentionStep, KVStore, unpadded_step
from dllmserve.core.plan import Span, StepEntry, StepPlan, Store
from dllmserve.core.rows import RowSelect
from tests.attention.bench import LAYERS, Bench, span

PER_HEAD = Store.SELECT_PER_HEAD
HALVES = [torch.float16, torch.bfloat16]


def padded(step: AttentionStep, trash_row: int) -> AttentionStep:
    """The same step with an empty span before each of its own, and more tokens."""
    empty = torch.zeros_like(step.spans)
    empty[:, 0] = trash_row
    spans = torch.stack((empty, step.spans), dim=1).flatten(0, 1)
    starts = torch.stack((torch.zeros_like(step.starts), step.starts), dim=1).flatten()
    places = tuple(2 * i + 1 for i in step.indices)
    tokens, longest = step.tokens + 3, step.max_q + 5
    return replace(step, spans=spans, starts=starts, indices=places, tokens=tokens, max_q=longest)


def cast(kv: KVStore, dtype: torch.dtype) -> KVStore:
    """The same K and V in another dtype."""
    k, v = (tuple(x.to(dtype, copy=True) for x in side) for side in (kv.k, kv.v))
    return replace(kv, k=k, v=v)


def stand_in(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, max_q: int, scale: float) -> Tensor:
    """Flash attention of every span over itself, for machines without a GPU."""
    out = torch.full_like(q, torch.nan)
    group = q.shape[1] // k.shape[1]
    for low, high in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        assert high - low <= max_q
        wide = [x[low:high].float().repeat_interleave(n, 1) for x, n in ((k, group), (v, group))]
        scores = torch.einsum("qhd,khd->hqk", q[low:high].float(), wide[0]) * scale
        out[low:high] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), wide[1]).to(q.dtype)
    return out


PLANS: dict[str, list[Span]] = {
    "mixed": [
        span(0, 0, 17, 17, Store.POSITIONS),
        span(1, 9, 5, 9, Store.NONE),
        span(5, 0, 15, 0, PER_HEAD, keep=5, blk_off=8, blk_len=4),
        span(2, 3, 4, 9, Store.POSITIONS),
        span(3, 0, 9, 4, Store.NONE),  # reads slots 0 .. 3, which hold other tokens
        span(6, 0, 11, 0, Store.SELECT_SHARED, keep=4, blk_off=2, blk_len=4),
    ],
    "whole": [span(0, 0, 17, 17, Store.POSITIONS), span(4, 0, 5, 0, Store.NONE)],
    "windows": [
        span(0, 0, 40, 40, Store.POSITIONS),  # whole, and longer than the window
        span(1, 0, 30, 0, Store.POSITIONS, stair=1),
        span(2, 9, 5, 9, Store.NONE),
    ],
    "reuse": [span(1, 9, 5, 9, Store.NONE), span(2, 3, 4, 9, Store.POSITIONS)],
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", PLANS)
def test_flash_and_the_kernel_share_a_step(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it agrees with float32 through the one kernel, which other tests prove."""
    cuda = torch.cuda.is_available()
    if not cuda:
        monkeypatch.setattr(backend, "_flash_runs", lambda kv, _: kv.k[0].dtype != torch.float32)
        monkeypatch.setattr(backend, "_flash", stand_in)
    own: dict[str, Any] = {}
    if name == "windows":
        own = {"attention": LAYERS, "layer": 0, "scale": 0.5, "length": 40}
    bench = Bench((4, 2, 8), "triton", 1, 5, torch.device("cuda" if cuda else "cpu"), **own)
    for row in (1, 2, 3):
        bench.fill(row, 9)
    bench.kv = cast(bench.kv, dtype)
    plan = StepPlan(tuple(StepEntry(s, None, 0, "steps") for s in PLANS[name]))
    selects = {5: RowSelect(3, 6), 6: RowSelect(2, 4)}
    fresh = [bench.random(plan.tokens + 3, h).to(bench.device, dtype) for h in (4, 2, 2)]

    exact = cast(bench.kv, torch.float32)
    one = unpadded_step(plan, exact, selects)
    wanted = bench.backend.prepare(one).attend(
        bench.layer, *(x[: plan.tokens].float() for x in fresh)
    )
    two = padded(unpadded_step(plan, bench.kv, selects), trash_row=8)
    out = bench.backend.prepare(two).attend(bench.layer, *fresh)

    assert out.shape == (plan.tokens + 3, 4, bench.dim)
    torch.testing.assert_close(out[: plan.tokens].float(), wanted, atol=1e-2, rtol=1e-2)
    for got, expected in zip((*bench.kv.k, *bench.kv.v), (*exact.k, *exact.v), strict=True):
        assert torch.equal(got.float().nan_to_num(nan=9e9), expected.nan_to_num(nan=9e9))


def test_flash_attends_whole_spans_only() -> None:
    assert [s.refresh for s in PLANS["mixed"]] == [True, False, True, False, False, True]
    assert span(0, 0, 9, 9, Store.POSITIONS).refresh
    assert not span(0, 0, 9, 9, Store.POSITIONS, stair=4).refresh
    assert not span(0, 0, 9, 10, Store.POSITIONS).refresh
    assert not span(0, 1, 9, 0, Store.NONE).refresh


def test_what_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench((1, 1, 16), "triton", 0, 4)
    wide = replace(bench.spec, head_dim=513)
    layers = replace(bench.spec, attention=(LAYERS[0], replace(LAYERS[1], head_dim=513)))
    for spec in (wide, layers):
        assert bench.backend.unsupported(spec, bench.device) == ["head_dim 513 is more than 512"]
    assert not bench.backend.unsupported(replace(bench.spec, head_dim=512), bench.device)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    (reason,) = bench.backend.unsupported(bench.spec, torch.device("cpu"))
    assert "CUDA" in reason
