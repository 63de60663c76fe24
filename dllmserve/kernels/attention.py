"""Attention of all spans of a step in one launch: cached pages, then fresh K,V.

A program attends one tile of queries of one K,V head of one span. The query heads that
share the K,V head lie side by side in the tile's rows, so K,V are loaded once for all of
them, and a span of few queries still fills the tile. Everything about a span is read on
the device, so a captured launch serves every plan that its grid is large enough for.
"""

from __future__ import annotations

import os
from math import e, log2
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from dllmserve.kernels.pages import (
    CTX_LEN,
    FIELDS,
    MASK,
    MASK_ARG,
    MASK_BLIND,
    MASK_STAIR,
    Q_LEN,
    Q_START,
    ROW,
    STORE,
    STORE_AHEAD,
    STORE_POSITIONS,
    heads_together,
    need_contiguous,
    padded,
    put,
    reads_nothing,
    slots,
    store_fresh,
    vectors,
)
from dllmserve.kernels.parts import leave_part, room_for_parts
from dllmserve.kernels.tiles import parts_for, tile_for

#: Position of a key that no query sees, and horizon of a query that sees every other key.
_HIDDEN = tl.constexpr(2**31 - 1)
_NEVER = tl.constexpr(float("-inf"))
#: Triton's interpreter multiplies the bit patterns of bfloat16 as if they were integers.
_WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def span_attention(
    q: Tensor,  # [N, Hq, D] rotated, last dimension contiguous
    k: Tensor,  # [N, Hkv, D] likewise
    v: Tensor,  # [N, Hkv, D]
    out: Tensor,  # [N, Hq, D] contiguous
    k_cache: Tensor,  # [slots, Hkv, D] of one layer, contiguous
    v_cache: Tensor,  # [slots, Hkv, D]
    spans: Tensor,  # [S, len(SpanField)] int32, the fields of core.plan.Span
    starts: Tensor,  # [S] int32, first packed token of each span
    page_table: Tensor,  # [rows + 1, P] int64, contiguous
    page_size: int,
    max_q: int,
    *,
    scale: float,
    window: int = 0,
    skip_whole: bool = False,
    blind: bool = False,
    turns: Tensor | None = None,  # [MAX_PROGRAMS] int32, zeros; they are zeros again afterwards
) -> None:
    """Attend every span; store the fresh K,V of those that store POSITIONS (AHEAD is done).

    Args:
        max_q: upper bound of q_len, for which the grid is made.
        scale: scores are multiplied by it.
        window: as in :class:`dllmserve.core.model_spec.AttentionSpec`; slots are positions then.
        blind: whether there may be blind spans.
        turns: room for counters, which launches that follow one another may share; None makes it.
        skip_whole: leave out the spans that are a :attr:`dllmserve.core.plan.Span.refresh`:
            neither ``out`` nor pages are written for them (see :func:`store_pages`).

    Raises:
        ValueError: ``out`` or the cache is not contiguous.

    Example:
        >>> caches = (kv.k[0], kv.v[0])
        >>> span_attention(q, k, v, out, *caches, spans, starts, table, 32, 64, scale=128**-0.5)
    """
    tokens, heads, dim = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    need_contiguous(out, k_cache, v_cache)
    q, k, v = heads_together(q), heads_together(k), heads_together(v)
    count = spans.shape[0]
    tile = tile_for(q.dtype, dim, group, max_q, kv_heads * count)
    tiles = triton.cdiv(max_q * group, tile.block_m)
    if tiles == 0 or count == 0:
        return
    seen = page_table.shape[1] * page_size
    seen = min(seen, window) if window else seen
    parts = parts_for(q.dtype, tiles * kv_heads * count, seen)
    found, sums, turns = room_for_parts(out, parts, turns)
    sizes: dict[str, Any] = {"GROUP": group, "HEADS": kv_heads, "DIM": dim, "D": padded(dim)}
    sizes |= {"M": tile.block_m, "N": tile.block_n, "PARTS": parts, "PAGE": page_size}
    sizes |= {"SKIP_WHOLE": skip_whole, "WINDOW": window, "BLIND": blind}
    _attend[(tiles * parts, kv_heads, count)](
        *(q, k, v, out, found, sums, turns, k_cache, v_cache, spans, starts, page_table),
        *(tokens, q.stride(0), k.stride(0), v.stride(0), page_table.stride(0)),
        log2(e) * scale,
        **sizes,
        **tile.options(),
    )


