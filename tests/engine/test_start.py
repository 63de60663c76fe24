"""Choices and measurements at start-up, with a device that is not there."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dllmserve.config import EngineConfig
from dllmserve.core.rows import RowInit
from dllmserve.core.scheduler import Limits
from dllmserve.engine import choices, setup
from dllmserve.engine.profile import worst_step
from dllmserve.errors import ConfigError
from tests.helpers import PLAIN

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_kernels_and_attention_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: list[str] = []
    monkeypatch.setattr(choices, "missing", lambda _: reasons)
    assert (
        choices.choose_kernels("auto", CUDA)
        == choices.choose_attention("auto", PLAIN, CUDA)
        == "triton"
    )
    assert choices.choose_kernels("auto", CPU) == "torch"
    assert choices.choose_attention("auto", PLAIN, CPU) == "sdpa"
    assert choices.choose_kernels("torch", CUDA) == "torch"
    reasons.append("no triton here")
    assert choices.choose_kernels("auto", CUDA) == "torch"
    assert choices.choose_attention("auto", PLAIN, CUDA) == "sdpa"
    with pytest.raises(ConfigError, match="kernels='triton': no triton here"):
        choices.choose_kernels("triton", CUDA)


class Admitting:
    """The part of a runner that the worst step is made for."""

    def __init__(self) -> None:
        self.spec = PLAIN
        self.rows: dict[int, RowInit] = {}

    def admit(self, init: RowInit) -> None:
        self.rows[init.row] = init


@pytest.mark.parametrize(
    ("max_len", "tokens", "rows"),
    [
        (4096, 8192, 64),
        (3000, 8192, 64),
        (5000, 8192, 64),
        (384, 1000, 64),
        (131072, 32768, 64),  # a canvas longer than any answer
        (512, 8192, 4),  # fewer rows than would fill the step
        (2, 8192, 3),
        (256, 256, 1),
    ],
)
def test_the_measured_step_is_as_large_as_any(max_len: int, tokens: int, rows: int) -> None:
    runner: Any = Admitting()
    limits = Limits(
        max_model_len=max_len,
        max_num_seqs=rows,
        max_num_batched_tokens=tokens,
        max_logit_rows=1024,
        page_size=32,
        num_pages=1,
    )
    plan = worst_step(runner, limits)
    plan.validate(max_len)
    assert plan.tokens == min(tokens, rows * max_len)
    for entry in plan.entries:
        init = runner.rows[entry.span.row]
        assert len(init.prompt) + init.gen_length == entry.span.q_len
        assert entry.span.blk_start >= len(init.prompt)
        assert entry.masks == entry.span.blk_len
    assert runner.rows[plan.entries[-1].span.row].filtered


def test_pages_that_torch_gathers_are_paid_for_after_the_measurement_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The measured step reads no pages, so the plan adds what later steps gather."""
    options = EngineConfig(device="cpu", max_model_len=256)
    plan = setup.plan_engine(options)
    page, gather = plan.sizing.page_bytes, plan.sizing.gather_bytes
    gathered = plan.limits.num_pages * gather
    bare = replace(plan.memory, activations=plan.memory.activations - gathered, pages=0)
    monkeypatch.setattr(setup, "measure", lambda *_, **__: bare)
    parts: Any = SimpleNamespace(runner=lambda pages: None)
    measured = setup.measured_plan(plan, parts)
    assert gather > 0
    pages = measured.limits.num_pages
    assert measured.memory.pages == pages * page
    assert measured.memory.activations - bare.activations == pages * gather
    assert pages == plan.limits.num_pages
