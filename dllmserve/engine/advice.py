"""What to say when memory runs out: which option to change, and to what."""

from __future__ import annotations

import math

import torch

from dllmserve.config import EngineConfig
from dllmserve.core.budget import MemoryBudget, size_text

OOM_ADVICE = (
    "reduce max_model_len, use sparse attention, enable tensor parallelism (this version "
    "runs tensor_parallel_size=1 only), or lower max_num_seqs, max_num_batched_tokens or "
    "max_logit_rows"
)
#: Fewer rows would run the LM head in chunks too small to be worth the launch.
_LEAST_LOGIT_ROWS = 16
_MOST_UTILIZATION = 0.98


def does_not_fit(
    options: EngineConfig, memory: MemoryBudget, dtype: torch.dtype, *, tokens: int, max_len: int
) -> str:
    """The message for a plan that is larger than the memory.

    Args:
        options: what was asked for.
        memory: the plan; ``memory.planned > memory.allowed``.
        dtype: of the weights.
        tokens: query tokens of the largest step.
        max_len: longest canvas.
    """
    ways = _ways(options, memory, dtype, tokens, max_len)
    if ways:
        cure = f"set {', or '.join(ways)}; in general: {OOM_ADVICE}"
    else:
        more = ", or kv_pages" if options.kv_pages else ""
        more += ", or use dtype='bfloat16'" if dtype == torch.float32 else ""
        cure = f"no single option makes room for it: {OOM_ADVICE}{more}"
    return (
        f"the engine needs {size_text(memory.planned)} and may use "
        f"{size_text(memory.allowed)}: {memory.equation()}; {cure}"
    )


def _ways(
    options: EngineConfig, memory: MemoryBudget, dtype: torch.dtype, tokens: int, max_len: int
) -> list[str]:
    """Options of which each alone would make the plan fit, with the value that does."""
    over = memory.planned - memory.allowed
    ways = []
    if options.kv_pages:
        pages = math.floor(options.kv_pages * (1 - over / memory.pages)) if memory.pages else 0
        if pages > 0:
            ways.append(f"kv_pages={pages}")
    if memory.graphs >= over:
        ways.append("enforce_eager=True")
    if memory.logits > over:
        rows = options.max_logit_rows - math.ceil(over / memory.logits * options.max_logit_rows)
        if rows >= _LEAST_LOGIT_ROWS:
            ways.append(f"max_logit_rows={rows}")
    fitting = tokens - math.ceil(over / (memory.activations / tokens))
    if fitting >= max_len:
        ways.append(f"max_num_batched_tokens={fitting}")
    elif fitting >= 2:
        # a step must hold the longest canvas, so both go down together
        ways.append(f"max_model_len={fitting} with max_num_batched_tokens={fitting}")
    share = memory.planned / memory.total
    if options.gpu_memory_utilization < share <= _MOST_UTILIZATION and memory.planned < memory.free:
        ways.append(f"gpu_memory_utilization={math.ceil(share * 100) / 100:g}")
    if dtype == torch.float32 and memory.planned / 2 < memory.allowed:
        ways.append("dtype='bfloat16'")
    return ways
