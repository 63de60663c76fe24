"""TritonReducer: logits to statistics in one pass; the twin of ``TorchReducer``."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dllmserve.decoding.stats import RowParams, TokenStats, strike, without_confidence
from dllmserve.kernels.logits import capped_logits, token_shares
from dllmserve.kernels.stats import fused_row_stats
from dllmserve.runtime.logits import TorchReducer
from dllmserve.runtime.shape import SegmentShape


class TritonReducer(TorchReducer):
    """One pass over the logits by a Triton kernel; filtered rows still sort with torch."""

    sampled_cost = 1
    filtered_cost = 16  # the sort's keys, indices and float64 sums, beside a bf16 row
    kept_cost = 16  # the same copies, beside a row that needs no others

    def reduce(
        self,
        z: Tensor,  # [n, v], of this rank's ids
        params: RowParams,
        mask_id: int,
        segment: SegmentShape,
        needs: frozenset[str],
    ) -> TokenStats:
        """See :class:`RowReducer`."""
        if segment.filtered or segment.keeps or segment.blind:
            return super().reduce(z, params, mask_id, segment, needs)

        def stats() -> TokenStats:
            return fused_row_stats(
                z, params, mask_id=mask_id, sampled=segment.sampled, needs=needs, shard=self.vocab
            )

        found = stats()
        if params.last is None:
            return found
        # striking ids off does not change which of the others is best, or drawn
        strike(z, params.last, self.vocab)
        again = replace(stats(), token=found.token, drawn=found.drawn)
        return without_confidence(again, params.last, found.prob.isnan())

    def capped(self, z: Tensor, cap: float, by: Tensor | None = None) -> Tensor:
        """See :class:`RowReducer`."""
        return capped_logits(z, cap, by)

    def shares(self, z: Tensor, totals: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`RowReducer`."""
        return token_shares(z, totals, dtype)
