"""ML-GSAI/LLaDA `generate.py`: whole-canvas forwards, a fixed number of steps a block.

Rows are decoded together, so this is also the plain loop that benchmarks compare with.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .ends import NO_ENDS, Ends
from .rules import segments, split
from .sampling import Step, Uniform, canvas, gumbel

# (row, position, step) -> the random confidence of remasking="random"
Noise = Callable[[int, int, int], float]


class Model(Protocol):
    """Anything that maps tokens [B, L] to logits [B, L, V]."""

    mask_id: int

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [B, L, V] of tokens [B, L]."""
        ...


def guided(model: Model, x: Tensor, prompt: Tensor, cfg_scale: float) -> Tensor:
    """Logits [B, L, V] of x [B, L], guided away from a copy whose prompt [B, L] is masked."""
    if cfg_scale == 0:
        return model(x)
    unconditional = torch.where(prompt, model.mask_id, x)
    z, z_u = model(torch.cat([x, unconditional])).chunk(2)
    return z_u + (cfg_scale + 1) * (z - z_u)


def propose(
    z: Tensor, open_: Tensor, temperature: float, uniform: Uniform | None, step: int
) -> Tensor:
    """Proposed tokens [B, L]; noise is drawn for the open slots [B, L] only."""
    x0 = z.argmax(dim=-1)
    if temperature > 0:
        if uniform is None:
            raise ValueError("temperature > 0 needs a uniform function")
        for row, position in open_.nonzero().tolist():
            noise = uniform(row, position, step).to(z.device)
            x0[row, position] = gumbel(z[row, position], temperature, noise).argmax()
    return x0


def confidences(z: Tensor, x0: Tensor, open_: Tensor, noise: Noise | None, step: int) -> Tensor:
    """Confidence [B, L]: the proposal's clean probability, or the given noise; -inf if not open."""
    if noise is None:
        # In the logits' own dtype, as upstream; the noise of a temperature does not enter.
        c = z.softmax(dim=-1).gather(-1, x0[..., None])[..., 0]
    else:
        c = torch.zeros(x0.shape, dtype=torch.float64, device=x0.device)
        for row, position in open_.nonzero().tolist():
            c[row, position] = noise(row, position, step)
    return c.masked_fill(~open_, -torch.inf)


def top(c: Tensor, counts: Tensor) -> Tensor:
    """The counts[b] greatest entries of each row of c [B, L] as flags, equal ones by position."""
    order = c.sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.arange(c.shape[1], device=c.device).expand_as(order)
    return torch.zeros_like(order).scatter(-1, order, ranks) < counts[:, None]


@torch.inference_mode()
def generate(
    model: Model,
    prompts: Tensor,  # [B, P] int64, equal lengths
    *,
    steps: int,
    gen_length: int,
    block_length: int,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    uniform: Uniform | None = None,
    confidence_noise: Noise | None = None,
    trace: list[Step] | None = None,
    ends: Ends = NO_ENDS,
) -> Tensor:
    """The generated ids [B, G]; `confidence_noise` stands for upstream's `torch.rand`."""
    if (remasking == "random") != (confidence_noise is not None):
        raise ValueError('remasking="random" and confidence_noise go together')
    blocks = segments(prompts.shape[1], gen_length, block_length)
    if steps % len(blocks):
        raise ValueError(f"steps {steps} is not a multiple of the {len(blocks)} blocks")
    per_block = steps // len(blocks)
    x = canvas(prompts, gen_length, model.mask_id)
    prompt = x != model.mask_id
    before = torch.arange(x.shape[1], device=x.device)  # [L], compared with the block's end
    step = 0
    for start, end in blocks:
        masks = (x[:, start:end] == model.mask_id).sum(dim=1).tolist()
        counts = torch.tensor([split(n, per_block) for n in masks], device=x.device)  # [B, S]
        for t in range(per_block):
            z = ends.before(guided(model, x, prompt, cfg_scale))
            open_ = (x == model.mask_id) & (before < end)
            x0 = torch.where(open_, propose(z, open_, temperature, uniform, step), x)
            c = confidences(ends.after(z, temperature), x0, open_, confidence_noise, step)
            selected = top(c, counts[:, t]) & open_
            x = torch.where(selected, x0, x)
            if trace is not None:
                rows = zip(open_, x0, selected, strict=True)
                trace.extend(Step(row, *parts) for row, parts in enumerate(rows))
            step += 1
    return x[:, prompts.shape[1] :]