def store_pages(
    k: Tensor,  # [N, Hkv, D] rotated, last dimension contiguous
    v: Tensor,  # [N, Hkv, D]
    k_cache: Tensor,  # [slots, Hkv, D] of one layer, contiguous
    v_cache: Tensor,  # [slots, Hkv, D]
    spans: Tensor,  # [S, len(SpanField)] int32
    starts: Tensor,  # [S] int32
    page_table: Tensor,  # [rows + 1, P] int64, contiguous
    page_size: int,
    max_q: int,
) -> None:
    """Store the fresh K,V of the spans that ``skip_whole`` leaves out and that write them all.

    Raises:
        ValueError: the cache is not contiguous.

    Example:
        >>> store_pages(k, v, kv.k[0], kv.v[0], spans, starts, table, 32, max_q=1024)
    """
    kv_heads, dim = k.shape[1:]
    need_contiguous(k_cache, v_cache)
    k, v = heads_together(k), heads_together(v)
    block = 32
    _store[(triton.cdiv(max_q, block), kv_heads, spans.shape[0])](
        *(k, v, k_cache, v_cache, spans, starts, page_table),
        *(k.stride(0), v.stride(0), page_table.stride(0)),
        HEADS=kv_heads,
        DIM=dim,
        D=padded(dim),
        N=block,
        PAGE=page_size,
        num_warps=4,
    )


