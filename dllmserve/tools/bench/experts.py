"""Counting the experts that steps really touch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dllmserve.core.plan import StepPlan
from dllmserve.layers.ops import Routed
from dllmserve.llm import LLM
from dllmserve.runtime.runner import ModelRunner
from dllmserve.tools.bench.roofline import NONE_COUNTED


def touched_experts(llm: LLM, run: Callable[[], object]) -> Mapping[int, float]:
    """Experts that a step of so many tokens touches, all layers together, on average over a run.

    The run is launched kernel by kernel, for routes inside CUDA graphs cannot be watched.

    Args:
        llm: the engine; with several ranks, or without experts, nothing is counted.
        run: what is watched.
    """
    runner = llm._engine._runner
    experts = llm.spec.experts
    if experts is None or not isinstance(runner, ModelRunner):
        return NONE_COUNTED
    plans: list[StepPlan] = []
    found: list[tuple[int, Tensor]] = []  # index of the plan, and what a layer touched

    def note(routed: Routed) -> None:
        seen = torch.zeros(experts.count + 1, dtype=torch.int64, device=routed.ids.device)
        seen[routed.ids.flatten().long()] = 1
        found.append((len(plans) - 1, seen[: experts.count].sum()))

    with llm.observe(plans.append), _watched(runner, note):
        run()
    counts = torch.stack([count for _, count in found]).tolist() if found else []
    steps = [0] * len(plans)
    for (index, _), count in zip(found, counts, strict=True):
        steps[index] += count
    by_tokens: dict[int, list[int]] = defaultdict(list)
    for plan, count in zip(plans, steps, strict=True):
        by_tokens[plan.tokens].append(count)
    return {tokens: sum(all_of) / len(all_of) for tokens, all_of in by_tokens.items()}


@contextmanager
def _watched(runner: ModelRunner, note: Callable[[Routed], None]) -> Iterator[None]:
    """Every route of the runner, which meanwhile uses no graphs."""
    ops: Any = runner._decoder.ops
    route, graphs = ops.route, runner.graphs

    def watching(*args: Any) -> Routed:
        routed: Routed = route(*args)
        note(routed)
        return routed

    ops.route, runner.graphs = watching, None
    try:
        yield
    finally:
        runner.graphs = graphs
        del ops.route  # of the object; its class has the method
