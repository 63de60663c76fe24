"""Selection of all selecting spans of a step in four launches.

What the launches do is what attention.select does with torch: the block's mean query is
multiplied with every candidate key, the products are reduced over query heads and
max-pooled over neighbours, and the best candidates' K,V go to the row's first slots. Ties
go to the lower position. A candidate is a token of the span outside the block's window;
candidate c is token c before the window and token c + (until - skip_from) behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllmserve.core.plan import Span, Store
from dllmserve.core.rows import RowSelect
from dllmserve.device import host_to_device
from dllmserve.kernels.pages import (
    BLK_LEN,
    BLK_OFF,
    FIELDS,
    KEEP,
    Q_LEN,
    ROW,
    STORE,
    heads_together,
    need_contiguous,
    padded,
    put,
    slots,
    vectors,
)
from dllmserve.parallel.group import SOLO, Group, join

_SHARED = tl.constexpr(int(Store.SELECT_SHARED))
_LOWEST = tl.constexpr(-(2**31))
_HIGHEST = tl.constexpr(2**31 - 1)

#: Columns of the settings tensor.
_SPAN = tl.constexpr(0)
_POOL = tl.constexpr(1)
_WINDOW = tl.constexpr(2)
_SETTINGS = tl.constexpr(3)

#: Tokens that a program takes at once, except where it has to see all candidates.
_BLOCK = 64


@dataclass(frozen=True)
class SelectPlan:
    """The selecting spans of a step, with room for what passes between launches.

    Attributes:
        settings: [n, 3] int32: index among the step's spans, pool width, window.
        means: [n, Hq, D] float32, mean query of the block.
        keys: [n, Hkv, C] int32, scores mapped to integers of the same order.
        picks: [n, Hkv, keep] int32, kept tokens of the span in ascending order.
        shift: the model's logit_shift.
        shared: [n] bool, spans whose heads keep the same tokens; None where none are, or one
            rank has all heads.
        group: ranks that share the heads.
    """

    settings: Tensor
    means: Tensor
    keys: Tensor
    picks: Tensor
    shift: int
    shared: Tensor | None = None
    group: Group = SOLO


def plan_selection(
    chosen: Sequence[tuple[int, Span, RowSelect]],
    heads: tuple[int, int, int],
    shift: int,
    device: torch.device,
    group: Group = SOLO,
) -> SelectPlan:
    """Gather the host's numbers once per step; the launches read the rest on the device.

    Args:
        chosen: index among the step's spans, span and settings of each selecting span.
        heads: query heads, K,V heads, head dimension.
        shift: the model's logit_shift.
        device: where the spans are.
        group: ranks that share the heads.
    """
    numbers = [n for place, _, how in chosen for n in (place, how.pool_kernel, how.window)]
    settings = host_to_device(numbers, device, torch.int32).view(-1, 3)
    count, candidates = len(chosen), 0
    for _, span, how in chosen:
        until = min(span.blk_off + max(span.blk_len, how.window), span.q_len)
        left = max(span.blk_off - shift, 0) + span.q_len - until
        candidates = max(candidates, left)
    keep = max(span.keep for _, span, _ in chosen)
    query_heads, kv_heads, dim = heads
    shared = None
    if group.size > 1 and any(span.store == Store.SELECT_SHARED for _, span, _ in chosen):
        flags = [int(span.store == Store.SELECT_SHARED) for _, span, _ in chosen]
        shared = host_to_device(flags, device) > 0

    def room(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return SelectPlan(
        settings=settings,
        means=room(count, query_heads, dim, dtype=torch.float32),
        keys=room(count, kv_heads, candidates, dtype=torch.int32),
        picks=room(count, kv_heads, keep, dtype=torch.int32),
        shift=shift,
        shared=shared,
        group=group,
    )


def keep_best(
    plan: SelectPlan,
    q: Tensor,  # [N, Hq, D] rotated, last dimension contiguous
    k: Tensor,  # [N, Hkv, D] likewise
    v: Tensor,  # [N, Hkv, D]
    k_cache: Tensor,  # [slots, Hkv, D] of one layer, contiguous
    v_cache: Tensor,  # [slots, Hkv, D]
    spans: Tensor,  # [S, 9] int32
    starts: Tensor,  # [S] int32
    page_table: Tensor,  # [rows + 1, P] int64, contiguous
    page_size: int,
) -> None:
    """Store the kept K,V of every selecting span in its row's slots 0 .. keep - 1.

    Raises:
        ValueError: the cache is not contiguous.

    Example:
        >>> plan = plan_selection([(0, span, RowSelect(3, 32))], (32, 8, 128), 0, q.device)
        >>> keep_best(plan, q, k, v, kv.k[0], kv.v[0], spans, starts, kv.page_table, 32)
    """
    need_contiguous(k_cache, v_cache)
    q, k, v = heads_together(q), heads_together(k), heads_together(v)
    count, kv_heads, candidates = plan.keys.shape
    keep = plan.picks.shape[2]
    if candidates == 0 or keep == 0:
        return
    dim = q.shape[2]
    known = (plan.settings, spans, starts)
    shape = {"GROUP": q.shape[1] // kv_heads, "HEADS": kv_heads, "DIM": dim, "D": padded(dim)}
    _mean[(count, q.shape[1])](
        *(q, plan.means, *known, q.stride(0)), **_only(shape, "DIM", "D"), N=32
    )
    _score[(count, kv_heads, triton.cdiv(candidates, _BLOCK))](
        *(k, plan.means, plan.keys, *known, k.stride(0), candidates, plan.shift),
        **shape,
        N=_BLOCK,
    )
    if plan.shared is not None:
        _score_all_heads(plan, plan.shared, k, known, shape)
    block = triton.next_power_of_2(candidates)
    _pick[(count, kv_heads)](
        *(plan.keys, plan.picks, *known[:2], candidates, keep, plan.shift),
        HEADS=kv_heads,
        N=block,
        num_warps=min(max(block // 512, 4), 32),
    )
    _gather[(count, kv_heads, triton.cdiv(keep, _BLOCK))](
        *(k, v, k_cache, v_cache, plan.picks, *known, page_table),
        *(k.stride(0), v.stride(0), page_table.stride(0), keep),
        **_only(shape, "HEADS", "DIM", "D"),
        N=_BLOCK,
        PAGE=page_size,
    )


def _score_all_heads(
    plan: SelectPlan,
    shared: Tensor,  # [n] bool
    k: Tensor,  # [N, Hkv, D], of this rank's heads
    known: tuple[Tensor, Tensor, Tensor],
    shape: dict[str, int],
) -> None:
    """Scores of spans whose heads keep the same tokens, from the heads of all ranks.

    The same launch with all heads sums in the same order as on one rank.
    """
    count, heads, candidates = plan.keys.shape
    k, means = heads_together(join(plan.group, k, 1)), join(plan.group, plan.means, 1)
    whole = {**shape, "HEADS": heads * plan.group.size}
    keys = plan.keys.new_empty(count, whole["HEADS"], candidates)
    _score[(count, 1, triton.cdiv(candidates, _BLOCK))](
        *(k, means, keys, *known, k.stride(0), candidates, plan.shift), **whole, N=_BLOCK
    )
    plan.keys[:, 0] = torch.where(shared[:, None], keys[:, 0], plan.keys[:, 0])


def _only(values: dict[str, int], *names: str) -> dict[str, int]:
    return {name: values[name] for name in names}


@triton.jit
def _span(settings: tl.tensor, spans: tl.tensor) -> Any:
    """Pointers to the program's settings and span."""
    settings += tl.program_id(0) * _SETTINGS
    return settings, spans + tl.load(settings + _SPAN) * FIELDS


