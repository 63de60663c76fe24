"""CachePolicy: a pure function from a request's progress to the span of its next step."""

from __future__ import annotations

from typing import Protocol

from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import Span, Store
from dllmserve.core.request import Request


class CachePolicy(Protocol):
    """Decides which tokens are computed, read and written. Stateless; host integers only.

    Example:
        A policy that never caches returns, for every step, the whole canvas:
        ``whole_canvas(request, row, Store.NONE)``.
    """

    def slots(self, request: Request, spec: ModelSpec) -> int:
        """K,V slots (tokens) that one row of the request needs at most."""
        ...

    def span(self, request: Request, spec: ModelSpec, row: int) -> Span:
        """The span of the request's next step, for ``row``."""
        ...

    def unsupported(self, spec: ModelSpec) -> list[str]:
        """Reasons why this policy cannot serve the model; empty if it can."""
        ...


def whole_canvas(
    request: Request,
    row: int,
    store: Store,
    *,
    keep: int = 0,
    length: int | None = None,
) -> Span:
    """A refresh: every position that the block sees (or the first ``length``) is a query."""
    start, end = request.blocks[request.progress.block]
    return Span(
        row=row,
        q_start=0,
        q_len=request.visible if length is None else length,
        ctx_len=0,
        store=store,
        keep=keep,
        blk_off=start,
        blk_len=end - start,
    )


def reuse(request: Request, row: int, first: int, last: int) -> Span:
    """Positions ``first .. last - 1`` against all K,V that the block sees, which they renew."""
    start, end = request.blocks[request.progress.block]
    return Span(
        row=row,
        q_start=first,
        q_len=last - first,
        ctx_len=request.visible,
        store=Store.POSITIONS,
        blk_off=start - first,
        blk_len=end - start,
    )


def refreshes(request: Request, delay: int = 0) -> bool:
    """True if the block's next forward is one that computes the whole canvas.

    The first ``1 + delay`` are, and then every ``refresh_every``-th.
    """
    step, every = request.progress.step_in_block, request.params.refresh_every
    return step <= delay or (every is not None and (step - delay) % every == 0)


def shifted_start(start: int, spec: ModelSpec) -> int:
    """First query position of a span whose first LM-head row predicts ``start``.

    A shifted model (Dream) reads position p's logits at p - 1, so its span begins one
    token earlier.
    """
    return max(start - spec.logit_shift, 0)
