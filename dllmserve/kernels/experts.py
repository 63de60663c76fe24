"""Products of a mixture of experts: every expert with the tokens that chose it, in one launch.

A pair is a token and one of its choices. A tile of a launch is one expert, some of its pairs and
some of its outputs; which expert a tile has is found from the numbers of pairs, on the device, so
a launch has the same size whatever tokens choose, and can be part of a CUDA graph::

    counts   | 3 | 0 | 5 | 1 |          pairs of each expert
    tiles    |0|     |1 2|3|            of at most 4 pairs each
    order    expert 2: | 7 0 4 9 2 |    its pairs, n * choices + j

Rows are in the order of pairs, before and after a product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllmserve.kernels.activation import activate
from dllmserve.kernels.e4m3 import Rows, Scaled


@dataclass(frozen=True)
class Tiling:
    """Shape of a program's work.

    Attributes:
        pairs, outs, depth: rows, outputs, and what of the inner dimension is loaded at once.
        warps, stages: as in Triton.
        more: rows beside ``pairs``.
    """

    pairs: int
    outs: int
    depth: int
    warps: int
    stages: int
    more: int = 0


#: of half precision, by the largest mean number of an expert's pairs that it is for. Measured on an
#: H200 with 256 experts of 512 and 128 of 768, hidden size 2048, and 128 of 704, 2816.
_UP = {
    10: Tiling(16, 64, 128, 4, 3),
    20: Tiling(32, 128, 64, 8, 3),
    40: Tiling(32, 64, 64, 4, 3, more=16),
    90: Tiling(64, 64, 64, 4, 4, more=16),
    380: Tiling(128, 64, 64, 4, 3, more=32),
}
_DOWN = {
    10: Tiling(16, 64, 64, 4, 4),
    20: Tiling(32, 128, 64, 8, 3),
    90: Tiling(64, 128, 64, 4, 3),
    180: Tiling(128, 128, 64, 4, 3, more=32),
}
_MANY = {True: Tiling(128, 128, 64, 8, 3), False: Tiling(128, 256, 64, 8, 3)}
#: of float32: one for every number of rows, so that it cannot change a bit
_EXACT = Tiling(16, 32, 32, 4, 2)


def tiling_for(dtype: torch.dtype, mean: int, gated: bool) -> Tiling:
    """The tiling of a launch whose experts have ``mean`` pairs each on average."""
    if dtype == torch.float32:
        return _EXACT
    return next((t for most, t in (_UP if gated else _DOWN).items() if mean <= most), _MANY[gated])


@triton.jit
def _tile_of(
    counts_ptr: tl.tensor,
    tile: tl.tensor,
    experts: tl.tensor,
    EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A tile's expert, its first pair among the expert's, and their number."""
    e = tl.arange(0, EXPERTS)
    count = tl.load(counts_ptr + e, mask=e < experts, other=0)
    tiles = (count + PAIRS - 1) // PAIRS
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(e < expert, tiles, 0), 0)
    return expert, (tile - before) * PAIRS, tl.sum(tl.where(e == expert, count, 0), 0)


@triton.jit
def _places(
    base: tl.tensor,
    row: tl.tensor,  # int64
    depth: tl.tensor,
    k: tl.tensor,
) -> tl.tensor:
    """Pointers to rows' first columns."""
    return base + row[:, None] * depth + k[None, :]


