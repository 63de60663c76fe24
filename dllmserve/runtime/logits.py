"""LogitsHead: hidden states to statistics, at most ``max_rows`` rows of logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dllmserve.decoding.logprobs import Wanted, row_logprobs
from dllmserve.decoding.stats import (
    RowParams,
    TokenStats,
    row_stats,
)
from dllmserve.parallel.vocab import VocabShard
from dllmserve.runtime.edits import LogitEdit
from dllmserve.runtime.shape import SegmentShape
from dllmserve.runtime.tensors import HeadCells

if TYPE_CHECKING:
    from dllmserve.runtime.canvas import ExpectedEmbeddings, Tempering
    from dllmserve.runtime.constraints import ConstraintEdit

#: ``x [n, d], weight [out, d], bias [out] or None -> [n, out]``
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class RowReducer(Protocol):
    """Reduces a chunk of logits to its statistics; see :func:`decoding.stats.row_stats`."""

    #: rows that a chunk of sampled and of filtered rows, and of those of which something is kept or
    #: more is wanted, counts for, by their extra memory
    sampled_cost: int
    filtered_cost: int
    kept_cost: int
    #: which ids the logits are of
    vocab: VocabShard

    def reduce(
        self,
        z: Tensor,  # [n, v], of this rank's ids
        params: RowParams,
        mask_id: int,
        segment: SegmentShape,
        needs: frozenset[str],
    ) -> TokenStats:
        """Statistics of n rows; with "noise" in needs of the likeliest tokens, and draws beside."""
        ...

    def capped(self, z: Tensor, cap: float, by: Tensor | None = None) -> Tensor:
        """``cap * tanh(z / cap)`` in float32, divided by [n] float32 if there is any: [n, v]."""
        ...

    def shares(self, z: Tensor, totals: Tensor, dtype: torch.dtype) -> Tensor:
        """``exp(z - totals)`` of z [n, v] float32, which may be overwritten, and totals [n]."""
        ...


class TorchReducer:
    """Plain torch operations, on any device.

    Args:
        vocab: which ids the logits are of.
    """

    sampled_cost = 4  # noise and sorting work in float64 and int64
    filtered_cost = 4
    kept_cost = 4  # float32 copies: of the distributions now and before, and their product

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

        def stats(sampled: bool, filtered: bool, needs: frozenset[str]) -> TokenStats:
            return row_stats(
                z,
                params,
                mask_id=mask_id,
                sampled=sampled,
                filtered=filtered,
                needs=needs,
                shard=self.vocab,
            )

        if "noise" not in needs:
            return stats(segment.sampled, segment.filtered, needs)
        found = drawn = stats(False, False, needs)
        if segment.sampled or segment.filtered:
            drawn = stats(segment.sampled, segment.filtered, frozenset())
        return replace(found, drawn=drawn.token)

    def capped(self, z: Tensor, cap: float, by: Tensor | None = None) -> Tensor:
        """See :class:`RowReducer`."""
        capped = z.float().div_(cap).tanh_().mul_(cap)
        return capped if by is None else capped.div_(by[:, None])

    def shares(self, z: Tensor, totals: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`RowReducer`."""
        return z.sub_(totals[:, None]).exp_().to(dtype)


