"""Measures, on the device, what a step and CUDA graphs take, before pages are allocated.

The worst step is run through the runner itself, so nothing is estimated twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from dllmserve._values import MAX_GEN_LENGTH, SparseConfig
from dllmserve.core.budget import MemoryBudget
from dllmserve.core.canvas import answer_canvas
from dllmserve.core.limits import Limits
from dllmserve.core.plan import Mask, Part, Span, StepEntry, StepPlan, Store
from dllmserve.core.request import Request
from dllmserve.core.rows import row_inits
from dllmserve.engine.machine import device_memory
from dllmserve.runtime.runner import MAX_GRAPH_TOKENS, ModelRunner
from dllmserve.sampling_params import SamplingParams

#: The rows of the measurement have no pages, so they use the trash page: what they read does not
#: matter.
PROFILE_PAGES = 0
_GRAPH_BLOCK = 32


def measure(
    runner: ModelRunner, limits: Limits, plan: MemoryBudget, *, max_graphs: int
) -> MemoryBudget:
    """The memory budget with measured weights, activations and graphs, and no pages.

    Args:
        runner: with ``PROFILE_PAGES`` pages; its rows are overwritten.
        limits: sizes of the largest step.
        plan: the estimate, of which ``utilization``, ``tables`` and ``history`` are kept.
        max_graphs: graphs that are kept at most.
    """
    device = runner.table.device
    activations = _activation_bytes(runner, limits)
    graphs = 0
    if runner.graphs is not None:
        graphs = _graph_bytes(runner, limits, max_graphs)
        runner.graphs.clear()
    runner.table.host.clear()
    total, free = device_memory(device)
    allocated = torch.cuda.memory_allocated(device)
    logits = runner.logit_bytes
    return replace(
        plan,
        total=total,
        free=free + allocated,
        weights=allocated - logits - plan.tables - plan.history,
        activations=activations,
        logits=logits,
        graphs=graphs,
        pages=0,
        measured=True,
    )


def _activation_bytes(runner: ModelRunner, limits: Limits) -> int:
    """Memory that the worst step takes beyond what is allocated before it."""
    device = runner.table.device
    worst = 0
    for plan in worst_steps(runner, limits):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        runner.execute(plan).result()
        worst = max(worst, torch.cuda.max_memory_reserved(device) - before)
    torch.cuda.empty_cache()
    return worst


def _graph_bytes(runner: ModelRunner, limits: Limits, max_graphs: int) -> int:
    """Memory of all graphs: one pool for the largest, and what each takes by itself."""
    device = runner.table.device
    block = runner.spec.block_length if runner.spec.noise else _GRAPH_BLOCK
    rows = max(min(limits.max_num_seqs, MAX_GRAPH_TOKENS // block), 1)
    taken = []
    for count in (rows, max(rows // 2, 1)):
        plan = _reuse_step(runner, limits, count)
        runner.execute(plan).result()
        torch.cuda.empty_cache()
        before = device_memory(device)[1]
        runner.execute(plan).result()
        torch.cuda.empty_cache()
        taken.append(max(before - device_memory(device)[1], 0))
    return taken[0] + (max_graphs - 1) * taken[1]


def worst_steps(runner: ModelRunner, limits: Limits) -> Iterator[StepPlan]:
    """Steps of which one takes the most memory; each is made when its turn comes."""
    if not runner.spec.noise:
        for rule in ("entropy_bound", *runner.keeping):
            yield worst_step(runner, limits, rule)
        return
    tokens = limits.max_num_batched_tokens
    yield _canvas_step(runner, limits, tokens // runner.spec.block_length)
    length = min(tokens, limits.max_model_len)
    span = Span(0, 0, length, 0, Store.POSITIONS, head=Part.NONE, mask=Mask.STAIR, mask_arg=1)
    yield StepPlan((StepEntry(span, None, 0, "renoise", stores=True),))


def worst_step(runner: ModelRunner, limits: Limits, rule: str = "entropy_bound") -> StepPlan:
    """Whole canvases that fill the step, all selecting, if the model's layers can.

    With ``entropy_bound`` with every statistic and filter; with a rule that keeps something of
    logits, whose rows are reduced by themselves, with that.
    """
    longest = min(limits.max_model_len, limits.max_num_batched_tokens)
    full, rest = divmod(limits.max_num_batched_tokens, longest)
    lengths = [longest] * full + ([rest] if rest > 1 else [])
    lengths = lengths[: limits.max_num_seqs]
    # see dllmserve.attention.backend.check_spans
    store = Store.POSITIONS if runner.spec.attention else Store.SELECT_PER_HEAD
    entries = []
    for row, length in enumerate(lengths):
        keeps = rule != "entropy_bound"
        filtered = not keeps and row == len(lengths) - 1
        answer = min(length - 1, MAX_GEN_LENGTH)
        block = min(max(length // 2, 1), answer)
        params = SamplingParams(
            temperature=1.0 if filtered else 0.0,
            top_p=0.9 if filtered else 1.0,
            gen_length=answer,
            unmask=rule,
            confidence="probability" if keeps else "margin",
            seed=row,
        )
        _admit(runner, row, [0] * (length - answer), params)
        span = Span(
            row=row,
            q_start=0,
            q_len=length,
            ctx_len=0,
            store=store,
            keep=1 if length > block + 1 else 0,
            blk_off=length - block,
            blk_len=block,
        )
        entries.append(StepEntry(span, None, block, params.unmask))
    return StepPlan(tuple(entries))


def _reuse_step(runner: ModelRunner, limits: Limits, rows: int) -> StepPlan:
    """One block of every row against cached K,V."""
    if runner.spec.noise:
        return _canvas_step(runner, limits, rows)
    block = min(_GRAPH_BLOCK, limits.max_model_len - 1)
    params = SamplingParams(temperature=0.0, gen_length=block, steps=block)
    entries = []
    for row in range(rows):
        _admit(runner, row, [0], params)
        span = Span(row, 1, block, 1, blk_len=block)
        entries.append(StepEntry(span, None, block, params.unmask))
    return StepPlan(tuple(entries))


def _canvas_step(runner: ModelRunner, limits: Limits, rows: int) -> StepPlan:
    """A canvas of noise in each row, as many as there may be, with every filter."""
    length = min(runner.spec.block_length, limits.max_model_len - 1)
    params = SamplingParams(top_p=0.9, gen_length=length, unmask="renoise")
    entries = []
    for row in range(max(min(rows, limits.max_num_seqs), 1)):
        _admit(runner, row, [0], params)
        span = Span(row, 1, length, 1, blk_len=length)
        entries.append(StepEntry(span, None, length, params.unmask, step=1))
    return StepPlan(tuple(entries))


def _admit(runner: ModelRunner, row: int, prompt: list[int], params: SamplingParams) -> None:
    """Fill a row as the engine would."""
    sparse = SparseConfig(default_block_len=1)
    canvas = answer_canvas(prompt, params.gen_length, params.resolved_block_length)
    request = Request(row, canvas, replace(params, sparse=sparse), seed=row)
    request.row = row
    for init in row_inits(request, runner.spec):
        runner.admit(init)