@triton.jit
def _pairs_of(
    order_ptr: tl.tensor,  # pointer to the expert's
    x_ptr: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    choices: tl.tensor,
    depth: tl.tensor,
    k: tl.tensor,
    PAIRS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Some of an expert's pairs, which are real, and where their rows begin."""
    place = first + tl.arange(0, PAIRS)
    pair = tl.load(order_ptr + place, mask=place < count, other=0)
    return pair, place < count, _places(x_ptr, (pair // choices).to(tl.int64), depth, k)


@triton.jit
def _load(place: tl.tensor, ok: tl.tensor, inside: tl.tensor, EVEN: tl.constexpr) -> tl.tensor:
    """Rows of which some are real, and a part of their columns."""
    if EVEN:
        return tl.load(place, mask=ok, other=0.0)
    return tl.load(place, mask=ok & inside, other=0.0)


@triton.jit
def _store(
    out_ptr: tl.tensor,
    total: tl.tensor,  # [OUTS, pairs] float32
    above: tl.tensor,
    pair: tl.tensor,
    pair_ok: tl.tensor,
    out: tl.tensor,
    outs: tl.tensor,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
) -> None:
    """Results to the rows of their pairs."""
    dtype = out_ptr.dtype.element_ty
    found = total.to(dtype)
    if GATED:
        wide = found.to(tl.float32)
        # rounded to the dtype after every operation, as torch's calls do
        act = activate(wide, GELU).to(dtype)
        found = (act.to(tl.float32) * above.to(dtype).to(tl.float32)).to(dtype)
    to = out_ptr + pair.to(tl.int64)[None, :] * outs + out[:, None]
    tl.store(to, found, mask=pair_ok[None, :] & (out < outs)[:, None])


@triton.jit
def _leave(
    out_ptr: tl.tensor,
    total: tl.tensor,  # [OUTS, pairs] float32
    above: tl.tensor,
    pair: tl.tensor,
    pair_ok: tl.tensor,
    x_scale_ptr: tl.tensor,
    scale_ptr: tl.tensor,  # pointer to the expert's
    out: tl.tensor,
    outs: tl.tensor,
    choices: tl.tensor,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    E4M3: tl.constexpr,
) -> None:
    """Results to the rows of their pairs; sums of e4m3 numbers times the factors of their rows."""
    if E4M3:
        x_scale = tl.load(x_scale_ptr + pair // choices, mask=pair_ok, other=0.0)[None, :]
        total *= tl.load(scale_ptr + out, mask=out < outs, other=0.0)[:, None] * x_scale
        if GATED:
            scale = tl.load(scale_ptr + outs + out, mask=out < outs, other=0.0)
            above *= scale[:, None] * x_scale
    _store(out_ptr, total, above, pair, pair_ok, out, outs, GATED, GELU)


# numbers of tokens must not choose the machine code; weights come first in products, because with
# few pairs the matrix units want the longer side there
@triton.jit(do_not_specialize=["num_tokens"])
def _product_kernel(
    x_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    order_ptr: tl.tensor,
    num_tokens: tl.tensor,
    experts: tl.tensor,
    choices: tl.tensor,
    outs: tl.tensor,
    depth: tl.tensor,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    E4M3: tl.constexpr,
    EVEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
    MORE: tl.constexpr,
    OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    out_tiles = tl.cdiv(outs, OUTS)
    tile = tl.program_id(0) // out_tiles
    expert, first, count = _tile_of(counts_ptr, tile, experts, EXPERTS, PAIRS + MORE)
    if first >= count:
        return
    order_ptr += expert.to(tl.int64) * num_tokens
    out = (tl.program_id(0) % out_tiles) * OUTS + tl.arange(0, OUTS)
    k = tl.arange(0, DEPTH)
    rows_of = (count, choices, depth, k)
    pair, pair_ok, x_place = _pairs_of(order_ptr, x_ptr, first, *rows_of, PAIRS)
    rows = expert.to(tl.int64) * outs * (2 if GATED else 1)
    w_place = _places(weight_ptr, rows + out, depth, k)
    w_above = _places(weight_ptr, rows + outs + out, depth, k)
    w_ok = (out < outs)[:, None]
    total = tl.zeros((OUTS, PAIRS), dtype=tl.float32)
    above = tl.zeros((OUTS, PAIRS), dtype=tl.float32)
    if MORE:  # a tile has rows of two lengths, since each has to be a power of two
        pair_more, more_ok, y_place = _pairs_of(order_ptr, x_ptr, first + PAIRS, *rows_of, MORE)
        total_more = tl.zeros((OUTS, MORE), dtype=tl.float32)
        above_more = tl.zeros((OUTS, MORE), dtype=tl.float32)
    for low in range(0, depth, DEPTH):
        inside = (k < depth - low)[None, :]
        x = _load(x_place + low, pair_ok[:, None], inside, EVEN)
        w = _load(w_place + low, w_ok, inside, EVEN)
        total = tl.dot(w, tl.trans(x), total, input_precision="ieee")
        if MORE:
            y = _load(y_place + low, more_ok[:, None], inside, EVEN)
            total_more = tl.dot(w, tl.trans(y), total_more, input_precision="ieee")
        if GATED:
            v = _load(w_above + low, w_ok, inside, EVEN)
            above = tl.dot(v, tl.trans(x), above, input_precision="ieee")
            if MORE:
                above_more = tl.dot(v, tl.trans(y), above_more, input_precision="ieee")
    where = (x_scale_ptr, scale_ptr + rows, out, outs, choices)
    _leave(out_ptr, total, above, pair, pair_ok, *where, GATED, GELU, E4M3)
    if MORE:
        _leave(out_ptr, total_more, above_more, pair_more, more_ok, *where, GATED, GELU, E4M3)


def _with_scales(x: Rows) -> tuple[Tensor, Tensor]:
    """What a launch is given of rows: them, and their factors, or something in their place."""
    return x[:2] if isinstance(x, Scaled) else (x, x)


def expert_product(
    x: Rows,
    weight: Rows,
    counts: Tensor,
    order: Tensor,
    choices: int,
    among: int,
    *,
    activation: str = "",
) -> Tensor:
    """Rows of pairs times the matrices of their experts, which may be gates and ups of an MLP.

    In float32 a row's bits do not depend on the other rows.

    Args:
        x: rows of tokens [N, d] if gated, else of pairs [N*K, d], contiguous; in e4m3 if the
            weight is.
        weight: [E', out, d], or [E', 2 * out, d] if gated: the gate's rows of an expert, then the
            up's.
        counts: [E'] int32, pairs of each expert.
        order: [E', N] int32, the pairs of each expert, n * K + j.
        choices: K.
        among: experts that pairs are spread over, those of other ranks included.
        activation: "silu" or "gelu_tanh" if the result is gated, ``act(gate) * up``.

    Returns:
        [N*K, out]; rows of pairs that no expert has are undefined.

    Example:
        ``inner = expert_product(x, gate_up, counts, order, 8, 256, activation="silu")``
    """
    gated = activation != ""
    experts, depth = weight.shape[0], weight.shape[2]
    outs = weight.shape[1] // 2 if gated else weight.shape[1]
    pairs = order.shape[1] * choices
    out = torch.empty((pairs, outs), dtype=x.dtype, device=counts.device)
    tiling = tiling_for(x.dtype, pairs // max(among, 1), gated)
    if isinstance(x, Scaled):  # of the same bytes
        tiling = replace(tiling, depth=2 * tiling.depth)
    tiles = min(pairs, pairs // (tiling.pairs + tiling.more) + experts)
    if pairs:
        _product_kernel[(tiles * triton.cdiv(outs, tiling.outs),)](
            *(*_with_scales(x), *_with_scales(weight), out, counts, order),
            *(order.shape[1], experts, choices if gated else 1, outs, depth),
            GATED=gated,
            GELU=activation == "gelu_tanh",
            E4M3=isinstance(x, Scaled),
            EVEN=depth % tiling.depth == 0,
            EXPERTS=triton.next_power_of_2(experts),
            PAIRS=tiling.pairs,
            MORE=tiling.more,
            OUTS=tiling.outs,
            DEPTH=tiling.depth,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
    return out


@triton.jit
def _combine_kernel(
    rows_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.tensor,
    held_from: tl.tensor,
    held_to: tl.tensor,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in tl.static_range(PAIRS):
        pair = token * PAIRS + j
        weight = tl.load(weights_ptr + pair)
        expert = tl.load(ids_ptr + pair)
        length = tl.where((expert >= held_from) & (expert < held_to), width, 0)
        row = tl.load(rows_ptr + pair * width + column, mask=column < length, other=0.0)
        total += weight * row.to(tl.float32)
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def combine_pairs(
    rows: Tensor,  # [N*K, d]
    ids: Tensor,  # [N, K] int32
    weights: Tensor,  # [N, K] float32
    held: range,
) -> Tensor:
    """``sum_j weights[n, j] * rows[n*K + j]`` in float32, in the order of j: [N, d].

    Args:
        rows: of pairs.
        ids: experts of pairs.
        weights: of pairs.
        held: experts whose rows are defined; the others count nothing.
    """
    (tokens, pairs), width = ids.shape, rows.shape[1]
    out = torch.empty((tokens, width), dtype=rows.dtype, device=rows.device)
    block = min(triton.next_power_of_2(width), 1024)
    if tokens:
        _combine_kernel[(tokens, triton.cdiv(width, block))](
            *(rows, ids, weights, out, width),
            *(held.start, held.stop),
            PAIRS=pairs,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,  # torch rounds after every operation
        )
    return out
