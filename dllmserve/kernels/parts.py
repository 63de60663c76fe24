"""Attention whose keys are split among programs: each leaves a part, the last weighs them all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllmserve.kernels.pages import put
from dllmserve.kernels.tiles import MAX_PROGRAMS

NEVER = tl.constexpr(float("-inf"))


def room_for_turns(device: torch.device) -> Tensor:
    """Counters [MAX_PROGRAMS] int32 of the parts that are done, one for each tile."""
    return torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device)


def room_for_parts(
    out: Tensor,  # [N, Hq, D]
    parts: int,
    turns: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the parts' outputs, for the sums of their weights, and for counters.

    Returns:
        [parts, N, Hq, D] float32, [parts, N, Hq] float32, and ``turns`` or new ones; of a single
        part, which needs none, ``out`` in their place.
    """
    if parts == 1:
        return out, out, out
    found = torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)
    sums = torch.empty(found.shape[:-1], dtype=torch.float32, device=out.device)
    return found, sums, room_for_turns(out.device) if turns is None else turns


@triton.jit
def _combine(
    found: tl.tensor,
    sums: tl.tensor,
    out: tl.tensor,
    place: tl.tensor,  # [M] int64, token and head of a tile's rows
    step: tl.tensor,  # from part to part
    real: tl.tensor,  # [M]
    DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Weigh the parts of a tile, in their order: the program that was done last does it."""
    peak = tl.full([M], NEVER, dtype=tl.float32)
    for part in tl.static_range(PARTS):
        seen = tl.load(sums + part * step + place, mask=real, other=0.0, cache_modifier=".cg")
        peak = tl.maximum(peak, seen)
    acc = tl.zeros([M, D], dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    d = tl.arange(0, D)[None, :]
    for part in tl.static_range(PARTS):
        seen = tl.load(sums + part * step + place, mask=real, other=0.0, cache_modifier=".cg")
        weight = tl.exp2(seen - peak)
        # others wrote it a moment ago: it is read from where they wrote, not from a nearer cache
        value = tl.load(
            found + (part * step + place)[:, None] * DIM + d,
            mask=real[:, None] & (d < DIM),
            other=0.0,
            cache_modifier=".cg",
        )
        acc += value * weight[:, None]
        total += weight
    put(out, place * DIM, real, acc / total[:, None], DIM, D)


@triton.jit
def leave_part(
    acc: tl.tensor,  # [M, D] float32, weighted values
    peak: tl.tensor,  # [M] float32, greatest score
    total: tl.tensor,  # [M] float32, sum of weights
    found: tl.tensor,  # [PARTS, N, Hq, D] float32, the parts' outputs
    sums: tl.tensor,  # [PARTS, N, Hq] float32, log2 of the sums of their weights
    turn: tl.tensor,  # pointer to the tile's counter, which is 0 again afterwards
    out: tl.tensor,
    part: tl.tensor,
    place: tl.tensor,  # [M] int64, token and head of the tile's rows
    step: tl.tensor,  # from part to part
    real: tl.tensor,  # [M]
    DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Leave a part of a tile; the program that is done last puts the tile together."""
    # a part of an empty context has seen nothing: its sum stays -inf, its weight is 0
    total = tl.where(total == 0.0, 1.0, total)
    own = part * step + place
    tl.store(sums + own, peak + tl.log2(total), mask=real)
    put(found, own * DIM, real, acc / total[:, None], DIM, D)
    tl.debug_barrier()  # what all threads have stored comes before the count
    if tl.atomic_add(turn, 1, sem="acq_rel") == PARTS - 1:
        tl.store(turn, 0)
        _combine(found, sums, out, place, step, real, DIM, D, M, PARTS)
