"""NVlabs/Fast-dLLM v1 `llada/generate.py`: no cache, prefix cache and dual cache.

A block runs until it holds no masks. Rows are decoded one by one, as upstream's batch of one.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import rules
from .models import KV, OracleModel
from .rules import segments, split
from .sampling import Row, Rule, Step, Uniform, canvas

CACHES = ("none", "prefix", "dual")


def window(
    model: OracleModel, row: Row, start: int, end: int, past: list[KV], cache: str
) -> Tensor:
    """Logits [Q, V] of positions start.. against the K,V of the block-entry forward.

    prefix: the block and all that follows, over the frozen K,V of [0, start). dual: the block
    alone, its K,V replacing those rows of the frozen whole canvas.
    """
    if cache == "prefix":
        end = len(row.tokens)
        past = [(k[:, :, :start], v[:, :, :start]) for k, v in past]
    positions = torch.arange(start, end)
    overwrite_at = start if cache == "dual" else None
    return model.forward(row.tokens[None, start:end], positions, past, overwrite_at).logits[0]


def decode_block(
    model: OracleModel, row: Row, start: int, end: int, cache: str, rule_at: Callable[[int], Rule]
) -> None:
    """Fills [start, end) of the row in place; `rule_at(t)` is the rule of the block's step t."""
    past: list[KV] = []
    t = 0
    while row.masks(start, end):
        rule = rule_at(t)
        if t == 0 or cache == "none":
            out = model.forward(row.tokens[None])
            if t == 0:
                past = out.kv  # of the tokens before this step's update, as upstream
            chosen = row.advance(out.logits[0], 0, end, rule)
        else:
            z = window(model, row, start, end, past, cache)
            chosen = row.advance(z, start, end, rule)
        if t > 100 * (end - start) or not chosen:
            raise RuntimeError("the mask id is proposed again and again: upstream never ends here")
        t += 1


def scheduled(counts: list[int], t: int) -> Rule:
    """The fixed schedule's rule at step t of a block."""
    if t >= len(counts):
        raise RuntimeError("a mask-id proposal outlived the schedule: upstream fails here")
    return partial(rules.steps, count=counts[t])


@torch.inference_mode()
def generate(
    model: OracleModel,
    prompts: Tensor,  # [B, P] int64
    *,
    steps: int,
    gen_length: int,
    block_length: int,
    cache: str = "none",
    threshold: float | None = None,
    factor: float | None = None,
    temperature: float = 0.0,
    uniform: Uniform | None = None,
    trace: list[Step] | None = None,
) -> Tensor:
    """The generated ids [B, G]; `factor` before `threshold` before the schedule, as upstream."""
    if cache not in CACHES:
        raise ValueError(f"cache {cache!r} is none of {CACHES}")
    blocks = segments(prompts.shape[1], gen_length, block_length)
    answers: list[Tensor] = []
    for index, prompt in enumerate(prompts):
        tokens = canvas(prompt, gen_length, model.mask_id)
        row = Row(tokens, model.mask_id, index, temperature, uniform, torch.float64, trace)
        for start, end in blocks:
            if factor is not None:
                rule_at = partial(_constant, partial(rules.factor, f=factor))
            elif threshold is not None:
                rule_at = partial(_constant, partial(rules.threshold, tau=threshold))
            else:
                counts = split(row.masks(start, end), steps // len(blocks))
                rule_at = partial(scheduled, counts)
            decode_block(model, row, start, end, cache, rule_at)
        answers.append(row.tokens[prompts.shape[1] :])
    return torch.stack(answers)


def _constant(rule: Rule, _t: int) -> Rule:
    return rule
