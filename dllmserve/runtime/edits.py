"""Logit edits: what changes or watches logits before they are reduced to statistics.

A request's edits are applied in the order of :data:`dllmserve.catalog.EDITS`, to every chunk of its
LM-head rows. What an edit keeps lies in device rows like the state table's, and is allocated once,
so that no request's arrival can be what memory runs out at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from dllmserve._values import MAX_GEN_LENGTH, MAX_LOGIT_BIAS
from dllmserve.catalog import EDITS
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.rows import RowInit
from dllmserve.decoding.stats import log_sum, without
from dllmserve.device import host_to_device
from dllmserve.parallel.vocab import VocabShard, best_of
from dllmserve.runtime.shape import StepShape
from dllmserve.runtime.tensors import HeadCells, StepTensors


@dataclass(frozen=True)
class EditSizes:
    """What the memory of edits depends on.

    Attributes:
        rows: of the state table, the trash row included.
        slots: distributions that may be kept; 0: nothing at all is kept of logits.
        max_len: longest canvas.
        ids: of the vocabulary, on this rank.
        spec: the model.
    """

    rows: int
    slots: int
    max_len: int
    ids: int
    spec: ModelSpec

    @property
    def block(self) -> int:
        """Longest block."""
        return min(self.max_len, MAX_GEN_LENGTH)


class LogitEdit(Protocol):
    """Device state of one kind of edit: add a class, a line in the catalogue, and who asks for it.

    A forward never overwrites what it reads, so it can be run again after it ran out of memory.
    """

    #: name of a statistic, if the edit watches logits and does not change them
    statistic: str

    def __init__(self, sizes: EditSizes, vocab: VocabShard, device: torch.device) -> None: ...

    @staticmethod
    def nbytes(sizes: EditSizes) -> int:
        """Bytes on the device."""
        ...

    def admit(self, init: RowInit) -> None:
        """Prepare the row of a new request that asks for the edit, by ``init.edits``."""
        ...

    def apply(self, z: Tensor, cells: HeadCells, rows: slice, size: int) -> Tensor:
        """Take a chunk of logits.

        Args:
            z: [n, v] logits of this rank's ids; float32 may be changed in place.
            cells: whose the step's M LM-head rows are.
            rows: which of them the chunk holds.
            size: most numbers that a request in the chunk gives the edit, or more.

        Returns:
            [n, v] float32 logits; or, of an edit with a ``statistic``, that: [n] float64.
        """
        ...


class BiasEdit:
    """Adds what requests add to their logits (``logit_bias``, ids that are out of the question).

    A request's pairs of token id and value are copied to the device once, at its admission. So a
    step adds nothing to the host's copy to the device, and one with biased requests can be part of
    a CUDA graph like any other.

    Attributes:
        ids: [R + 1, K] int64. Behind a row's own pairs any ids with the value 0.
        values: [R + 1, K] float32; -inf for an id that is out of the question.
    """

    statistic = ""

    def __init__(self, sizes: EditSizes, vocab: VocabShard, device: torch.device) -> None:
        self._vocab = vocab
        # different ids: additions to one and the same logit would wait for each other
        ids = torch.arange(self._most(sizes), device=device) % sizes.spec.vocab_size
        self.ids = ids.repeat(sizes.rows, 1)
        self.values = torch.zeros(sizes.rows, len(ids), device=device)

    @staticmethod
    def _most(sizes: EditSizes) -> int:
        return MAX_LOGIT_BIAS + len(sizes.spec.eos_ids) + len(sizes.spec.never_ids)

    @classmethod
    def nbytes(cls, sizes: EditSizes) -> int:
        """See :class:`LogitEdit`."""
        return sizes.rows * cls._most(sizes) * (8 + 4)

    def admit(self, init: RowInit) -> None:
        """Copy the request's pairs."""
        ids, values = zip(*init.edits["bias"], strict=True)
        self.values[init.row].zero_()
        self.ids[init.row, : len(ids)] = host_to_device(ids, self.ids.device)
        self.values[init.row, : len(ids)] = host_to_device(values, self.ids.device, torch.float32)

    def apply(self, z: Tensor, cells: HeadCells, rows: slice, size: int) -> Tensor:
        """Logits [n, v] float32 with their bias added.

        Every sum is one float32 addition, whatever else is in the chunk: a row with fewer pairs
        than ``size`` adds zeros for the rest. Half precision is widened first. In it 100 + z
        keeps steps of 1/2 (bfloat16), so several forced tokens would tie.
        """
        own = cells.row[rows]
        ids = self.ids[:, :size].index_select(0, own)
        values = self.values[:, :size].index_select(0, own)
        if self._vocab.ranks > 1:
            ids, mine = self._vocab.locate(ids)
            values = values.masked_fill(~mine, 0.0)
        return z.float().scatter_add_(1, ids, values)