@dataclass(frozen=True)
class StepEdits:
    """What is done to a step's logits.

    Attributes:
        cells: whose the LM-head rows are; None if no segment has edits or rows without confidence.
        edits: by the name that segments have.
        last: [R + 1, E] int64, the state table's ids without confidence.
        candidates: [M, C] int64, ids whose log-probabilities are wanted, -1 for none; None if
            there are none anywhere.
        constraint: of constrained requests; None if the step has none.
    """

    cells: HeadCells | None = None
    edits: Mapping[str, LogitEdit] = field(default_factory=dict)
    last: Tensor | None = None
    candidates: Tensor | None = None
    constraint: ConstraintEdit | None = None

    def divisors(self, chunk: slice, segment: SegmentShape) -> Tensor | None:
        """What a segment's first edit divides a chunk's logits by, [n], if that is all it does."""
        if self.cells is None or not segment.edits or segment.edits[0][0] != "tempering":
            return None
        tempering = cast("Tempering", self.edits["tempering"])
        return tempering.divisors(self.cells, chunk)

    def apply(
        self, z: Tensor, chunk: slice, segment: SegmentShape, done: int = 0
    ) -> tuple[Tensor, dict[str, Any]]:
        """Apply a segment's edits to a chunk of its rows, in order.

        Args:
            done: how many of them have been applied.

        Returns:
            Logits [n, v], and what edits have to say of them: [n] float64 by statistic.
        """
        found: dict[str, Any] = {}
        if self.cells is None:
            return z, found
        for name, size in segment.edits[done:]:
            edit = self.edits[name]
            result = edit.apply(z, self.cells, chunk, size)
            if edit.statistic:
                found[edit.statistic] = result
            else:
                z = result
        return z, found

    def note(
        self, z: Tensor, params: RowParams, chunk: slice, segment: SegmentShape, mask_id: int
    ) -> None:
        """Let constraints see a chunk's logits [n, v] as proposals are made of them."""
        if self.constraint is not None and self.cells is not None and segment.constrained:
            self.constraint.note(z, params, self.cells, chunk, segment, mask_id)

    def logprobs(
        self, z: Tensor, token: Tensor, chunk: slice, wanted: Wanted, vocab: VocabShard
    ) -> Tensor:
        """See :func:`row_logprobs`; z and token are those of a chunk."""
        named = None if self.candidates is None else self.candidates[chunk, : wanted.candidates]
        return row_logprobs(z, token, wanted, named, vocab)

    def params(self, params: RowParams, chunk: slice, segment: SegmentShape) -> RowParams:
        """Parameters of a chunk of rows, with the ids that have no confidence in it."""
        own = params[chunk]
        if not segment.last or self.cells is None or self.last is None:
            return own
        return replace(own, last=self.last.index_select(0, self.cells.row[chunk]))


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
        cap: logits z become ``cap * tanh(z / cap)``, in float32; 0 for none.
        expected: takes what is expected of canvases of noise; None for other models.
    """

    def __init__(
        self,
        weight: Tensor,
        max_rows: int,
        mask_id: int,
        reducer: RowReducer | None = None,
        exact: Linear | None = None,
        cap: float = 0.0,
        expected: ExpectedEmbeddings | None = None,
    ) -> None:
        self._weight = weight
        self._cap, self.expected = cap, expected
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
        edits: StepEdits = StepEdits(),
    ) -> TokenStats:
        """Statistics of M rows, in order."""
        parts, logprobs = list[TokenStats](), list[Tensor]()
        twins, vocab = len(hidden) - len(cfg_scale), self._reducer.vocab
        start = 0
        for segment in segments:
            end = start + segment.rows
            step = self._chunk_rows(segment)
            wanted = list[Tensor]()
            for low in range(start, end, step):
                chunk = slice(low, min(low + step, end))
                # a pass over the logits less, where nobody needs them undivided
                plain = not self._cap or segment.guided or segment.wanted
                by = None if plain else edits.divisors(chunk, segment)
                z = self._logits(hidden[chunk], 0, by)
                if segment.guided:
                    other = hidden[chunk.start + twins : chunk.stop + twins]
                    z = self._guide(z, other, cfg_scale[chunk])
                # edits, what has no confidence, and what is expected change logits in place
                changed = segment.wanted and (segment.edits or segment.last or self.expected)
                raw = z.clone() if changed else z
                z, found = edits.apply(z, chunk, segment, 0 if by is None else 1)
                own = edits.params(params, chunk, segment)
                edits.note(z, own, chunk, segment, self._mask_id)
                part = self._reduce(z, own, segment, needs, edits.cells, chunk)
                parts.append(replace(part, **found))
                if segment.wanted:
                    wanted.append(edits.logprobs(raw, part.token, chunk, segment.wanted, vocab))
            if wanted:
                logprobs.append(torch.cat(wanted))
            start = end
        return replace(TokenStats.concat(parts), logprobs=tuple(logprobs))

    def _reduce(
        self,
        z: Tensor,
        params: RowParams,
        segment: SegmentShape,
        needs: frozenset[str],
        cells: HeadCells | None,
        chunk: slice,
    ) -> TokenStats:
        """Statistics of a chunk; what is expected of canvases of noise is kept."""
        part = self._reducer.reduce(z, params, self._mask_id, segment, needs)
        if self.expected is not None and cells is not None:
            self.expected.keep(z, part, cells, chunk, self._reducer.shares)
        return part

    def of_tokens(
        self,
        logprobs: tuple[Tensor, ...],
        token: Tensor,  # [M] int64
        hidden: Tensor,  # as in stats()
        cfg_scale: Tensor,
        segments: tuple[SegmentShape, ...],
    ) -> tuple[Tensor, ...]:
        """Log-probabilities as they are of other tokens than were proposed.

        Logits are not kept, so what is added is the difference of two rows of the LM head, times
        the hidden state.
        """
        found, left, start = list[Tensor](), iter(logprobs), 0
        twins = len(hidden) - len(cfg_scale)
        for segment in segments:
            rows = slice(start, start + segment.rows)
            start += segment.rows
            if not segment.wanted:
                continue
            values = next(left)
            if segment.constrained:
                before, now = values[:, 0].long(), token[rows]
                more = self._gap(hidden[rows], before, now)
                if segment.guided:
                    other = self._gap(hidden[rows.start + twins : rows.stop + twins], before, now)
                    more = other + (cfg_scale[rows] + 1.0) * (more - other)
                more = torch.where(now == before, 0.0, more)
                own = torch.stack((now.double(), values[:, 1] + more), dim=1)
                values = torch.cat((own, values[:, 2:]), dim=1)
            found.append(values)
        return tuple(found)

    def _gap(self, x: Tensor, before: Tensor, now: Tensor) -> Tensor:
        """How much larger the logit of one id is than that of another, of rows x [n, d]: [n]."""
        vocab, total = self._reducer.vocab, torch.zeros(len(x), device=x.device)
        for ids, sign in ((now, 1.0), (before, -1.0)):
            column, mine = vocab.locate(ids)
            one = (x.float() * self._weight[column].float()).sum(dim=-1)
            total += sign * one.masked_fill(~mine, 0.0)
        return vocab.group.all_reduce(total).double()

    def _chunk_rows(self, segment: SegmentShape) -> int:
        """Rows per chunk, so that every kind of segment takes about the same memory."""
        rows = self._max_rows
        if segment.guided:
            rows //= 2  # two rows of logits each
        if segment.edits and self._weight.dtype != torch.float32:
            rows //= 2  # a float32 copy of each, twice its size
        if segment.keeps or segment.blind or segment.wanted:
            rows //= self._reducer.kept_cost
        if segment.filtered:
            rows //= self._reducer.filtered_cost
        elif segment.sampled:
            rows //= self._reducer.sampled_cost
        return max(rows, 1)

    def _logits(self, x: Tensor, offset: int, by: Tensor | None = None) -> Tensor:
        """[n, v] logits of x [n, d], in the shared buffer from row ``offset`` if there is one.

        Args:
            by: capped logits are divided by it, [n] float32.
        """
        if self._exact is not None:
            z = self._exact(x, self._weight, None)
        elif self._buffer is None:
            z = F.linear(x, self._weight)
        else:
            z = torch.mm(x, self._weight.t(), out=self._buffer[offset : offset + len(x)])
        if not self._cap:
            return z
        return self._reducer.capped(z, self._cap, by)

    def _guide(self, z: Tensor, hidden: Tensor, scale: Tensor) -> Tensor:
        """l_u + (s + 1)(l_c - l_u), with s per row; in place."""
        base = self._logits(hidden, len(z))
        return z.sub_(base).mul_((scale[:, None] + 1.0).to(z.dtype)).add_(base)
