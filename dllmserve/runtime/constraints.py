"""ConstraintEdit: keeps answers inside their grammars.

Before a step, each constrained request's sets are brought up to what its row holds. Logits of ids
that no good filling has at a position are struck off, so token, probability, confidence and noise
are those of what may stand there. After the rule has chosen, its positions are visited by falling
confidence, and each write renews the sets, so that several writes of a step go together. What the
row then holds says which positions can hold one id alone: the host writes those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dllmserve.constraints.sets import MASKED, Moves, RegionSets, moves_of
from dllmserve.core.plan import OPEN, WRITTEN, Part, SpanField
from dllmserve.core.rows import RowInit
from dllmserve.decoding.rule import RuleView, Update, rank_of
from dllmserve.decoding.stats import RowParams, scores
from dllmserve.parallel.vocab import VocabShard
from dllmserve.runtime.edits import EditSizes
from dllmserve.runtime.inputs import entry_fields, span_fields
from dllmserve.runtime.shape import EntryField, SegmentShape, StepShape
from dllmserve.runtime.state_table import StateTable
from dllmserve.runtime.tensors import HeadCells

#: positions from the active block on, at least, whose only ids are looked for after a step
LOOK_AHEAD = 32


def fewer_taken_back(
    remask: Tensor | None,  # [n, W] bool
    write: Tensor,  # [n, W] bool, what is left of what the rule writes
    view: RuleView,
    constrained: Tensor,  # [n] bool
) -> Tensor | None:
    """What a rule masks again, but in constrained entries fewer positions than it writes.

    A rule that comes to an end because it takes back less than it wrote must not take back what it
    would have written and could not.
    """
    if remask is None or view.back is None:
        return remask
    room = torch.where(constrained, write.sum(dim=-1) - 1, remask.shape[1])
    key = torch.where(remask, -view.back, -torch.inf)
    return remask & (rank_of(key) < room[:, None])


@dataclass
class _Region:
    """One region of a row.

    Attributes:
        start: canvas position of its first slot.
        sets: of its slots.
        class_of: [v] int64, class of each id of this rank.
    """

    start: int
    sets: RegionSets
    class_of: Tensor

    @property
    def end(self) -> int:
        """Position behind its last slot."""
        return self.start + len(self.sets)


@dataclass
class _Entry:
    """A constrained entry of the step.

    Attributes:
        index: of the entry.
        row: of the state table.
        block: canvas positions ``[start, end)``.
        written: positions that are written count as open, too: their tokens are scored.
        joint: how many tokens a schedule writes, if more than one; else 0.
        best: by position, the best score and id of each class, where several are written.
    """

    index: int
    row: int
    block: tuple[int, int]
    written: bool
    joint: int
    best: dict[int, tuple[NDArray[np.float64], NDArray[np.int64]]]


class ConstraintEdit:
    """Constraints on a CPU, in numpy; a CUDA device has a twin in kernels.

    Args:
        sizes, vocab, device: see :class:`dllmserve.runtime.edits.LogitEdit`.
    """

    statistic = ""

    def __init__(self, sizes: EditSizes, vocab: VocabShard, device: torch.device) -> None:
        self._vocab = vocab
        #: see the twin; here no tensor is replaced that a graph holds
        self.on_growth: Callable[[], None] | None = None
        self._regions: dict[int, list[_Region]] = {}
        self._moves: dict[str, tuple[Moves, Tensor]] = {}
        self._entries: dict[int, _Entry] = {}

    @staticmethod
    def nbytes(sizes: EditSizes) -> int:
        """Nothing is kept on the device."""
        return 0

    def admit(self, init: RowInit) -> None:
        """Take the regions of a new request."""
        made = []
        for region in init.regions:
            grammar = region.grammar
            if grammar.key not in self._moves:
                own = grammar.class_of[self._vocab.start : self._vocab.stop]
                self._moves[grammar.key] = moves_of(grammar), torch.from_numpy(own.astype(np.int64))
            moves, class_of = self._moves[grammar.key]
            sets = RegionSets(moves, region.end - region.start)
            made.append(_Region(region.start, sets, class_of))
        self._regions[init.row] = made
        used = {r.sets.grammar.key for regions in self._regions.values() for r in regions}
        self._moves = {key: found for key, found in self._moves.items() if key in used}

    def begin(self, packed: Tensor, shape: StepShape, table: StateTable) -> None:
        """Bring the sets of a step's constrained rows up to what the rows hold."""
        spans = span_fields(packed, shape)[: shape.entries].tolist()
        fields = entry_fields(packed, shape).tolist()
        self._entries = {}
        for index, (span, entry) in enumerate(zip(spans, fields, strict=True)):
            row, length = span[SpanField.ROW], span[SpanField.BLK_LEN]
            init = table.host.get(row)
            if not length or init is None or not init.regions or row == table.trash_row:
                continue
            start = span[SpanField.Q_START] + span[SpanField.BLK_OFF]
            quota = entry[EntryField.QUOTA]
            written = span[SpanField.HEAD] == Part.BLOCK
            block = (start, start + length)
            self._entries[row] = _Entry(index, row, block, written, quota, {})
            self._refresh(row, table)

    def _refresh(self, row: int, table: StateTable) -> None:
        tokens, masked = table.tokens[row].numpy(), table.masked[row].numpy()
        for region in self._regions[row]:
            part = slice(region.start, region.end)
            classes = region.sets.grammar.class_of[tokens[part]].astype(np.int64)
            region.sets.update(np.where(masked[part], MASKED, classes))

    def _places(self, chunk: slice, cells: HeadCells) -> Iterator[tuple[int, _Entry, int, _Region]]:
        """Of a chunk's LM-head rows, those in a region: place, entry, position and region."""
        rows, columns = cells.row[chunk].tolist(), cells.column[chunk].tolist()
        for place, (row, column) in enumerate(zip(rows, columns, strict=True)):
            entry = self._entries.get(row)
            if entry is None:
                continue
            position = entry.block[0] + column
            region = self._region(row, position)
            if region is not None:
                yield place, entry, position, region

    def _region(self, row: int, position: int) -> _Region | None:
        found = (r for r in self._regions[row] if r.start <= position < r.end)
        return next(found, None)

    def apply(self, z: Tensor, cells: HeadCells, rows: slice, size: int) -> Tensor:
        """Logits [n, v] with ids that may not stand at their position at -inf, in place."""
        for place, _, position, region in self._places(rows, cells):
            allowed = torch.from_numpy(region.sets.allowed(position - region.start))
            z[place].masked_fill_(~allowed[region.class_of], -torch.inf)
        return z

    def note(
        self,
        z: Tensor,  # [n, v] logits, edited
        params: RowParams,
        cells: HeadCells,
        rows: slice,
        segment: SegmentShape,
        mask_id: int,
    ) -> None:
        """Keep the best of each class where a schedule writes several tokens in the step.

        The best is that of the values that a proposal is the largest of: of a position whose
        proposal does not go with another write any more, it is chosen among what still does.
        """
        places = [found for found in self._places(rows, cells) if found[1].joint > 1]
        if not places:
            return
        chosen = torch.tensor([place for place, *_ in places])
        values = scores(
            z[chosen], params[chosen], mask_id, segment.sampled, segment.filtered, self._vocab
        )
        for value, (_, entry, position, region) in zip(values, places, strict=True):
            entry.best[position] = self._best(value, region)

    def _best(
        self, value: Tensor, region: _Region
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Best value and its lowest id of each class, over all ranks: [C] each."""
        count = len(region.sets.grammar.first)
        best = torch.full((count,), -torch.inf, dtype=torch.float64)
        best.scatter_reduce_(0, region.class_of, value, "amax")
        ids = torch.arange(self._vocab.start, self._vocab.stop)
        far = 2**31 - 1
        own = torch.where(value == best[region.class_of], ids, far)
        lowest = torch.full((count,), far).scatter_reduce_(0, region.class_of, own, "amin")
        if self._vocab.ranks > 1:
            found = self._vocab.group.all_gather(torch.stack((best, lowest.double())))  # [R, 2, C]
            best = found[:, 0].amax(dim=0)
            lowest = torch.where(found[:, 0] == best, found[:, 1], far).amin(dim=0).long()
        return best.numpy(), lowest.numpy()

    def settle(self, update: Update, view: RuleView) -> Update:
        """What a rule writes, so that all of it goes together.

        A position whose token does not go with what was written before it in the step gets its
        best id among those that do, if a schedule says how many are written, and is left open
        otherwise. The first always goes.
        """
        tokens, write = update.tokens.clone(), update.write.clone()
        for entry in self._entries.values():
            places = write[entry.index].nonzero()[:, 0].tolist()
            confidence = view.confidence[entry.index].tolist()
            for place in sorted(places, key=lambda place: (-confidence[place], place)):
                position = entry.block[0] + place
                region = self._region(entry.row, position)
                if region is None:
                    continue
                token = self._going(entry, position, region, int(tokens[entry.index, place]))
                if token is None:
                    write[entry.index, place] = False
                    continue
                tokens[entry.index, place] = token
                classes = region.sets.grammar.class_of
                region.sets.fill(position - region.start, int(classes[token]))
        own = torch.zeros(len(write), dtype=torch.bool)
        own[[entry.index for entry in self._entries.values()]] = True
        remask = fewer_taken_back(update.remask, write, view, own)
        return replace(update, tokens=tokens, write=write, remask=remask)

    def _going(self, entry: _Entry, position: int, region: _Region, token: int) -> int | None:
        """The token, if it goes with what is written; else the best that does, or None."""
        sets, slot = region.sets, position - region.start
        if sets.allows(slot, int(sets.grammar.class_of[token])):
            return token
        if position not in entry.best:
            return None
        best, ids = entry.best[position]
        value = np.where(sets.allowed(slot), best, -np.inf)
        return int(ids[value == value.max()].min())

    def holds(self, shape: StepShape, table: StateTable) -> Tensor:
        """[n, A] int64, see :class:`dllmserve.core.plan.EntryReport`; OPEN of other entries."""
        found = torch.full((shape.entries, shape.answer), OPEN, dtype=torch.int64)
        for entry in self._entries.values():
            row, init = entry.row, table.host[entry.row]
            answer = found[entry.index, : init.length]
            answer[~table.masked[row, init.start : init.start + init.length]] = WRITTEN
            self._refresh(row, table)
            low, high = entry.block
            high += max(high - low, LOOK_AHEAD)
            for region in self._regions[row]:
                first = region.start
                inside = range(max(low, first) - first, min(high, region.end) - first)
                for slot, token in region.sets.forced(inside).items():
                    answer[slot + first - init.start] = token
        return found