class PenaltyEdit:
    """Takes ``penalty_lambda`` off the logit of the token to the left (SGLang's JointThreshold).

    Of the one that stands in the block before the step, a mask included; the block's first position
    has none.

    Attributes:
        values: [R + 1] float32.
    """

    statistic = ""

    def __init__(self, sizes: EditSizes, vocab: VocabShard, device: torch.device) -> None:
        self._vocab = vocab
        self.values = torch.zeros(sizes.rows, device=device)

    @staticmethod
    def nbytes(sizes: EditSizes) -> int:
        """See :class:`LogitEdit`."""
        return sizes.rows * 4

    def admit(self, init: RowInit) -> None:
        """Note the request's."""
        ((_, value),) = init.edits["penalty"]
        self.values[init.row : init.row + 1] = value

    def apply(self, z: Tensor, cells: HeadCells, rows: slice, size: int) -> Tensor:
        """Logits [n, v] float32 with the penalty taken off."""
        if cells.left is None:
            raise ValueError("the penalty needs the tokens to the left")
        column, mine = self._vocab.locate(cells.left[rows, None])
        value = self.values[cells.row[rows], None]
        wanted = mine & (cells.column[rows, None] > 0)
        return z.float().scatter_add_(1, column, -value * wanted)


def with_left(given: StepTensors, shape: StepShape, spec: ModelSpec) -> HeadCells | None:
    """The cells of a step, with the tokens to the left if an edit reads them."""
    cells = given.cells
    if cells is None or not any(name == "penalty" for s in shape.segments for name, _ in s.edits):
        return cells
    # the query that logits are read at is that place already where they are shifted
    query = (given.head_rows - 1 + spec.logit_shift).clamp(min=0)
    return replace(cells, left=given.ids[query])


