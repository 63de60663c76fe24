"""BiasTable: what requests add to their logits, in stable device rows.

A request's pairs of token id and value are copied to the device once, at its admission, and
lie beside its other parameters. So a step adds nothing to the host's copy to the device, and
one with biased requests can be part of a CUDA graph like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllmserve._values import MAX_LOGIT_BIAS
from dllmserve.device import host_to_device
from dllmserve.parallel.vocab import VocabShard
from dllmserve.runtime.shape import HEAD_FIELDS, SPAN_FIELDS, StepShape
from dllmserve.runtime.step import span_fields


@dataclass(frozen=True)
class StepBias:
    """The bias of one step, and which proposals have no confidence in it.

    Attributes:
        ids, values: the table's.
        rows: [M] int64, table row of each LM-head row.
        vocab: which ids this rank has logits of.
        last: the table's; None if there are none.
    """

    ids: Tensor
    values: Tensor
    rows: Tensor
    vocab: VocabShard
    last: Tensor | None = None

    def last_of(self, chunk: slice) -> Tensor | None:
        """Ids without confidence of a chunk of the step's LM-head rows: [n, E] int64."""
        return None if self.last is None else self.last.index_select(0, self.rows[chunk])

    def add(self, z: Tensor, chunk: slice, width: int) -> Tensor:
        """Logits of a chunk of the step's LM-head rows with their bias added.

        Every sum is one float32 addition, whatever else is in the chunk: a row with fewer pairs
        than ``width`` adds zeros for the rest. Half precision is widened first. In it 100 + z
        keeps steps of 1/2 (bfloat16), so several forced tokens would tie.

        Args:
            z: [n, v] logits of this rank's ids; float32 is changed in place.
            chunk: which LM-head rows they are.
            width: pairs of the row that has most, or more.

        Returns:
            [n, v] float32.
        """
        rows = self.rows[chunk]
        ids = self.ids[:, :width].index_select(0, rows)
        values = self.values[:, :width].index_select(0, rows)
        if self.vocab.ranks > 1:
            ids, mine = self.vocab.locate(ids)
            values = values.masked_fill(~mine, 0.0)
        return z.float().scatter_add_(1, ids, values)


class BiasTable:
    """Device rows, as many as the state table's; the last is trash and stays zero.

    Args:
        rows: including the trash row.
        vocab_size: ids are below it.
        vocab: which ids this rank has logits of.
        device: of the state table.
        ends: end ids of the model, for which there is room beside what a request biases.

    Attributes:
        ids: [R + 1, K] int64. Behind a row's own pairs any ids with the value 0.
        values: [R + 1, K] float32; -inf for an id that is out of the question.
        last: [R + 1, E] int64, ids whose proposals have no confidence; -1 is none.
    """

    def __init__(
        self, rows: int, vocab_size: int, vocab: VocabShard, device: torch.device, ends: int = 0
    ) -> None:
        self._vocab = vocab
        most = MAX_LOGIT_BIAS + ends
        # different ones: additions to one and the same logit would wait for each other
        ids = torch.arange(most, device=device) % vocab_size
        self.ids = ids.repeat(rows, 1)
        self.values = torch.zeros(rows, most, device=device)
        self.last = torch.full((rows, max(ends, 1)), -1, dtype=torch.int64, device=device)
        self._used: set[int] = set()

    def write_row(
        self, row: int, bias: Sequence[tuple[int, float]], last: Sequence[int] = ()
    ) -> None:
        """Fill a row for a newly admitted request; no work if it has nothing, nor had the last."""
        if row in self._used:
            self.values[row].zero_()
            self.last[row].fill_(-1)
            self._used.remove(row)
        if bias:
            count = len(bias)
            ids, values = zip(*bias, strict=True)
            self.ids[row, :count] = host_to_device(ids, self.ids.device)
            self.values[row, :count] = host_to_device(values, self.ids.device, torch.float32)
            self._used.add(row)
        if last:
            self.last[row, : len(last)] = host_to_device(last, self.ids.device)
            self._used.add(row)

    def begin(self, packed: Tensor, shape: StepShape) -> StepBias | None:
        """What the requests of a step do to logits, or None, and no work, if none does anything.

        Args:
            packed: int32, ``Packing.ints`` on the device; it may be longer.
            shape: the packing's.
        """
        if not any(segment.bias or segment.last for segment in shape.segments):
            return None
        owners = span_fields(packed, shape)[:, 0].index_select(0, head_entries(packed, shape))
        return StepBias(self.ids, self.values, owners.long(), self._vocab, self.last)


def head_entries(packed: Tensor, shape: StepShape) -> Tensor:
    """Entry of each LM-head row: [M] int64; padding rows belong to their segment's first entry."""
    end = shape.spans * SPAN_FIELDS
    heads = packed[end : end + shape.entries * HEAD_FIELDS].view(-1, HEAD_FIELDS)
    place = torch.arange(shape.rows, dtype=torch.int32, device=packed.device)
    # of entries that begin at the same row all but the last are empty
    entry = torch.searchsorted(heads[:, 0].contiguous(), place, right=True) - 1
    first_row = first_entry = 0
    for segment in shape.segments:
        rows = slice(first_row, first_row + segment.rows)
        # padding rows repeat the segment's first cell, so they must repeat its logits too
        entry[rows].masked_fill_(place[rows] >= heads[first_entry, 2], first_entry)
        first_row, first_entry = rows.stop, first_entry + segment.entries
    return entry
