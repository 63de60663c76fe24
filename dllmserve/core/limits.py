"""Limits: the fixed sizes of an engine, and which requests can never run within them."""

from __future__ import annotations

from dataclasses import dataclass

from dllmserve.catalog import RULES
from dllmserve.core.budget import NO_LIMIT
from dllmserve.core.request import Request
from dllmserve.errors import CapacityError, ContextLengthError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Fixed sizes of an engine that the scheduler packs against.

    ``max_refresh_tokens`` is how many tokens of a step may be refreshes, so that refreshes
    of different requests do not line up; soft for the first one. ``phases`` is "mixed"
    (refresh and reuse spans share steps), "separate", or "auto": refreshes that fill half
    a step run by themselves, fewer share a step with reuse spans. ``max_history_rows`` is how
    many positions may have their last distribution kept; with 0 nothing is kept of logits.
    ``cheap_tokens`` is with how many a step computes half as many a second as it can: steps that
    owners share are not made smaller than that. ``prefix_caching`` lets requests share pages of
    equal beginnings, ``prefix_isolation`` those of one owner alone.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_logit_rows: int
    page_size: int
    num_pages: int
    max_refresh_tokens: int = NO_LIMIT
    phases: str = "auto"
    max_history_rows: int = 0
    cheap_tokens: int = 0
    prefix_caching: bool = True
    prefix_isolation: bool = False

    def pages_of(self, slots: int) -> int:
        """Pages that hold so many slots."""
        return -(-slots // self.page_size)

    def check(self, request: Request, slots: int) -> None:
        """Raise an error that says why if the request can never run within these sizes.

        Args:
            request: the request.
            slots: K,V slots that one of its rows needs.

        Raises:
            ContextLengthError, CapacityError.
        """
        if request.canvas_len > self.max_model_len:
            raise ContextLengthError(
                f"the request's canvas has {request.canvas_len} tokens, over "
                f"max_model_len={self.max_model_len}"
            )
        self._check_tokens(request)
        if request.rows_needed > self.max_num_seqs:
            raise CapacityError(
                f"cfg_scale > 0 takes {request.rows_needed} rows, over "
                f"max_num_seqs={self.max_num_seqs}: raise it to {request.rows_needed}"
            )
        self._check_history(request)
        pages = self.pages_of(slots) * request.rows_needed
        if pages > self.num_pages:
            way = "" if request.grows else ", or use cache='none'"
            raise CapacityError(
                f"the request needs {pages} K,V pages of {self.page_size} tokens, the engine "
                f"has kv_pages={self.num_pages}: raise kv_pages to {pages} or shorten the "
                f"prompt or {request.params.length_name}{way}"
            )

    def _check_tokens(self, request: Request) -> None:
        """What cannot be divided has to fit a step: a block, or a canvas that sees itself."""
        length, canvas = request.canvas_len, request.canvas
        if canvas.window:  # a frame, or a finished window and the next
            length = min(canvas.frame or 2 * canvas.window, length)
        tokens = length * request.rows_needed + request.blind_len
        if tokens > self.max_num_batched_tokens:
            what = (
                "block_length" if canvas.window else f"the prompt or {request.params.length_name}"
            )
            raise CapacityError(
                f"the request needs {tokens} tokens in one step, over "
                f"max_num_batched_tokens={self.max_num_batched_tokens}: raise it to {tokens} "
                f"or shorten {what}"
            )

    def _check_history(self, request: Request) -> None:
        """What a rule keeps of logits has to have room."""
        rule, needed = request.params.unmask, request.history_needed
        if RULES[rule].keeps and not self.max_history_rows:
            raise CapacityError(
                f"unmask={rule!r} keeps something of the logits between forwards, and the engine "
                "has reserved no memory for it (max_history_rows=0): make it with "
                f"max_history_rows={max(needed, 1)} or more, or use another rule"
            )
        if needed > self.max_history_rows:
            raise CapacityError(
                f"unmask={rule!r} keeps a distribution for each of {needed} positions of a block, "
                f"over max_history_rows={self.max_history_rows}: raise it to {needed}, or use a "
                "shorter block_length"
            )