@triton.jit
def _see(
    acc: tl.tensor,  # [M, D] float32, weighted values so far
    peak: tl.tensor,  # [M] float32, greatest score so far
    total: tl.tensor,  # [M] float32, sum of weights so far
    q: tl.tensor,  # [M, D]
    k: tl.tensor,  # [N, D]
    v: tl.tensor,  # [N, D], zero where hidden
    position: tl.tensor,  # [N] int32 of the keys
    floor: tl.tensor,  # [M] int32, first position that a query sees, if there is a window
    horizon: tl.tensor,  # [M] int32, first position behind it that it does not see
    blind: tl.tensor,  # [M] int32, a position that it does not see either
    scale: tl.tensor,
    WINDOW: tl.constexpr,
    BLIND: tl.constexpr,
) -> Any:
    """One step of the running softmax, in powers of two."""
    if _WIDEN:
        q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(position[None, :] < horizon[:, None], scores, _NEVER)
    if WINDOW:
        scores = tl.where(position[None, :] >= floor[:, None], scores, _NEVER)
    if BLIND:
        scores = tl.where(position[None, :] == blind[:, None], _NEVER, scores)
    higher = tl.maximum(peak, tl.max(scores, 1))
    # a query that has seen no key yet has no peak to subtract
    base = tl.where(higher == _NEVER, 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(peak - base)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, higher, total * decay + tl.sum(weights, 1)


@triton.jit
def _see_cached(
    acc: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,  # [M, D]
    k_cache: tl.tensor,  # pointer to slot 0, own head
    v_cache: tl.tensor,
    table: tl.tensor,  # pointer to the row's pages
    low: tl.tensor,  # keys low .. high - 1: key i is at position i, from ``gap`` on at i + skipped
    high: tl.tensor,
    gap: tl.tensor,
    skipped: tl.tensor,
    floor: tl.tensor,  # [M]
    horizon: tl.tensor,  # [M]
    blind: tl.tensor,  # [M]
    scale: tl.tensor,
    SLOT: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLIND: tl.constexpr,
) -> Any:
    """Attend cached keys, except those that the span overwrites."""
    for j in range(low, high, N):
        index = j + tl.arange(0, N)
        valid = index < high
        position = tl.where(index < gap, index, index + skipped)
        slot = slots(table, position, valid, PAGE) * SLOT
        k = vectors(k_cache, slot, valid, DIM, D)
        v = vectors(v_cache, slot, valid, DIM, D)
        position = tl.where(valid, position, _HIDDEN)
        acc, peak, total = _see(
            acc, peak, total, q, k, v, position, floor, horizon, blind, scale, WINDOW, BLIND
        )
    return acc, peak, total


@triton.jit
def _see_fresh(
    acc: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,  # [M, D]
    k: tl.tensor,  # pointer to the span's first token, own head
    v: tl.tensor,
    q_start: tl.tensor,
    low: tl.tensor,  # tokens low .. high - 1 of it
    high: tl.tensor,
    floor: tl.tensor,  # [M]
    horizon: tl.tensor,  # [M]
    scale: tl.tensor,
    k_token: tl.tensor,
    v_token: tl.tensor,
    DIM: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
) -> Any:
    """Attend the span itself."""
    for j in range(low, high, N):
        index = j + tl.arange(0, N)
        valid = index < high
        token = index.to(tl.int64)
        k_tile = vectors(k, token * k_token, valid, DIM, D)
        v_tile = vectors(v, token * v_token, valid, DIM, D)
        position = tl.where(valid, q_start + index, _HIDDEN)
        # a blind span sees all of itself
        acc, peak, total = _see(
            acc, peak, total, q, k_tile, v_tile, position, floor, horizon, horizon, scale,
            WINDOW, False,
        )  # fmt: skip
    return acc, peak, total


@triton.jit
def _horizon(span: tl.tensor, query: tl.tensor) -> Any:
    """First position [M] that the span's queries number ``query`` [M] do not see."""
    stair = tl.load(span + MASK) == MASK_STAIR
    step = tl.where(stair, tl.load(span + MASK_ARG), 1)
    block = (tl.load(span + Q_START) + query) // step
    return tl.where(stair, (block + 1) * step, _HIDDEN)


@triton.jit
def _floor(span: tl.tensor, query: tl.tensor, WINDOW: tl.constexpr) -> Any:
    """First position [M] that the span's queries number ``query`` [M] see through a window."""
    stair = tl.load(span + MASK) == MASK_STAIR
    return tl.load(span + Q_START) + tl.where(stair, query, 0) - WINDOW + 1


@triton.jit
def _tile(
    q: tl.tensor,  # [M, D]
    query: tl.tensor,  # [M] int32, number of the row's query in the span
    k: tl.tensor,  # pointer to the span's first token, own head
    v: tl.tensor,
    k_cache: tl.tensor,  # pointer to slot 0, own head
    v_cache: tl.tensor,
    table: tl.tensor,  # pointer to the row's pages
    span: tl.tensor,
    part: tl.tensor,
    k_token: tl.tensor,
    v_token: tl.tensor,
    scale: tl.tensor,
    PARTS: tl.constexpr,
    SLOT: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLIND: tl.constexpr,
) -> Any:
    """Attend a tile of queries to one part of the span's keys; the last has the fresh ones."""
    q_start, q_len = tl.load(span + Q_START), tl.load(span + Q_LEN)
    ctx_len = tl.load(span + CTX_LEN)
    store = tl.load(span + STORE)
    writes = store == STORE_POSITIONS
    before = tl.where(writes, tl.minimum(q_start, ctx_len), ctx_len)
    after = tl.where(writes, tl.maximum(ctx_len - q_start - q_len, 0), 0)
    count = before + after
    # what was stored ahead is among the cached keys
    fresh = tl.where((part == PARTS - 1) & (store != STORE_AHEAD), q_len, 0)
    skipped = q_start + q_len - before
    horizon = _horizon(span, query)
    least, own, floor = 0, 0, horizon
    if WINDOW:
        # keys that no query of the tile sees are left out, in whole steps of N: sums are made in
        # the same order as with them
        floor = _floor(span, query, WINDOW)
        first = tl.min(floor, 0)
        least = tl.minimum(tl.maximum(first, 0), before) // N * N
        own = tl.maximum(first - q_start, 0) // N * N
        fresh = tl.minimum(fresh, tl.max(horizon, 0) - q_start)
    share = tl.cdiv(tl.cdiv(count - least, PARTS), N) * N
    low = tl.minimum(least + part * share, count)
    high = tl.minimum(low + share, count)
    unseen = q_start + query + tl.load(span + MASK_ARG)
    blind = tl.where(tl.load(span + MASK) == MASK_BLIND, unseen, -1)
    acc = tl.zeros([M, D], dtype=tl.float32)
    peak = tl.full([M], _NEVER, dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    acc, peak, total = _see_cached(
        acc, peak, total, q, k_cache, v_cache, table, low, high, before, skipped, floor, horizon,
        blind, scale, SLOT, DIM, D, N, PAGE, WINDOW, BLIND,
    )  # fmt: skip
    return _see_fresh(
        acc, peak, total, q, k, v, q_start, own, fresh, floor, horizon, scale, k_token, v_token,
        DIM, D, N, WINDOW,
    )  # fmt: skip


@triton.jit
def _store_share(
    k: tl.tensor,  # pointer to the span's first token, own head
    v: tl.tensor,
    k_cache: tl.tensor,  # pointer to slot 0, own head
    v_cache: tl.tensor,
    table: tl.tensor,  # pointer to the row's pages
    span: tl.tensor,
    first: tl.tensor,
    part: tl.tensor,
    k_token: tl.tensor,
    v_token: tl.tensor,
    GROUP: tl.constexpr,
    SLOT: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PAGE: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Store the fresh K,V of the tokens that a query tile begins with, if the span stores any.

    Every tile stores a share, its last part does: that has just read them. Nobody reads those
    slots in the same launch.
    """
    writes = (tl.load(span + STORE) == STORE_POSITIONS) & (part == PARTS - 1)
    low = tl.cdiv(first, GROUP)
    high = tl.minimum(tl.cdiv(first + M, GROUP), tl.load(span + Q_LEN))
    store_fresh(
        k, v, k_cache, v_cache, table, tl.load(span + Q_START), low, tl.where(writes, high, low),
        k_token, v_token, SLOT, DIM, D, N, PAGE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _attend(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    found: tl.tensor,  # [PARTS, N, Hq, D] float32, the parts' outputs
    sums: tl.tensor,  # [PARTS, N, Hq] float32, log2 of the sum of their weights
    turns: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    spans: tl.tensor,
    starts: tl.tensor,
    page_table: tl.tensor,
    tokens: tl.tensor,
    q_token: tl.tensor,
    k_token: tl.tensor,
    v_token: tl.tensor,
    pages: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PAGE: tl.constexpr,
    PARTS: tl.constexpr,
    SKIP_WHOLE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLIND: tl.constexpr,
) -> None:
    span = spans + tl.program_id(2) * FIELDS
    first, part = tl.program_id(0) // PARTS * M, tl.program_id(0) % PARTS
    if _done(span, first, GROUP, SKIP_WHOLE):
        return
    start, own = tl.load(starts + tl.program_id(2)).to(tl.int64), tl.program_id(1) * DIM
    k, v = k + start * k_token + own, v + start * v_token + own
    k_cache, v_cache = k_cache + own, v_cache + own
    table = page_table + tl.load(span + ROW).to(tl.int64) * pages
    row = first + tl.arange(0, M)
    real = row < tl.load(span + Q_LEN) * GROUP
    head, token = tl.program_id(1) * GROUP + row % GROUP, start + row // GROUP
    q_tile = vectors(q, token * q_token + head * DIM, real, DIM, D)
    acc, peak, total = _tile(
        q_tile, row // GROUP, k, v, k_cache, v_cache, table, span, part, k_token, v_token, scale,
        PARTS, HEADS * DIM, DIM, D, M, N, PAGE, WINDOW, BLIND,
    )  # fmt: skip
    _store_share(
        k, v, k_cache, v_cache, table, span, first, part, k_token, v_token,
        GROUP, HEADS * DIM, DIM, D, M, N, PAGE, PARTS,
    )  # fmt: skip
    place = token * (HEADS * GROUP) + head
    if PARTS == 1:
        put(out, place * DIM, real, acc / total[:, None], DIM, D)
        return
    tile = tl.program_id(0) // PARTS * HEADS + tl.program_id(1)
    leave_part(
        acc, peak, total, found, sums, turns + tile * tl.num_programs(2) + tl.program_id(2), out,
        part, place, tokens.to(tl.int64) * (HEADS * GROUP), real, DIM, D, M, PARTS,
    )  # fmt: skip


@triton.jit
def _done(span: tl.tensor, first: tl.tensor, GROUP: tl.constexpr, SKIP_WHOLE: tl.constexpr) -> Any:
    """True if a tile that begins at row ``first`` has nothing to do for the span."""
    done = first >= tl.load(span + Q_LEN) * GROUP
    if SKIP_WHOLE:
        done = done | reads_nothing(span)
    return done


@triton.jit
def _store(
    k: tl.tensor,
    v: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    spans: tl.tensor,
    starts: tl.tensor,
    page_table: tl.tensor,
    k_token: tl.tensor,
    v_token: tl.tensor,
    pages: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    PAGE: tl.constexpr,
) -> None:
    span = spans + tl.program_id(2) * FIELDS
    low = tl.program_id(0) * N
    q_len = tl.load(span + Q_LEN)
    stores = (tl.load(span + STORE) == STORE_POSITIONS) & reads_nothing(span) & (low < q_len)
    if stores == 0:
        return
    start = tl.load(starts + tl.program_id(2)).to(tl.int64)
    k += start * k_token + tl.program_id(1) * DIM
    v += start * v_token + tl.program_id(1) * DIM
    k_cache += tl.program_id(1) * DIM
    v_cache += tl.program_id(1) * DIM
    table = page_table + tl.load(span + ROW).to(tl.int64) * pages
    high = tl.minimum(low + N, q_len)
    store_fresh(
        k, v, k_cache, v_cache, table, tl.load(span + Q_START), low, high, k_token, v_token,
        HEADS * DIM, DIM, D, N, PAGE,
    )  # fmt: skip
