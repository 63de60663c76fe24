"""Launch shapes of the attention kernel; this is what to tune on a new device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

#: Programs that fill the device (an H100 has 132 multiprocessors).
MAX_PROGRAMS = 528
#: So many leave most of it idle.
FEW_PROGRAMS = 32


@dataclass(frozen=True)
class Tile:
    """Shape of a program's work.

    Attributes:
        block_m: rows of the query tile (queries times the query heads of a K,V head).
        block_n: keys that are loaded at once.
        num_warps, num_stages: as in Triton.
        max_registers: of a thread; None leaves it to the compiler.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def options(self) -> dict[str, int | None]:
        """What a launch is told besides its sizes."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
        }


def tile_for(dtype: torch.dtype, head_dim: int, group: int, max_q: int, heads: int) -> Tile:
    """The tile of a launch.

    Args:
        dtype: of the queries.
        head_dim, group: size of a head, and query heads of a K,V head.
        max_q: most queries of a span.
        heads: K,V heads of all spans together.

    In float32 it depends on the model alone: sums are then made in the same order whatever
    else is in the batch, so a request's result does not change by a bit.
    """
    wide = head_dim > 128
    if head_dim > 256:
        # outputs alone fill most registers; these tiles spill nothing on sm_90
        if dtype == torch.float32:
            return Tile(16, 32, 8, 1)
        rows = max(16, min(triton.next_power_of_2(group * max_q), 32))
        if heads * triton.cdiv(group * max_q, 64) > MAX_PROGRAMS:
            return Tile(64, block_n=32, num_warps=8, num_stages=2)
        return Tile(rows, block_n=32, num_warps=4, num_stages=2)
    if dtype == torch.float32:
        # no tensor cores here, so registers set the limits; these spill nothing on sm_90
        return Tile(16, 64, 8, 1) if wide else Tile(32, 64, 8, 2)
    rows = max(16, min(triton.next_power_of_2(group * max_q), 64))
    if rows == 64 and group > 1 and heads * triton.cdiv(group * max_q, 64) <= FEW_PROGRAMS:
        rows = 32  # measured with one request of LLaDA2-mini: 6 % more tokens a second
    if wide:
        if heads * triton.cdiv(group * max_q, 128) > MAX_PROGRAMS:
            return Tile(128, block_n=64, num_warps=8, num_stages=2)
        return Tile(rows, block_n=32, num_warps=4, num_stages=2 if rows == 64 else 3)
    if rows == 64:
        return Tile(rows, block_n=64, num_warps=4, num_stages=3)
    # a small tile waits for memory: with 128 registers several of them share a multiprocessor
    if group > 1:  # measured at groups of 4: 5 to 8 % faster than tiles of 32 keys
        return Tile(rows, block_n=64, num_warps=4, num_stages=2, max_registers=128)
    return Tile(rows, block_n=32, num_warps=4, num_stages=3, max_registers=128)


def parts_for(dtype: torch.dtype, programs: int, context: int) -> int:
    """Into how many parts the context is split where the launch would not fill the device.

    Args:
        programs: programs of the launch without splitting.
        context: slots that a row may hold, of which a part has at least 128.

    Never in float32, see :func:`tile_for`.
    """
    if dtype == torch.float32:
        return 1
    parts = 1
    while parts < 16 and 2 * parts * programs <= MAX_PROGRAMS and context >= 256 * parts:
        parts *= 2
    return parts
