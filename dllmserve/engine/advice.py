"""What to say when memory runs out: which option to change, and to what."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dllmserve.core.budget import MemoryBudget, size_text
from dllmserve.engine.sizing import Sizing, memory_advice

#: Fewer rows would run the LM head in chunks too small to be worth the launch.
_LEAST_LOGIT_ROWS = 16
#: percent; the library itself needs the rest
_MOST_UTILIZATION = 98


def does_not_fit(sizing: Sizing, memory: MemoryBudget, planned: Callable[[Sizing], int]) -> str:
    """The message for a plan that is larger than the memory.

    Args:
        sizing: what was asked for.
        memory: the plan; ``memory.planned > memory.allowed``.
        planned: bytes that a sizing takes, as they can be worked out; a measured plan is
            taken to change by as much.
    """
    options = sizing.options
    off = memory.planned - planned(sizing) if memory.measured else 0

    def fits(other: Sizing) -> bool:
        share = other.options.gpu_memory_utilization
        allowed = replace(memory, utilization=share).allowed
        without = memory.graphs if other.options.enforce_eager else 0
        return planned(other) + off - without <= allowed

    general = memory_advice(sizing.spec)
    if ways := _ways(sizing, memory, fits):
        cure = f"set {', or '.join(ways)}; in general: {general}"
    else:
        more = ", or kv_pages" if options.kv_pages else ""
        more += ", or use dtype='bfloat16'" if sizing.dtype == torch.float32 else ""
        cure = f"no single option makes room for it: {general}{more}"
    return (
        f"the engine needs {size_text(memory.planned)} and may use "
        f"{size_text(memory.allowed)}: {memory.equation()}; {cure}"
    )


def _ways(sizing: Sizing, memory: MemoryBudget, fits: Callable[[Sizing], bool]) -> list[str]:
    """Options of which each alone would make the plan fit, with the value that does."""
    options, max_len = sizing.options, sizing.max_len

    def fits_with(**changes: Any) -> bool:
        return fits(replace(sizing, options=replace(options, **changes)))

    ways = []
    if memory.graphs and fits_with(enforce_eager=True):
        ways.append("enforce_eager=True")
    if options.kv_pages:
        pages = _largest(1, options.kv_pages, lambda n: fits_with(kv_pages=n))
        ways += [f"kv_pages={pages}"] if pages else []
    rows = _largest(
        _LEAST_LOGIT_ROWS, options.max_logit_rows, lambda n: fits_with(max_logit_rows=n)
    )
    ways += [f"max_logit_rows={rows}"] if rows else []
    kept = _largest(0, options.max_history_rows, lambda n: fits_with(max_history_rows=n))
    ways += [] if kept is None else [f"max_history_rows={kept}"]
    step = _largest(max_len, sizing.tokens, lambda n: fits(replace(sizing, tokens=n)))
    if step:
        ways.append(f"max_num_batched_tokens={step}")
    # a step must hold the longest canvas, so both go down together
    elif length := _largest(2, max_len, lambda n: fits(replace(sizing, tokens=n, max_len=n))):
        ways.append(f"max_model_len={length} with max_num_batched_tokens={length}")
    for percent in range(int(options.gpu_memory_utilization * 100) + 1, _MOST_UTILIZATION + 1):
        if fits_with(gpu_memory_utilization=percent / 100):
            ways.append(f"gpu_memory_utilization={percent / 100:g}")
            break
    if sizing.dtype == torch.float32 and fits(replace(sizing, dtype=torch.bfloat16)):
        ways.append("dtype='bfloat16'")
    return ways


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number in ``low .. high - 1`` that fits, if a smaller one always fits better."""
    too_large = bisect_left(range(low, high), True, key=lambda number: not fits(number))
    return low + too_large - 1 if too_large else None
