"""Runs on a small random model: counts, figures, pictures."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dllmserve import LLM, SamplingParams, SparseConfig
from dllmserve.errors import ConfigError
from dllmserve.tools.bench.plot import plot_latency, plot_throughput, work_parts
from dllmserve.tools.bench.roofline import Ceilings
from dllmserve.tools.bench.run import Bench, KernelTime, LatencyFigures, Result, Spread
from dllmserve.tools.bench.workload import Workload
from dllmserve.tools.plot import check_plot
from dllmserve.tools.text import percentile
from tests.conftest import Engines
from tests.helpers import GOLDEN

CEILINGS = Ceilings(1e10, 1e11, 1, 1)


@pytest.fixture
def llm(engines: Engines, checkpoints: dict[str, Path]) -> LLM:
    return engines(checkpoints["dream"])


def bench(llm: LLM, **params: Any) -> Bench:
    values = {"temperature": 0.0, "gen_length": 8, "steps": 8, "block_length": 4, **params}
    work = Workload(
        prompt_len=6,
        params=SamplingParams(ignore_eos=True, **values),
        seed=0,
        runs=3,
        warmup=1,
    )
    return Bench(llm, work, CEILINGS)


def test_counts_of_a_fixed_schedule(llm: LLM) -> None:
    result = bench(llm, steps=4, cache="dual").throughput(3)
    assert result.requests == 3 and len(result.seconds) == 3
    assert result.output_tokens == 24
    assert (result.steps, result.forwards_per_request) == (4, 4.0)
    assert (result.tokens_per_forward, result.requests_per_step) == (2.0, 3.0)
    assert result.kernels is None and result.latency is None
    rate = result.tokens_per_second
    assert 0 < rate.min <= rate.median <= rate.max
    assert rate.max == pytest.approx(24 / min(result.seconds))
    assert 0 < result.floor_seconds < min(result.seconds)
    assert result.roofline_tokens_per_second == pytest.approx(24 / result.floor_seconds)


def test_experts_that_steps_touch(engines: Engines) -> None:
    """One token a step touches as many experts as a token takes; three touch more, seldom all."""
    llm = engines(GOLDEN / "qwen3moe-kv2of4")  # 2 of 8 experts
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    work = Workload(prompt_len=1, params=params, runs=1, warmup=0)
    ops = llm._engine._runner._decoder.ops
    alone, three = (Bench(llm, work, CEILINGS).throughput(n) for n in (1, 3))
    assert alone.experts_touched == alone.experts_uniform == 2.0
    assert three.experts_touched is not None and 2 < three.experts_touched <= 6
    assert three.experts_uniform == pytest.approx(8 * (1 - 0.75**3))
    assert "route" not in vars(ops)  # nobody watches any more


@pytest.mark.parametrize(
    "params",
    [
        {"unmask": "threshold", "threshold": 0.5},
        {"cfg_scale": 1.0, "cache": "prefix"},
        {"temperature": 1.0, "seed": 5, "sparse": SparseConfig(delay_step=0)},
    ],
    ids=["threshold", "guided", "sparse"],
)
def test_every_kind_of_request(llm: LLM, params: dict[str, Any]) -> None:
    result = bench(llm, **params).throughput(2)
    assert result.output_tokens == 16
    assert result.floor_seconds > 0


def test_guidance_raises_the_floor(llm: LLM) -> None:
    plain = bench(llm).throughput(1).floor_seconds
    assert bench(llm, cfg_scale=1.0).throughput(1).floor_seconds > plain


def test_latency(llm: LLM) -> None:
    said: list[str] = []
    engine = bench(llm)
    engine._progress = said.append
    result = engine.latency()
    latency = result.latency
    assert latency is not None
    assert 0 < latency.median <= latency.p90 <= latency.max == max(result.seconds)
    assert 0 < latency.first_token
    assert (result.requests, result.steps) == (1, 8)
    assert said[0] == "n=1: warm-up 1 of 1" and said[-1] == "n=1: first token"


def test_the_engine_is_left_as_it_was(llm: LLM) -> None:
    bench(llm).latency()
    params = SamplingParams(temperature=0.0, gen_length=4, steps=4)
    assert llm.generate([[1, 2, 3]], params, use_tqdm=False)[0]["finish_reason"]


def test_percentile() -> None:
    assert percentile([3.0], 90) == 3.0
    assert percentile([1.0, 2.0], 50) == 1.5
    assert percentile([5.0, 1.0, 2.0, 4.0, 3.0], 90) == pytest.approx(4.6)


RESULT = Result(
    requests=2,
    seconds=[2.0],
    output_tokens=64,
    tokens_per_second=Spread(32.0, 30.0, 33.0),
    steps=32,
    forwards_per_request=32.0,
    tokens_per_forward=1.0,
    requests_per_step=2.0,
    ms_per_step=62.5,
    floor_seconds=0.5,
    roofline_fraction=0.25,
    kernels=KernelTime(0.75, 100, 1.5, 2.0),
    peak_allocated=1,
    peak_reserved=1,
    latency=LatencyFigures(2.0, 2.1, 2.2, 0.1),
)


def test_parts_of_the_latency() -> None:
    assert work_parts(RESULT, 2.0) == {
        "roofline's floor": 0.5,
        "kernels beyond it": 1.0,
        "no kernel running": 0.5,
    }
    assert work_parts(replace(RESULT, kernels=None), 2.0) == {
        "roofline's floor": 0.5,
        "everything else": 1.5,
    }


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_pictures(tmp_path: Path, suffix: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    rates, parts = tmp_path / f"rates{suffix}", tmp_path / f"parts{suffix}"
    check_plot(rates)
    plot_throughput([RESULT, replace(RESULT, requests=1)], "a title\nof two lines", rates)
    plot_latency(RESULT, "a title", parts)
    assert rates.read_bytes().startswith(magic) and parts.read_bytes().startswith(magic)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install 'matplotlib>="):
        check_plot(tmp_path / "rates.png")


def test_where_a_picture_cannot_go(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        check_plot(tmp_path / "rates.pdf")
    with pytest.raises(ConfigError, match="no folder"):
        check_plot(tmp_path / "nowhere" / "rates.png")
