"""Which positions have the largest keys: the twin of :func:`dllmserve.decoding.rule.write_best`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_HIGHEST = tl.constexpr(2**63 - 1)

#: Positions that a program ranks, and that it compares them with at once.
_RANKED, _COMPARED = 32, 128
#: Counting takes the square of the width; above, sorting is faster.
MAX_RANKED = 1024


@triton.jit
def _ordered(keys: tl.tensor, place: tl.tensor, columns: tl.tensor) -> tl.tensor:
    """Keys as int64 of the same order; NaN is the greatest, as in torch's sort."""
    key = tl.load(keys + place, mask=place < columns, other=0.0).to(tl.float64)
    bits = tl.where(key == 0.0, 0.0, key).to(tl.int64, bitcast=True)  # -0 equals 0
    return tl.where(key != key, _HIGHEST, bits ^ ((bits >> 63) & _HIGHEST))


@triton.jit(do_not_specialize=["columns"])
def _pick_best(
    keys: tl.tensor,
    counts: tl.tensor,
    eligible: tl.tensor,
    write: tl.tensor,
    columns: tl.tensor,
    RANKED: tl.constexpr,
    COMPARED: tl.constexpr,
) -> None:
    """Rank a tile of positions: how many come before each, ties by position."""
    base = tl.program_id(0).to(tl.int64) * columns
    keys += base
    own = tl.program_id(1) * RANKED + tl.arange(0, RANKED)
    key = _ordered(keys, own, columns)[:, None]
    rank = tl.zeros([RANKED], dtype=tl.int32)
    for low in range(0, columns, COMPARED):
        place = low + tl.arange(0, COMPARED)
        other = _ordered(keys, place, columns)[None, :]
        earlier = place[None, :] < own[:, None]
        before = (other > key) | ((other == key) & earlier)
        rank += tl.sum((before & (place < columns)[None, :]).to(tl.int32), 1)
    count = tl.maximum(tl.load(counts + tl.program_id(0)), 1)
    can = tl.load(eligible + base + own, mask=own < columns, other=0) != 0
    tl.store(write + base + own, can & (rank < count), mask=own < columns)


def pick_best(
    key: Tensor,  # [n, W] floating
    count: Tensor,  # [n] int64
    eligible: Tensor,  # [n, W] bool
) -> Tensor:
    """The ``count`` (at least one) eligible positions with the largest key: [n, W] bool.

    Ties go to the lower position; see :func:`dllmserve.decoding.rule.write_best`.
    """
    rows, columns = key.shape
    write = torch.empty((rows, columns), dtype=torch.bool, device=key.device)
    _pick_best[(rows, triton.cdiv(columns, _RANKED))](
        *(key.contiguous(), count.contiguous(), eligible.contiguous(), write, columns),
        RANKED=_RANKED,
        COMPARED=_COMPARED,
    )
    return write
