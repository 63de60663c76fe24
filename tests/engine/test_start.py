"""Choices and measurements at start-up, with a device that is not there."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dllmserve import SamplingParams
from dllmserve.attention.backend import check_spans
from dllmserve.catalog import EDITS
from dllmserve.config import EngineConfig
from dllmserve.core.limits import Limits
from dllmserve.core.model_spec import AttentionSpec
from dllmserve.core.rows import RowInit
from dllmserve.engine import machine, setup
from dllmserve.engine.profile import worst_step
from dllmserve.errors import CapacityError, ConfigError
from dllmserve.runtime.runner import ModelRunner
from dllmserve.tools.environment import kv_heads_text
from tests.helpers import PLAIN
from tests.parallel.threads import threaded_llm

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_kernels_and_attention_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: list[str] = []
    monkeypatch.setattr(machine, "missing", lambda _: reasons)
    assert (
        machine.choose_kernels("auto", CUDA)
        == machine.choose_attention("auto", PLAIN, CUDA)
        == "triton"
    )
    assert machine.choose_kernels("auto", CPU) == "torch"
    assert machine.choose_attention("auto", PLAIN, CPU) == "sdpa"
    assert machine.choose_kernels("torch", CUDA) == "torch"
    reasons.append("no triton here")
    assert machine.choose_kernels("auto", CUDA) == "torch"
    assert machine.choose_attention("auto", PLAIN, CUDA) == "sdpa"
    with pytest.raises(ConfigError, match="kernels='triton': no triton here"):
        machine.choose_kernels("triton", CUDA)


class Admitting:
    """The part of a runner that the worst step is made for."""

    def __init__(self) -> None:
        self.spec = PLAIN
        self.rows: dict[int, RowInit] = {}

    def admit(self, init: RowInit) -> None:
        self.rows[init.row] = init


@pytest.mark.parametrize("rule", ["entropy_bound", "klass", "credit"])
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
def test_the_measured_step_is_as_large_as_any(
    max_len: int, tokens: int, rows: int, rule: str
) -> None:
    runner: Any = Admitting()
    limits = Limits(
        max_model_len=max_len,
        max_num_seqs=rows,
        max_num_batched_tokens=tokens,
        max_logit_rows=1024,
        page_size=32,
        num_pages=1,
    )
    plan = worst_step(runner, limits, rule)
    plan.validate(max_len)
    assert plan.tokens == min(tokens, rows * max_len)
    for entry in plan.entries:
        init = runner.rows[entry.span.row]
        assert len(init.ids) + init.length == entry.span.q_len
        assert entry.span.blk_start >= len(init.ids)
        assert entry.masks == entry.span.blk_len
        assert entry.rule == rule
    assert runner.rows[plan.entries[-1].span.row].filtered == (rule == "entropy_bound")
    check_spans(PLAIN, plan)
    runner.spec = replace(PLAIN, attention=PLAIN.layers)
    check_spans(runner.spec, worst_step(runner, limits, rule))


def kept_bytes(runner: ModelRunner) -> int:
    """Bytes of all tensors of edits that keep something of logits."""
    edits = [edit for name, edit in runner._edits.items() if EDITS[name].keeps]
    values = [value for edit in edits for value in vars(edit).values()]
    return sum(x.nbytes for x in values if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("rows", [0, 1, 37, 512])
def test_what_rules_keep_is_in_the_plan(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, ranks: int, rows: int
) -> None:
    """To the byte, on every rank; and no request's arrival allocates any of it."""
    options: dict[str, Any] = {"max_history_rows": rows, "max_num_seqs": 5, "max_model_len": 50}
    folder = str(checkpoints["llada"])
    llm, runner, _ = threaded_llm(monkeypatch, folder, ranks, **options)
    config = EngineConfig(folder, device="cpu", tensor_parallel_size=ranks, **options)
    plans = [setup.plan_engine(config, rank).memory for rank in range(ranks)]
    assert [kept_bytes(one) for one in runner.runners] == [plan.history for plan in plans]
    assert llm.plan.memory.history == plans[0].history
    assert (plans[0].history > 0) == (rows > 0)
    table = [x.nbytes for x in vars(runner.table).values() if isinstance(x, torch.Tensor)]
    assert sum(table) <= llm.plan.memory.tables
    needed = {"klass": 8, "credit": 1}
    for rule, least in needed.items():
        params = SamplingParams(gen_length=8, block_length=8, temperature=0.0, unmask=rule)
        if rows >= least:
            llm.generate([[1, 2], [3]], params, use_tqdm=False)
            continue
        why = (
            f"reserved no memory.*max_history_rows={least} or more" if not rows else "raise it to 8"
        )
        with pytest.raises(CapacityError, match=why):
            llm.generate([[1, 2]], params, use_tqdm=False)
    assert [kept_bytes(one) for one in runner.runners] == [plan.history for plan in plans]


