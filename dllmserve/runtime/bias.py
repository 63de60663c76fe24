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

from dllmserve.device import host_to_device
from dllmserve.parallel.vocab import VocabShard
from dllmserve.runtime.shape import HEAD_FIELDS, SPAN_FIELDS, StepShape
from dllmserve.runtime.step import span_fields
from dllmserve.sampling_params import MAX_LOGIT_BIAS


@dataclass(frozen=True)
class StepBias:
    """The bias of one step.

    Attributes:
        ids, values: the table's.
        rows: [M] int64, table row of each LM-head row.
        vocab: which ids this rank has logits of.
    """

    ids: Tensor
    values: Tensor
    rows: Tensor
    vocab: VocabShard

    def add(self, z: Tensor, chunk: slice, width: int) -> Tensor:
        """Logits of a chunk of the step's LM-head rows with their bias added.

        Every sum is one float32 addition, whatever else is in the chunk: what a row has
        fewer pairs than ``width`` adds zeros. Half precision is widened first. In it 100 + z
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

    Attributes:
        ids: [R + 1, 1024] int64. Behind a row's own pairs any ids with the value 0.
        values: [R + 1, 1024] float32.
    """

    def __init__(self, rows: int, vocab_size: int, vocab: VocabShard, device: torch.device) -> None:
        self._vocab = vocab
        # different ones: additions to one and the same logit would wait for each other
        ids = torch.arange(MAX_LOGIT_BIAS, device=device) % vocab_size
        self.ids = ids.repeat(rows, 1)
        self.values = torch.zeros(rows, MAX_LOGIT_BIAS, device=device)
        self._used: set[int] = set()

    def write_row(self, row: int, bias: Sequence[tuple[int, float]]) -> None:
        """Fill a row for a newly admitted request; no work if it has no bias, nor had the last."""
        if row in self._used:
            self.values[row].zero_()
            self._used.remove(row)
        if bias:
            count = len(bias)
            ids, values = zip(*bias, strict=True)
            self.ids[row, :count] = host_to_device(ids, self.ids.device)
            self.values[row, :count] = host_to_device(values, self.ids.device, torch.float32)
            self._used.add(row)

    def begin(self, packed: Tensor, shape: StepShape) -> StepBias | None:
        """The bias of a step, or None, and no work, if no request in it has one.

        Args:
            packed: int32, ``Packing.ints`` on the device; it may be longer.
            shape: the packing's.
        """
        if not any(segment.bias for segment in shape.segments):
            return None
        owners = span_fields(packed, shape)[:, 0].index_select(0, head_entries(packed, shape))
        return StepBias(self.ids, self.values, owners.long(), self._vocab)


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
