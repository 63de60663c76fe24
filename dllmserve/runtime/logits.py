"""LogitsHead: hidden states to statistics, at most ``max_rows`` rows of logits at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dllmserve.decoding.stats import RowParams, TokenStats, row_stats


@dataclass(frozen=True)
class Segment:
    """Successive LM-head rows with the same needs.

    Attributes:
        count: rows.
        guided: they have an unconditional twin.
        sampled: some have a temperature above 0.
        filtered: some use top-p or top-k.
    """

    count: int
    guided: bool
    sampled: bool
    filtered: bool


class LogitsHead:
    """The LM head, in chunks.

    Args:
        weight: [V, d].
        max_rows: rows of logits that may exist at once; a guided row counts twice, and rows
            that are sampled or filtered four times, for the float64 work that they need.
        mask_id: id that is never proposed.
    """

    def __init__(self, weight: Tensor, max_rows: int, mask_id: int) -> None:
        self._weight = weight
        self._max_rows = max_rows
        self._mask_id = mask_id

    def stats(
        self,
        hidden: Tensor,  # [N, d]
        rows: Tensor,  # [M] int64 into hidden
        uncond: Tensor,  # [m] int64 into hidden, twins of the last m rows
        cfg_scale: Tensor,  # [M] float64
        params: RowParams,
        segments: list[Segment],
        needs: frozenset[str],
    ) -> TokenStats:
        """Statistics of M rows, in order."""
        parts = []
        first_guided = len(rows) - len(uncond)
        start = 0
        for segment in segments:
            end = start + segment.count
            step = self._chunk_rows(segment)
            for low in range(start, end, step):
                chunk = slice(low, min(low + step, end))
                z = F.linear(hidden[rows[chunk]], self._weight)
                if segment.guided:
                    twins = uncond[chunk.start - first_guided : chunk.stop - first_guided]
                    z = self._guide(z, hidden[twins], cfg_scale[chunk])
                stats = row_stats(
                    z,
                    params[chunk],
                    mask_id=self._mask_id,
                    sampled=segment.sampled,
                    filtered=segment.filtered,
                    needs=needs,
                )
                parts.append(stats)
            start = end
        return TokenStats.concat(parts)

    def _chunk_rows(self, segment: Segment) -> int:
        """Rows per chunk, so that every kind of segment takes about the same memory."""
        rows = self._max_rows
        if segment.guided:
            rows //= 2  # two rows of logits each
        if segment.sampled or segment.filtered:
            rows //= 4  # noise and sorting work in float64 and int64
        return max(rows, 1)

    def _guide(self, z: Tensor, hidden: Tensor, scale: Tensor) -> Tensor:
        """l_u + (s + 1)(l_c - l_u), with s per row."""
        base = F.linear(hidden, self._weight)
        return base + (scale[:, None] + 1.0).to(z.dtype) * (z - base)