def test_pages_leave_room_for_what_rules_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig("llada-8b", device="cpu", dtype="bfloat16", max_model_len=2048)
    gib = 2**30
    monkeypatch.setattr("dllmserve.engine.machine.device_memory", lambda _: (28 * gib, 28 * gib))
    plan, without = (setup.plan_engine(replace(config, max_history_rows=rows)) for rows in (512, 0))
    # 513 distributions of even and odd forwards, and the places of blocks; then credits
    assert plan.memory.history == 2 * 513 * 126464 * 4 + 65 * 512 * 8 + 2 * 65 * 2048 * 16 * 8
    assert without.memory.history == 0
    page = plan.sizing.page_bytes + plan.sizing.gather_bytes
    lost = without.limits.num_pages - plan.limits.num_pages
    assert abs(lost * page - plan.memory.history) < page
    assert plan.memory.planned <= plan.memory.allowed


def test_memory_of_layers_with_their_own_heads() -> None:
    """As of a model whose layers are all alike; the largest layer is the widest moment."""
    sizing = setup.plan_engine(EngineConfig(device="cpu", max_model_len=256)).sizing
    spec = sizing.spec
    alike = AttentionSpec(num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim)
    same = replace(sizing, spec=replace(spec, attention=(alike,) * spec.num_layers))
    assert (same.bare(), same.page_bytes, same.gather_bytes) == (
        *(sizing.bare(), sizing.page_bytes, sizing.gather_bytes),
    )
    wide = replace(alike, head_dim=32 * spec.head_dim, window=4)
    own = replace(sizing, spec=replace(spec, attention=(wide, *same.spec.attention[1:])))
    assert own.gather_bytes == 32 * sizing.gather_bytes
    assert own.page_bytes == sizing.page_bytes * (spec.num_layers + 31) // spec.num_layers
    assert own.bare().activations > sizing.bare().activations
    text = "2 K,V heads of 2048 with a window of 4 (1 layer), 2 K,V heads of 64 (6 layers)"
    assert kv_heads_text(own.spec) == text


def test_pages_that_torch_gathers_are_paid_for_after_the_measurement_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The measured step reads no pages, so the plan adds what later steps gather."""
    options = EngineConfig(device="cpu", max_model_len=256)
    plan = setup.plan_engine(options)
    page, gather = plan.sizing.page_bytes, plan.sizing.gather_bytes
    gathered = plan.limits.num_pages * gather
    bare = replace(plan.memory, activations=plan.memory.activations - gathered, pages=0)
    monkeypatch.setattr("dllmserve.engine.profile.measure", lambda *_, **__: bare)
    parts: Any = SimpleNamespace(runner=lambda pages: None)
    measured = setup.measured_plan(plan, parts)
    assert gather > 0
    pages = measured.limits.num_pages
    assert measured.memory.pages == pages * page
    assert measured.memory.activations - bare.activations == pages * gather
    assert pages == plan.limits.num_pages
