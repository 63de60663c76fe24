"""LogitsHead: hidden states to statistics, at most ``max_rows`` rows of logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dllmserve.decoding.stats import (
    RowParams,
    TokenStats,
    row_stats,
    strike,
    without_confidence,
)
from dllmserve.parallel.vocab import VocabShard
from dllmserve.runtime.bias import StepBias
from dllmserve.runtime.decide import HeadCells
from dllmserve.runtime.shape import SegmentShape
from dllmserve.runtime.states import LogitState

#: ``x [n, d], weight [out, d], bias [out] or None -> [n, out]``
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class RowReducer(Protocol):
    """Reduces a chunk of logits to its statistics; see :func:`decoding.stats.row_stats`."""

    #: rows that a chunk of sampled, of filtered, and of rows that a state sees counts for, by
    #: their extra memory
    sampled_cost: int
    filtered_cost: int
    state_cost: int

    def reduce(
        self,
        z: Tensor,  # [n, v], of this rank's ids
        params: RowParams,
        mask_id: int,
        segment: SegmentShape,
        needs: frozenset[str],
    ) -> TokenStats:
        """Statistics of n rows."""
        ...


class TorchReducer:
    """Plain torch operations, on any device.

    Args:
        vocab: which ids the logits are of.
    """

    sampled_cost = 4  # noise and sorting work in float64 and int64
    filtered_cost = 4
    state_cost = 4  # float32 copies: of the distributions now and before, and their product

    def __init__(self, vocab: VocabShard) -> None:
        self.vocab = vocab

    def reduce(
        self,
        z: Tensor,  # [n, v], of this rank's ids
        params: RowParams,
        mask_id: int,
        segment: SegmentShape,
        needs: frozenset[str],
    ) -> TokenStats:
        """See :class:`RowReducer`."""
        return row_stats(
            z,
            params,
            mask_id=mask_id,
            sampled=segment.sampled,
            filtered=segment.filtered,
            needs=needs,
            shard=self.vocab,
        )


class TritonReducer(TorchReducer):
    """One pass over the logits by a Triton kernel; filtered rows still sort with torch."""

    sampled_cost = 1
    filtered_cost = 16  # the sort's keys, indices and float64 sums, beside a bf16 row
    state_cost = 16  # the same copies, beside a row that needs no others

    def reduce(
        self,
        z: Tensor,  # [n, v], of this rank's ids
        params: RowParams,
        mask_id: int,
        segment: SegmentShape,
        needs: frozenset[str],
    ) -> TokenStats:
        """See :class:`RowReducer`."""
        if segment.filtered or segment.state:
            return super().reduce(z, params, mask_id, segment, needs)
        from dllmserve.kernels.stats import fused_row_stats

        def stats() -> TokenStats:
            return fused_row_stats(
                z, params, mask_id=mask_id, sampled=segment.sampled, needs=needs, shard=self.vocab
            )

        found = stats()
        if params.last is None:
            return found
        # striking ids off does not change which of the others is best, or drawn
        strike(z, params.last, self.vocab)
        again = replace(stats(), token=found.token)
        return without_confidence(again, params.last, found.prob.isnan())


@dataclass(frozen=True)
class StepStates:
    """What is kept of a step's logits between forwards.

    Attributes:
        cells: whose the LM-head rows are.
        states: by the name that segments have.
    """

    cells: HeadCells | None = None
    states: Mapping[str, LogitState] = field(default_factory=dict)

    def observe(self, z: Tensor, chunk: slice, name: str) -> tuple[Tensor, Tensor | None]:
        """See :class:`~dllmserve.runtime.states.LogitState`; nothing for other names."""
        state = self.states.get(name)
        if state is None or self.cells is None:
            return z, None
        return state.observe(z, self.cells, chunk)


class LogitsHead:
    """The LM head, in chunks.

    Args:
        weight: [v, d], of this rank's ids.
        max_rows: rows of logits that may exist at once; a guided row counts twice, and rows
            that are sampled or filtered as often as the reducer says.
        mask_id: id that is never proposed.
        reducer: turns logits into statistics; by default of the whole vocabulary.
        exact: products whose result for a row depends on that row alone, bit for bit;
            None takes the fastest.
    """

    def __init__(
        self,
        weight: Tensor,
        max_rows: int,
        mask_id: int,
        reducer: RowReducer | None = None,
        exact: Linear | None = None,
    ) -> None:
        self._weight = weight
        self._max_rows = max_rows
        self._mask_id = mask_id
        self._reducer = reducer or TorchReducer(VocabShard(len(weight)))
        self._exact = exact
        self._buffer: Tensor | None = None
        if weight.device.type == "cuda" and exact is None:
            # one buffer for all steps and all CUDA graphs
            self._buffer = torch.empty(
                max_rows, weight.shape[0], dtype=weight.dtype, device=weight.device
            )

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the shared buffer, 0 without one."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def stats(
        self,
        hidden: Tensor,  # [M + m, d]; the last m are the unconditional twins of the m before
        cfg_scale: Tensor,  # [M] float64
        params: RowParams,
        segments: tuple[SegmentShape, ...],
        needs: frozenset[str],
        bias: StepBias | None = None,
        states: StepStates = StepStates(),
    ) -> TokenStats:
        """Statistics of M rows, in order.

        ``bias`` is what segments with a bias add, ``states`` what is kept between forwards.
        """
        parts = []
        twins = len(hidden) - len(cfg_scale)
        start = 0
        for segment in segments:
            end = start + segment.rows
            step = self._chunk_rows(segment)
            for low in range(start, end, step):
                chunk = slice(low, min(low + step, end))
                z = self._logits(hidden[chunk], 0)
                if segment.guided:
                    other = hidden[chunk.start + twins : chunk.stop + twins]
                    z = self._guide(z, other, cfg_scale[chunk])
                if segment.bias and bias is not None:
                    z = bias.add(z, chunk, segment.bias)
                z, kl = states.observe(z, chunk, segment.state)
                own = params[chunk]
                if segment.last and bias is not None:
                    own = replace(own, last=bias.last_of(chunk))
                part = self._reducer.reduce(z, own, self._mask_id, segment, needs)
                parts.append(part if kl is None else replace(part, kl=kl))
            start = end
        return TokenStats.concat(parts)

    def _chunk_rows(self, segment: SegmentShape) -> int:
        """Rows per chunk, so that every kind of segment takes about the same memory."""
        rows = self._max_rows
        if segment.guided:
            rows //= 2  # two rows of logits each
        if segment.bias and self._weight.dtype != torch.float32:
            rows //= 2  # a float32 copy of each, twice its size
        if segment.state:
            rows //= self._reducer.state_cost
        if segment.filtered:
            rows //= self._reducer.filtered_cost
        elif segment.sampled:
            rows //= self._reducer.sampled_cost
        return max(rows, 1)

    def _logits(self, x: Tensor, offset: int) -> Tensor:
        """[n, v] logits of x [n, d], in the shared buffer from row ``offset`` if there is one."""
        if self._exact is not None:
            return self._exact(x, self._weight, None)
        if self._buffer is None:
            return F.linear(x, self._weight)
        return torch.mm(x, self._weight.t(), out=self._buffer[offset : offset + len(x)])

    def _guide(self, z: Tensor, hidden: Tensor, scale: Tensor) -> Tensor:
        """l_u + (s + 1)(l_c - l_u), with s per row; in place."""
        base = self._logits(hidden, len(z))
        return z.sub_(base).mul_((scale[:, None] + 1.0).to(z.dtype)).add_(base)