@triton.jit
def _window(settings: tl.tensor, span: tl.tensor, shift: tl.tensor) -> Any:
    """Tokens skip_from .. until - 1 never compete; also the number of those that do."""
    q_len, offset = tl.load(span + Q_LEN), tl.load(span + BLK_OFF)
    width = tl.maximum(tl.load(span + BLK_LEN), tl.load(settings + _WINDOW))
    until = tl.minimum(offset + width, q_len)
    skip_from = tl.maximum(offset - shift, 0)
    return skip_from, until, skip_from + q_len - until


@triton.jit
def _start(settings: tl.tensor, starts: tl.tensor) -> Any:
    """First packed token of the program's span, int64."""
    return tl.load(starts + tl.load(settings + _SPAN)).to(tl.int64)


@triton.jit
def _ordered(score: tl.tensor) -> Any:
    """Integers [n] int32 in the order of float32 scores [n]; NaN is the greatest."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0 equals 0
    key = bits ^ ((bits >> 31) & _HIGHEST)
    return tl.where(score != score, _HIGHEST, key)


@triton.jit
def _mean(
    q: tl.tensor,
    means: tl.tensor,
    settings: tl.tensor,
    spans: tl.tensor,
    starts: tl.tensor,
    q_token: tl.tensor,
    DIM: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """Mean of the block's queries, one query head per program."""
    settings, span = _span(settings, spans)
    offset = tl.load(span + BLK_OFF)
    _, until, _ = _window(settings, span, 0)
    q += _start(settings, starts) * q_token + tl.program_id(1) * DIM
    total = tl.zeros([D], dtype=tl.float32)
    for j in range(offset, until, N):
        token = j + tl.arange(0, N)
        tile = vectors(q, token.to(tl.int64) * q_token, token < until, DIM, D)
        total += tl.sum(tile.to(tl.float32), 0)
    d = tl.arange(0, D)
    place = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * DIM
    tl.store(means + place + d, total / (until - offset).to(tl.float32), mask=d < DIM)


