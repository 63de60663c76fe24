"""What canvases of noise need of logits: temperatures of a schedule, and expected embeddings.

DiffusionGemma's forward is also fed what the one before thought of each position: the mean of the
embedding by the distribution it gave (self-conditioning). That is taken chunk by chunk of the
logits, so whole canvases of them never exist; it costs a product with the embedding, as large as
the LM head's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dllmserve.core.plan import Part, SpanField
from dllmserve.core.rows import RowInit
from dllmserve.decoding.stats import TokenStats, value_of
from dllmserve.models.decoder import CanvasTokens
from dllmserve.parallel.vocab import VocabShard
from dllmserve.runtime.edits import EditSizes
from dllmserve.runtime.inputs import entry_fields, span_fields
from dllmserve.runtime.shape import EntryField, StepShape
from dllmserve.runtime.tensors import HeadCells, StepTensors
from dllmserve.sampling_params import FLOATS

#: ``logits [n, v] float32, sums of their exponentials [n], dtype -> [n, v]``
Shares = Callable[[Tensor, Tensor, torch.dtype], Tensor]
_COLUMNS = tuple(FLOATS.index(name) for name in ("t_min", "t_max", "max_denoising_steps"))


class Tempering:
    """Divides logits by the schedule's temperature (LinearTemperatureScheduleLogitsProcessor).

    In forward s of S, from 0 on, that is ``t_min + (t_max - t_min) (S - s) / S``.

    Attributes:
        schedule: [R + 1, 3] float64: t_min, t_max, S.
    """

    statistic = ""

    def __init__(self, sizes: EditSizes, vocab: VocabShard, device: torch.device) -> None:
        self.schedule = torch.ones(sizes.rows, 3, dtype=torch.float64, device=device)

    @staticmethod
    def nbytes(sizes: EditSizes) -> int:
        """See :class:`dllmserve.runtime.edits.LogitEdit`."""
        return sizes.rows * 3 * 8

    def admit(self, init: RowInit) -> None:
        """Note the request's."""
        for place, column in enumerate(_COLUMNS):
            self.schedule[init.row, place : place + 1] = init.floats[column]

    def divisors(self, cells: HeadCells, rows: slice) -> Tensor:
        """The temperature of each of a chunk's rows: [n] float32."""
        low, high, steps = self.schedule[cells.row[rows]].unbind(dim=1)
        left = (steps - cells.step[rows]) / steps
        return (low + (high - low) * left).float()

    def apply(self, z: Tensor, cells: HeadCells, rows: slice, size: int) -> Tensor:
        """Tempered logits [n, v] float32."""
        return z.float().div_(self.divisors(cells, rows)[:, None])


class ExpectedEmbeddings:
    """Of each position of a row's canvas, the mean of the embedding by the last forward.

    A forward never overwrites what it reads, so it can be run again after it ran out of memory.

    Args:
        weight: [v, d], the embedding of this rank's ids.
        vocab: which they are.
        rows: of the state table, the trash row included.
        block: longest canvas.
        product: ``x [n, k], weight [d, k], None -> [n, d]``, whose result for a row depends on that
            row alone; None takes the fastest.

    Attributes:
        means: [2, rows, block, d], of even and odd forwards of a canvas.
    """

    def __init__(
        self,
        weight: Tensor,
        vocab: VocabShard,
        rows: int,
        block: int,
        product: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None,
    ) -> None:
        self._weight, self._vocab, self._product = weight, vocab, product
        #: [d, v], in the layout that an exact product takes
        self._columns = weight.t().contiguous() if product is not None else weight.t()
        self.means = weight.new_zeros(2, rows, block, weight.shape[1])

    def keep(
        self, z: Tensor, stats: TokenStats, cells: HeadCells, rows: slice, shares: Shares
    ) -> None:
        """Take a chunk of logits [n, v], as positions are drawn from them; they are changed.

        Args:
            z: logits of this rank's ids.
            stats: token and probability of each row: that makes the sum over all ids known.
            cells: whose the step's LM-head rows are.
            rows: which of them the chunk holds.
            shares: see :meth:`dllmserve.runtime.logits.RowReducer.shares`.
        """
        z = z.float()
        total = value_of(z, stats.token, self._vocab).double() - stats.prob.log()
        chances = shares(z, total.float(), self._weight.dtype)
        step, row = cells.step[rows] % 2, cells.row[rows]
        column = cells.column[rows].clamp(max=self.means.shape[2] - 1)
        self.means[step, row, column] = self._mean(chances)

    def _mean(self, shares: Tensor) -> Tensor:
        """``shares @ embedding`` over all ranks' ids: [n, d].

        In float32 it is summed split by split, so that the number of ranks changes no bit.
        """
        vocab = self._vocab
        if self._weight.dtype != torch.float32:
            return vocab.group.all_reduce(shares @ self._weight)
        parts = []
        for low in range(0, shares.shape[1], vocab.width):
            own = shares[:, low : low + vocab.width]
            columns = self._columns[:, low : low + vocab.width]
            exact = self._product
            parts.append(own @ columns.t() if exact is None else exact(own, columns, None))
        return vocab.join(torch.stack(parts, dim=2)).sum(dim=2)

    def tokens(self, packed: Tensor, shape: StepShape, given: StepTensors) -> CanvasTokens:
        """Which tokens of a step are those of canvases, and what is expected of them.

        Args:
            packed: int32, the step's packing.
            shape: the step's.
            given: what the step computes with.
        """
        if given.owners is None:
            raise ValueError("the spans of a step's tokens are not known")
        spans, step = span_fields(packed, shape), entry_fields(packed, shape)[:, EntryField.STEP]
        owner = given.owners.clamp(max=shape.spans - 1)
        own = spans[owner].long()
        real = given.owners < shape.spans
        mine = (own[:, SpanField.HEAD] != Part.NONE) & real
        column = given.positions - own[:, SpanField.Q_START] - own[:, SpanField.BLK_OFF]
        column = column.clamp(0, self.means.shape[2] - 1)
        # spans of entries come first, in their order, and such models have no others
        done = step[owner.clamp(max=shape.entries - 1)].long()
        found = self.means[(done + 1) % 2, own[:, SpanField.ROW], column]
        return CanvasTokens(mine, found.masked_fill(~(mine & (done > 0))[:, None], 0.0))
