"""What kernels over spans share: a span's fields, page slots, head vectors."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from dllmserve.core.plan import Mask, SpanField, Store

#: Fields of a span on the device.
ROW = tl.constexpr(int(SpanField.ROW))
Q_START = tl.constexpr(int(SpanField.Q_START))
Q_LEN = tl.constexpr(int(SpanField.Q_LEN))
CTX_LEN = tl.constexpr(int(SpanField.CTX_LEN))
STORE = tl.constexpr(int(SpanField.STORE))
KEEP = tl.constexpr(int(SpanField.KEEP))
BLK_OFF = tl.constexpr(int(SpanField.BLK_OFF))
BLK_LEN = tl.constexpr(int(SpanField.BLK_LEN))
HEAD = tl.constexpr(int(SpanField.HEAD))
MASK = tl.constexpr(int(SpanField.MASK))
MASK_ARG = tl.constexpr(int(SpanField.MASK_ARG))
PICK = tl.constexpr(int(SpanField.PICK))
FIELDS = tl.constexpr(len(SpanField))
STORE_POSITIONS = tl.constexpr(int(Store.POSITIONS))
STORE_AHEAD = tl.constexpr(int(Store.AHEAD))
MASK_FULL = tl.constexpr(int(Mask.FULL))
MASK_STAIR = tl.constexpr(int(Mask.STAIR))
MASK_BLIND = tl.constexpr(int(Mask.BLIND))


def need_contiguous(*tensors: Tensor) -> None:
    """Raise ValueError unless every tensor is contiguous: kernels compute their strides."""
    if not all(t.is_contiguous() for t in tensors):
        raise ValueError("the output and the K,V cache have to be contiguous")


def heads_together(x: Tensor) -> Tensor:
    """``x`` [N, H, D], copied unless the heads of a token lie side by side."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def padded(dim: int) -> int:
    """A head dimension that tl.dot takes."""
    return max(16, 1 << (dim - 1).bit_length())


@triton.jit
def reads_nothing(span: tl.tensor) -> Any:
    """True for spans that are a refresh, see :attr:`dllmserve.core.plan.Span.refresh`."""
    ctx_len = tl.load(span + CTX_LEN)
    store = tl.load(span + STORE)
    stores = (store == STORE_POSITIONS) | ((store == STORE_AHEAD) & (tl.load(span + PICK) == 0))
    overwritten = stores & (ctx_len <= tl.load(span + Q_LEN))
    alone = (tl.load(span + Q_START) == 0) & (tl.load(span + MASK) == MASK_FULL)
    return alone & ((ctx_len == 0) | overwritten)


@triton.jit
def slots(table: tl.tensor, position: tl.tensor, valid: tl.tensor, PAGE: tl.constexpr) -> Any:
    """Slots [n] int64 of a row's positions [n]; ``table`` points to the row's pages."""
    page = tl.load(table + position // PAGE, mask=valid, other=0)
    return page * PAGE + position % PAGE


@triton.jit
def vectors(
    base: tl.tensor, place: tl.tensor, valid: tl.tensor, DIM: tl.constexpr, D: tl.constexpr
) -> Any:
    """Head vectors [n, D] that start at ``base + place`` [n] int64; zero where not valid."""
    d = tl.arange(0, D)[None, :]
    return tl.load(base + place[:, None] + d, mask=valid[:, None] & (d < DIM), other=0.0)


@triton.jit
def put(
    base: tl.tensor,
    place: tl.tensor,
    valid: tl.tensor,
    value: tl.tensor,
    DIM: tl.constexpr,
    D: tl.constexpr,
) -> None:
    """Store head vectors ``value`` [n, D] at ``base + place`` [n] int64, where valid."""
    d = tl.arange(0, D)[None, :]
    value = value.to(base.dtype.element_ty)
    tl.store(base + place[:, None] + d, value, mask=valid[:, None] & (d < DIM))


@triton.jit
def store_fresh(
    k: tl.tensor,  # pointer to the span's first token, own head
    v: tl.tensor,
    k_cache: tl.tensor,  # pointer to slot 0, own head
    v_cache: tl.tensor,
    table: tl.tensor,  # pointer to the row's pages
    q_start: tl.tensor,
    low: tl.tensor,  # tokens low .. high - 1 of the span are stored
    high: tl.tensor,
    k_token: tl.tensor,
    v_token: tl.tensor,
    SLOT: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    PAGE: tl.constexpr,
) -> None:
    """Copy fresh K,V of one head to the slots of their positions."""
    for j in range(low, high, N):
        token = j + tl.arange(0, N)
        valid = token < high
        slot = slots(table, q_start + token, valid, PAGE) * SLOT
        token = token.to(tl.int64)
        put(k_cache, slot, valid, vectors(k, token * k_token, valid, DIM, D), DIM, D)
        put(v_cache, slot, valid, vectors(v, token * v_token, valid, DIM, D), DIM, D)
