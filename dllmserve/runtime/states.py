"""LogitState: what rules keep of the logits between forwards, in device rows.

A rule names its state in ``needs``. The state sees every chunk of its rows' logits before they
are reduced to statistics, and may change them or add a statistic of its own.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dllmserve._values import MAX_GEN_LENGTH
from dllmserve.core.rows import RowInit
from dllmserve.decoding.stats import log_sum, without
from dllmserve.device import host_to_device
from dllmserve.parallel.vocab import VocabShard, best_of
from dllmserve.runtime.decide import HeadCells


class LogitState(Protocol):
    """Device state of one kind.

    A forward never overwrites what it reads, so it can be run again after it ran out of memory.
    """

    def admit(self, init: RowInit) -> None:
        """Prepare the row of a new request that needs the state."""
        ...

    def observe(self, z: Tensor, cells: HeadCells, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Take a chunk of logits.

        Args:
            z: [n, v] logits of this rank's ids.
            cells: whose the step's M LM-head rows are.
            rows: which of them the chunk holds.

        Returns:
            Logits [n, v] to be reduced, and a statistic [n] float64 or None.
        """
        ...


class KlHistory:
    """The distribution of each position in the block's last forward, for KL divergences.

    Args:
        rows: of the state table, the trash row included.
        slots: distributions that may be kept, besides slot 0, which is trash.
        vocab: this rank's part of the vocabulary; it keeps the distributions of that.
        max_block: longest block.
        device: of the state table.

    Attributes:
        slots: [rows, max_block] int64, slot of each position of the row's block.
        log_probs: [2, slots + 1, v] float32, of even and odd forwards.
    """

    @staticmethod
    def nbytes(rows: int, slots: int, ids: int, max_block: int) -> int:
        """Bytes on the device, of a rank with so many ids."""
        return 2 * (slots + 1) * ids * 4 + rows * max_block * 8

    def __init__(
        self, rows: int, slots: int, vocab: VocabShard, max_block: int, device: torch.device
    ) -> None:
        self._vocab = vocab
        self.slots = torch.zeros(rows, max_block, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(2, slots + 1, vocab.stop - vocab.start, device=device)

    def admit(self, init: RowInit) -> None:
        """Note the slots that the scheduler reserved."""
        self.slots[init.row, : len(init.history)] = host_to_device(init.history, self.slots.device)

    def observe(self, z: Tensor, cells: HeadCells, rows: slice) -> tuple[Tensor, Tensor | None]:
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
        return z, torch.where(cells.entering[rows], torch.inf, kl)


class CreditTable:
    """Credits of tokens at each position (dInfer), for the credit rule.

    In every forward of a block but its first, all credits shrink to 0.8 and the position's best
    token, of probability p, earns ``p ** 0.2``; then ``0.7 ln(1 + credit)`` is added to logits.
    A position remembers the credits of 16 tokens: upstream keeps one for every token of the
    vocabulary, most of which are zero. A seventeenth replaces the smallest.

    Args:
        rows: of the state table, the trash row included.
        max_block: longest block.
        vocab: this rank's part of the vocabulary.
        mask_id: never earns.
        device: of the state table.

    Attributes:
        ids: [2, rows, max_block, 16] int32, of even and odd forwards; -1 where free. Places that
            the row's block has not written yet may hold anything.
        credits: [2, rows, max_block, 16] float32.
    """

    KEPT = 16
    DECAY, POWER, WEIGHT = 0.8, 0.2, 0.7

    def __init__(
        self, rows: int, max_block: int, vocab: VocabShard, mask_id: int, device: torch.device
    ) -> None:
        self._vocab, self._mask_id = vocab, mask_id
        size = (2, rows, max_block, self.KEPT)
        self.ids = torch.zeros(size, dtype=torch.int32, device=device)
        self.credits = torch.zeros(size, device=device)

    @classmethod
    def nbytes(cls, rows: int, max_block: int) -> int:
        """Bytes on the device."""
        return 2 * rows * max_block * cls.KEPT * (4 + 4)

    def admit(self, init: RowInit) -> None:
        """Nothing: a block begins without credits."""

    def observe(self, z: Tensor, cells: HeadCells, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Logits [n, v] float32 with the credits added."""
        z, vocab = z.float(), self._vocab
        row, place = cells.row[rows], cells.column[rows].clamp(max=self.ids.shape[2] - 1)
        entering = cells.entering[rows][:, None]
        odd = cells.forward[rows] % 2
        ids = torch.where(entering, -1, self.ids[1 - odd, row, place].long())  # [n, 16]
        before = self.credits[1 - odd, row, place]
        credits = torch.where(entering, 0.0, before) * self.DECAY
        best, token = self._best(z)  # [n, 1]
        # p ** POWER; torch's power rounds by an element's place on a CPU, exp does not
        earned = ((best - log_sum(z, vocab)) * self.POWER).exp()
        known = ids == token
        # a new token takes a free place, or that of the smallest credit
        least = torch.where(ids < 0, -1.0, credits).argmin(dim=-1, keepdim=True)
        column = torch.arange(self.KEPT, device=z.device)
        here = torch.where(known.any(dim=-1, keepdim=True), known, column == least)
        here &= ~entering
        fresh = torch.where(known, credits, 0.0) + earned
        credits = torch.where(here, fresh, credits)
        ids = torch.where(here, token, ids)
        self.ids[odd, row, place] = ids.int()
        self.credits[odd, row, place] = credits
        raised = torch.where(ids >= 0, self.WEIGHT * credits.log1p(), 0.0)
        columns, mine = vocab.locate(ids)
        return z.scatter_add(1, columns, raised.masked_fill(~mine, 0.0)), None

    def _best(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Logit [n, 1] float32 and id [n, 1] int64 of each row's best token."""
        best, column = without(z, self._mask_id, self._vocab.start).max(dim=-1)
        token = column + self._vocab.start
        found = self._vocab.group.all_gather(torch.stack((best.double(), token.double())))
        best, token = best_of(found[:, 0], (found[:, 0], found[:, 1]))
        return best.float()[:, None], token.long()[:, None]


def make_states(
    rows: int, slots: int, max_len: int, vocab: VocabShard, mask_id: int, device: torch.device
) -> dict[str, LogitState]:
    """All that rules may keep of logits, by the name that they have in ``RuleInfo.needs``.

    It is allocated once, so that no request's arrival can be what memory runs out at.

    Args:
        rows: of the state table, the trash row included.
        slots: distributions that may be kept; 0: nothing at all is kept.
        max_len: longest canvas.
        vocab: this rank's part of the vocabulary.
        mask_id: never earns credits.
        device: of the state table.
    """
    if not slots:
        return {}
    block = min(max_len, MAX_GEN_LENGTH)
    return {
        "kl": KlHistory(rows, slots, vocab, min(slots, block), device),
        "credit": CreditTable(rows, block, vocab, mask_id, device),
    }


def state_bytes(rows: int, slots: int, max_len: int, ids: int) -> int:
    """Bytes that :func:`make_states` allocates on a rank with so many ids of the vocabulary."""
    if not slots:
        return 0
    block = min(max_len, MAX_GEN_LENGTH)
    history = KlHistory.nbytes(rows, slots, ids, min(slots, block))
    return history + CreditTable.nbytes(rows, block)