@triton.jit
def _score(
    k: tl.tensor,
    means: tl.tensor,
    keys: tl.tensor,
    settings: tl.tensor,
    spans: tl.tensor,
    starts: tl.tensor,
    k_token: tl.tensor,
    candidates: tl.tensor,
    shift: tl.tensor,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """Scores of a tile of candidates for one K,V head; if shared, head 0 does all of them."""
    settings, span = _span(settings, spans)
    skip_from, until, count = _window(settings, span, shift)
    first = tl.program_id(2) * N
    shared = tl.load(span + STORE) == _SHARED
    own = tl.program_id(1)
    if (first >= count) | (shared & (own > 0)):
        return
    candidate = first + tl.arange(0, N)
    valid = candidate < count
    token = tl.where(candidate < skip_from, candidate, candidate + until - skip_from)
    k += _start(settings, starts) * k_token
    means += tl.program_id(0) * (HEADS * GROUP * DIM)
    d = tl.arange(0, D)
    best = tl.full([N], float("-inf"), dtype=tl.float32)
    total = tl.zeros([N], dtype=tl.float32)
    for head in range(own, tl.where(shared, HEADS, own + 1)):
        tile = vectors(k + head * DIM, token.to(tl.int64) * k_token, valid, DIM, D)
        for member in range(GROUP):
            place = (head * GROUP + member) * DIM + d
            mean = tl.load(means + place, mask=d < DIM, other=0.0)
            score = tl.sum(tile.to(tl.float32) * mean[None, :], 1)
            best = tl.maximum(best, score)
            total += score
    key = _ordered(tl.where(shared, total / (HEADS * GROUP), best))
    place = (tl.program_id(0) * HEADS + own).to(tl.int64) * candidates + candidate
    tl.store(keys + place, key, mask=valid)


@triton.jit
def _pooled(keys: tl.tensor, candidate: tl.tensor, count: tl.tensor, width: tl.tensor) -> Any:
    """Greatest key [n] int32 among ``width`` neighbours, half of them before the candidate."""
    best = tl.full(candidate.shape, _LOWEST, dtype=tl.int32)
    for i in range(width):
        near = candidate + i - width // 2
        inside = (near >= 0) & (near < count)
        best = tl.maximum(best, tl.load(keys + near, mask=inside, other=_LOWEST))
    return best


@triton.jit
def _greatest(key: tl.tensor, keep: tl.tensor) -> Any:
    """Flags [n] bool of the ``keep`` greatest keys [n] int64 in 0 .. 2^32 - 1; -1 is none.

    The cut, which is the keep-th greatest key, is found bit by bit: it is the greatest
    number that at least ``keep`` keys reach.
    """
    cut = tl.full([], 0, dtype=tl.int64)
    for i in range(32):
        trial = cut + (tl.full([], 2**31, dtype=tl.int64) >> i)
        reached = tl.sum((key >= trial).to(tl.int32), 0)
        cut = tl.where(reached >= keep, trial, cut)
    above = key > cut
    tied = key == cut
    room = keep - tl.sum(above.to(tl.int32), 0)
    return above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))


@triton.jit
def _pick(
    keys: tl.tensor,
    picks: tl.tensor,
    settings: tl.tensor,
    spans: tl.tensor,
    candidates: tl.tensor,
    most: tl.tensor,
    shift: tl.tensor,
    HEADS: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """Pool the scores of one K,V head and list the tokens that it keeps."""
    settings, span = _span(settings, spans)
    skip_from, until, count = _window(settings, span, shift)
    keep = tl.minimum(tl.load(span + KEEP), count)
    if keep == 0:
        return
    shared = tl.load(span + STORE) == _SHARED
    source = tl.program_id(0) * HEADS + tl.where(shared, 0, tl.program_id(1))
    candidate = tl.arange(0, N)
    # a wider window than this one covers everything as well
    width = tl.minimum(tl.maximum(tl.load(settings + _POOL), 1), 2 * count + 1)
    best = _pooled(keys + source.to(tl.int64) * candidates, candidate, count, width)
    key = tl.where(candidate < count, best.to(tl.int64) + 2**31, -1)
    kept = _greatest(key, keep)
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    token = tl.where(candidate < skip_from, candidate, candidate + until - skip_from)
    picks += (tl.program_id(0) * HEADS + tl.program_id(1)).to(tl.int64) * most
    tl.store(picks + place, token, mask=kept)


@triton.jit
def _gather(
    k: tl.tensor,
    v: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    picks: tl.tensor,
    settings: tl.tensor,
    spans: tl.tensor,
    starts: tl.tensor,
    page_table: tl.tensor,
    k_token: tl.tensor,
    v_token: tl.tensor,
    pages: tl.tensor,
    most: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    PAGE: tl.constexpr,
) -> None:
    """Copy the kept tokens' K,V of one K,V head into the row's first slots."""
    settings, span = _span(settings, spans)
    keep = tl.load(span + KEEP)
    if tl.program_id(2) * N >= keep:
        return
    number = tl.program_id(2) * N + tl.arange(0, N)
    valid = number < keep
    head = tl.program_id(1)
    picks += (tl.program_id(0) * HEADS + head).to(tl.int64) * most
    token = _start(settings, starts) + tl.load(picks + number, mask=valid, other=0)
    table = page_table + tl.load(span + ROW).to(tl.int64) * pages
    slot = slots(table, number, valid, PAGE) * (HEADS * DIM) + head * DIM
    put(k_cache, slot, valid, vectors(k + head * DIM, token * k_token, valid, DIM, D), DIM, D)
    put(v_cache, slot, valid, vectors(v + head * DIM, token * v_token, valid, DIM, D), DIM, D)