class CreditEdit:
    """Credits of tokens at each position (dInfer), for the credit rule.

    In every forward of a block all credits shrink to 0.8 and the position's best token, of
    probability p, earns ``p ** 0.2``; then ``0.7 ln(1 + credit)`` is added to logits.
    A position remembers the credits of 16 tokens: upstream keeps one for every token of the
    vocabulary, most of which are zero. A seventeenth replaces the smallest.

    Attributes:
        ids: [2, rows, longest block, 16] int32, of even and odd forwards; -1 where free. What
            the row's block has not written yet may be anything.
        credits: [2, rows, longest block, 16] float32.
    """

    statistic = ""
    KEPT = 16
    DECAY, POWER, WEIGHT = 0.8, 0.2, 0.7

    def __init__(self, sizes: EditSizes, vocab: VocabShard, device: torch.device) -> None:
        self._vocab, self._mask_id = vocab, sizes.spec.mask_id
        size = (2, sizes.rows, sizes.block, self.KEPT)
        self.ids = torch.zeros(size, dtype=torch.int32, device=device)
        self.credits = torch.zeros(size, device=device)

    @classmethod
    def nbytes(cls, sizes: EditSizes) -> int:
        """See :class:`LogitEdit`."""
        return 2 * sizes.rows * sizes.block * cls.KEPT * (4 + 4)

    def admit(self, init: RowInit) -> None:
        """Nothing: a block begins without credits."""

    def apply(self, z: Tensor, cells: HeadCells, rows: slice, size: int) -> Tensor:
        """Logits [n, v] float32 with the credits added."""
        z, vocab = z.float(), self._vocab
        row, column = cells.row[rows], cells.column[rows].clamp(max=self.ids.shape[2] - 1)
        entering = cells.entering[rows][:, None]
        odd = cells.forward[rows] % 2
        ids = torch.where(entering, -1, self.ids[1 - odd, row, column].long())  # [n, 16]
        before = self.credits[1 - odd, row, column]
        credits = torch.where(entering, 0.0, before) * self.DECAY
        best, token = self._best(z)  # [n, 1]
        # p ** POWER; torch's power rounds by an element's place on a CPU, exp does not
        earned = ((best - log_sum(z, vocab)) * self.POWER).exp()
        known = ids == token
        # a new token takes a free place, or that of the smallest credit
        least = torch.where(ids < 0, -1.0, credits).argmin(dim=-1, keepdim=True)
        kept = torch.arange(self.KEPT, device=z.device)
        here = torch.where(known.any(dim=-1, keepdim=True), known, kept == least)
        fresh = torch.where(known, credits, 0.0) + earned
        credits = torch.where(here, fresh, credits)
        ids = torch.where(here, token, ids)
        self.ids[odd, row, column] = ids.int()
        self.credits[odd, row, column] = credits
        raised = torch.where(ids >= 0, self.WEIGHT * credits.log1p(), 0.0)
        columns, mine = vocab.locate(ids)
        return z.scatter_add(1, columns, raised.masked_fill(~mine, 0.0))

    def _best(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Logit [n, 1] float32 and id [n, 1] int64 of each row's best token."""
        best, column = without(z, self._mask_id, self._vocab.start).max(dim=-1)
        token = column + self._vocab.start
        found = self._vocab.group.all_gather(torch.stack((best.double(), token.double())))
        best, token = best_of(found[:, 0], (found[:, 0], found[:, 1]))
        return best.float()[:, None], token.long()[:, None]


class KlObserver:
    """Divergence of each position's distribution from that of the block's last forward.

    Attributes:
        slots: [rows, longest block] int64, slot of each position of the row's block.
        log_probs: [2, slots + 1, v] float32, of even and odd forwards; slot 0 is trash.
    """

    statistic = "kl"

    def __init__(self, sizes: EditSizes, vocab: VocabShard, device: torch.device) -> None:
        self._vocab = vocab
        longest = min(sizes.slots, sizes.block)
        self.slots = torch.zeros(sizes.rows, longest, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(2, sizes.slots + 1, vocab.stop - vocab.start, device=device)

    @staticmethod
    def nbytes(sizes: EditSizes) -> int:
        """See :class:`LogitEdit`."""
        kept = 2 * (sizes.slots + 1) * sizes.ids * 4
        return kept + sizes.rows * min(sizes.slots, sizes.block) * 8

    def admit(self, init: RowInit) -> None:
        """Note the slots that the scheduler reserved."""
        self.slots[init.row, : len(init.history)] = host_to_device(init.history, self.slots.device)

    def apply(self, z: Tensor, cells: HeadCells, rows: slice, size: int) -> Tensor:
        """KL(now || before) [n] float64, +inf in a block's first forward; now becomes before."""
        z32 = z.float()
        now = z32 - log_sum(z32, self._vocab)
        slot = self.slots[cells.row[rows], cells.column[rows].clamp(max=self.slots.shape[1] - 1)]
        slot = torch.where(cells.real[rows], slot, 0)
        odd = cells.forward[rows] % 2
        before = self.log_probs[1 - odd, slot]
        terms = torch.where(now > -torch.inf, now.exp() * (now - before), 0.0)
        sums = self._vocab.split(terms, 0.0).sum(dim=-1, dtype=torch.float64)  # [n, S]
        kl = self._vocab.join(sums[:, None]).sum(dim=(1, 2))
        self.log_probs[odd, slot] = now
        return torch.where(cells.entering[rows], torch.inf, kl)


def make_edits(
    sizes: EditSizes, vocab: VocabShard, device: torch.device, kernels: str = "torch"
) -> Mapping[str, LogitEdit]:
    """All edits by name; without slots, but for those that keep something of logits."""
    return {
        name: info.of(kernels)(sizes, vocab, device)
        for name, info in EDITS.items()
        if sizes.slots or not info.keeps
    }


def edit_bytes(sizes: EditSizes, *, keeps: bool) -> int:
    """Bytes of the edits that keep something of logits, or of the others."""
    if keeps and not sizes.slots:
        return 0
    return sum(info.load().nbytes(sizes) for info in EDITS.values() if info.keeps is keeps)
