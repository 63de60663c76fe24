"""Infilling as a plain loop, from ZHZisZZ/dllm's `infill` (core/samplers/mdlm.py).

Windows are cut from the start of the whole row; each is filled in at most S forwards. Two
differences that the engine has everywhere: a mask is a flag and no id, and the mask id is never
proposed. `by_policy` fills the same windows by any rule and cache.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import policies, rules
from .block_rules import Settings
from .llada import guided
from .models import OracleModel, shift
from .spans import PROMPT, UNWRITTEN, Block, Policy, Slots, Store

Range = tuple[int, int]


class Filled(NamedTuple):
    """A filled row, the forwards that wrote something, and the forward of each hole position."""

    tokens: list[int]
    forwards: int
    steps: list[int]


def mdlm_split(n: int, steps: int) -> list[int]:
    """Writes per forward of the linear schedule, in torch's float32, without empty ones."""
    counts, left = [], n
    for j in range(steps):
        t, s = (torch.tensor((steps - i) / steps, dtype=torch.float32) for i in (j, j + 1))
        kept = (1 - (1 - s)) / (1 - (1 - t))
        share = torch.tensor(left, dtype=torch.float64) * (1 - kept)
        counts.append(min(left, int(share.round())))
        left -= counts[-1]
    return [count for count in counts if count]


def quotas_of(masks: int, steps: int, schedule: str) -> list[int]:
    """Writes per forward of a window with so many masks."""
    if schedule == "mdlm":
        return mdlm_split(masks, steps)
    return [count for count in rules.split(masks, steps) if count]


def windows_of(length: int, holes: Sequence[Range], size: int | None) -> list[Range]:
    """Windows with something to fill."""
    open_ = {p for hole in holes for p in range(*hole)}
    size = size or length
    cut = [(low, min(low + size, length)) for low in range(0, length, size)]
    return [window for window in cut if open_ & set(range(*window))]


@torch.inference_mode()
def fill(
    model: OracleModel,
    row: Sequence[int],
    holes: Sequence[Range],
    *,
    block_length: int | None,
    steps_per_block: int,
    schedule: str = "uniform",
    cfg_scale: float = 0.0,
) -> Filled:
    """Fills a row, the most confident proposals first."""
    x = torch.tensor([list(row)])
    masked = torch.zeros_like(x, dtype=torch.bool)
    for start, end in holes:
        masked[0, start:end] = True
    given = ~masked
    x[masked] = model.mask_id
    forwards, steps = 0, dict[int, int]()
    for low, high in windows_of(x.shape[1], holes, block_length):
        for count in quotas_of(int(masked[0, low:high].sum()), steps_per_block, schedule):
            z = guided(model, x, given, cfg_scale)
            z = shift(z) if model.shifted else z
            forwards += 1
            for p in _best(z[0], masked[0], range(low, high), count, model.mask_id):
                x[0, p], masked[0, p], steps[p] = _token(z[0, p], model.mask_id), False, forwards
    tokens: list[int] = x[0].tolist()
    return Filled(tokens, forwards, [steps[p] for p in sorted(steps)])


def _token(z: Tensor, mask_id: int) -> int:
    return max((t for t in range(z.shape[0]) if t != mask_id), key=lambda t: float(z[t]))


def _best(z: Tensor, masked: Tensor, window: range, count: int, mask_id: int) -> list[int]:
    """The most confident masked positions of a window; equal ones from the left."""
    p = z.softmax(dim=-1)
    found = [i for i in window if masked[i]]
    return sorted(found, key=lambda i: (-float(p[i, _token(z[i], mask_id)]), i))[:count]


@torch.inference_mode()
def by_policy(
    model: OracleModel,
    row: Sequence[int],
    holes: Sequence[Range],
    *,
    block_length: int | None,
    steps_per_block: int,
    settings: Settings,
    policy: Policy,
) -> policies.Result:
    """Fills a row by any rule and cache; the result's tokens go from the first hole to the end."""
    open_ = [any(low <= p < high for low, high in holes) for p in range(len(row))]
    slots = Slots(
        [model.mask_id if o else token for o, token in zip(open_, row, strict=True)],
        list(open_),
        [UNWRITTEN if o else PROMPT for o in open_],
    )
    windows = windows_of(len(row), holes, block_length)
    before: list[int | None] = [None, *(low for low, _ in windows)]
    blocks = [Block(*w, b) for w, b in zip(windows, before[:-1], strict=True)]
    layer = model.dims.layers // 2 if policy.cache == "drift" else None
    request = policies.Request(model, policy, blocks, holes[0][0], slots, Store(len(row), layer))
    request.shadowed = settings.unmask == "wino"
    scheduled: list[Any] = [
        quotas_of(sum(open_[low:high]), steps_per_block, "uniform") for low, high in windows
    ]
    return policies.decode(request, settings, scheduled)
