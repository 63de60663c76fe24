"""StepDecision: from the statistics of a step to what is written, and the report of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dllmserve.core.rows import IntField, Track, rule_index
from dllmserve.decoding.noise import position_uniforms, row_keys
from dllmserve.decoding.rule import Memory, RuleView, UnmaskRule, Update
from dllmserve.decoding.stats import RowParams, TokenStats
from dllmserve.parameters import FloatField
from dllmserve.runtime.graphs import StepOutputs
from dllmserve.runtime.inputs import StepInputs
from dllmserve.runtime.shape import StepShape
from dllmserve.runtime.state_table import REWRITTEN, StateTable
from dllmserve.sampling_params import CONFIDENCE


@dataclass(frozen=True)
class HeadCells:
    """Whose the M LM-head rows of a step are.

    Attributes:
        row: [M] int64, row of the state table; the trash row for padding.
        column: [M] int64, place in the block.
        entering: [M] bool, whether this is the block's first forward.
        forward: [M] int64, forwards that the request has had.
        real: [M] bool, False for padding.
    """

    row: Tensor
    column: Tensor
    entering: Tensor
    forward: Tensor
    real: Tensor


@dataclass(frozen=True)
class _Answer:
    """The answers of n entries after a step, at most A positions long.

    Attributes:
        columns: [n, A] int64, canvas positions; the trash column behind an answer's end.
        open: [n, A] bool, masked or behind the end.
        first_end: [n] int64, place of the first end id that is written; A without one.
        filled: [n, A] bool, what the step filled because it lies behind an end id.
    """

    columns: Tensor
    open: Tensor
    first_end: Tensor
    filled: Tensor


class StepDecision:
    """One step: parameters before the LM head, decisions after it.

    Args:
        table: state rows.
        rules: unmask rules by name.
        eos: [E] int64, ids that end an answer.
        shape, inputs: the step's.

    Attributes:
        row_params: parameters of the M LM-head rows.
        cfg_scale: [M] float64.
    """

    def __init__(
        self,
        table: StateTable,
        rules: Mapping[str, UnmaskRule],
        eos: Tensor,
        shape: StepShape,
        inputs: StepInputs,
    ) -> None:
        self._table, self._rules, self._eos = table, rules, eos
        self._shape, self._inputs = shape, inputs
        self._floats = table.floats[inputs.rows]  # [n, fields] float64
        self._ints = table.ints[inputs.rows]  # [n, fields] int64
        self._forwards = table.forwards[inputs.rows]  # [n] int64
        cells = inputs.head_cells
        self._owner = cells // shape.width  # [M] entry of each LM-head row
        floats, ints = self._floats[self._owner], self._ints[self._owner]
        self._keys = row_keys(
            ints[:, IntField.SEED],
            inputs.block.flatten()[cells],
            self._forwards[self._owner],
        )
        self._row_ints = ints
        # a block is entered with all of its positions masked, and with none in padding
        inside = inputs.block < table.max_len
        self.entering = (inputs.eligible == inside).all(dim=-1)  # [n] bool
        self.cfg_scale = floats[:, FloatField.CFG_SCALE]
        self.row_params = RowParams(
            temperature=floats[:, FloatField.TEMPERATURE],
            top_p=floats[:, FloatField.TOP_P],
            top_k=ints[:, IntField.TOP_K],
            tempered=ints[:, IntField.TEMPERED] > 0,
            keys=self._keys,
            given=self._given(cells),
        )

    def _given(self, cells: Tensor) -> Tensor | None:
        """[M] int64, the written token of rows that a shadow scores; -1 where one is proposed."""
        if not self._shape.shadowed:
            return None
        inputs = self._inputs
        tokens = self._table.tokens[inputs.rows[:, None], inputs.block]
        return torch.where(inputs.scored, tokens, -1).flatten()[cells]

    def cells(self) -> HeadCells:
        """Whose LM-head rows these are, for what keeps something of them between forwards."""
        inputs, owner = self._inputs, self._owner
        real = inputs.head_real
        return HeadCells(
            row=torch.where(real, inputs.rows[owner], self._table.trash_row),
            column=inputs.head_cells % self._shape.width,
            entering=self.entering[owner],
            forward=self._forwards[owner],
            real=real,
        )

    def finish(self, stats: TokenStats) -> StepOutputs:
        """Apply the rules, write the state table, report."""
        view, kind = self._block_view(stats)
        update = apply_rules(self._rules, self._shape.rules, view, kind)
        self._write(update)
        answer = self._end_early()
        if "track" in self._shape.needs:
            self._note_written(update.write, answer)
        return StepOutputs(self._report(stats, answer), view.tokens, view.confidence)

    def _block_view(self, stats: TokenStats) -> tuple[RuleView, Tensor]:
        """Spread the [M] statistics over the [n, W] block cells."""
        table, inputs = self._table, self._inputs
        kind = self._row_ints[:, IntField.CONFIDENCE]
        value = stats.prob
        if stats.margin is not None:
            value = torch.where(kind == CONFIDENCE.index("margin"), stats.margin, value)
        if stats.entropy is not None:
            value = torch.where(kind == CONFIDENCE.index("neg_entropy"), -stats.entropy, value)
        random = self._row_ints[:, IntField.RANDOM_REMASKING] > 0
        value = torch.where(random, position_uniforms(self._keys), value)
        tokens = torch.zeros_like(inputs.block).flatten()
        tokens.scatter_(0, inputs.head_cells, stats.token)
        step = self._forwards.clamp(max=table.quotas.shape[1] - 1)
        view = RuleView(
            eligible=inputs.eligible,
            tokens=tokens.view(inputs.block.shape),
            confidence=self._spread(value, inputs.eligible, -torch.inf),
            entropy=self._spread_some(stats.entropy),
            quota=table.quotas[inputs.rows, step],
            floats=self._floats,
            kl=self._spread_some(stats.kl),
            back=self._spread(value, inputs.scored, torch.inf) if self._shape.shadowed else None,
            memory=self._memory(),
        )
        return view, self._ints[:, IntField.RULE]

    def _spread_some(self, values: Tensor | None) -> Tensor | None:
        return None if values is None else self._spread(values, self._inputs.eligible, torch.inf)

    def _spread(self, values: Tensor, where: Tensor, empty: float) -> Tensor:
        """[M] values to [n, W] cells; ``empty`` where no LM-head row was.

        A padding row repeats a cell that need not be masked, so cells are filtered again; where
        it is, the padding row comes with the same value, or (kl) goes to a cell of its own.
        """
        cells = torch.where(self._inputs.head_real, self._inputs.head_cells, where.numel())
        flat = torch.full((where.numel() + 1,), empty, dtype=values.dtype, device=values.device)
        flat.scatter_(0, cells, values)
        return flat[:-1].view(where.shape).masked_fill(~where, empty)

    def _memory(self) -> Memory | None:
        """What the rules kept, or begin a block with."""
        if "memory" not in self._shape.needs:
            return None
        table, inputs = self._table, self._inputs
        row = table.memory_row[inputs.rows]
        cells = table.memory_cells[inputs.rows[:, None], inputs.block]
        for name in self._shape.rules:
            start = getattr(self._rules[name], "start", None)
            if start is not None:
                mine = self.entering & (self._ints[:, IntField.RULE] == rule_index(name))
                row = torch.where(mine, start[0], row)
                cells = torch.where(mine[:, None], start[1], cells)
        return Memory(row, cells)

    def _write(self, update: Update) -> None:
        """Write where the rules say so; cells outside the block are trash."""
        table, inputs = self._table, self._inputs
        index, block = inputs.rows[:, None], inputs.block
        tokens = torch.where(update.write, update.tokens, table.tokens[index, block])
        masked = table.masked[index, block] & ~update.write
        if update.remask is not None:
            masked |= update.remask
        if update.memory is not None:
            table.memory_row[inputs.rows] = update.memory.row
            table.memory_cells[index, block] = update.memory.cells
        table.tokens[index, block] = tokens
        table.masked[index, block] = masked
        guided = self._shape.guided
        if guided:  # both rows of a guided request hold the same answer
            twin, cells = inputs.uncond_rows[:, None], block[-guided:]
            table.tokens[twin, cells] = tokens[-guided:]
            table.masked[twin, cells] = masked[-guided:]
        table.forwards[inputs.rows] = self._forwards + 1

    def _answer(self) -> tuple[Tensor, Tensor]:
        """Canvas positions of the answers [n, A], trash behind their ends, and which are masked."""
        table, longest = self._table, self._shape.answer
        place = torch.arange(longest, device=table.device)
        prompt = self._ints[:, IntField.PROMPT_LEN, None]
        length = self._ints[:, IntField.GEN_LENGTH, None]
        columns = torch.where(place < length, prompt + place, table.max_len)
        return columns, table.masked[self._inputs.rows[:, None], columns] | (place >= length)

    def _first_end(self, columns: Tensor, open_: Tensor) -> Tensor:
        """Answer position [n] of the first end id that is written; the width without one."""
        place = torch.arange(columns.shape[1], device=columns.device)
        tokens = self._table.tokens[self._inputs.rows[:, None], columns]
        ends = (tokens[..., None] == self._eos).any(dim=-1) & ~open_
        ends &= self._ints[:, IntField.IGNORE_EOS, None] == 0
        return torch.where(ends, place, columns.shape[1]).amin(dim=-1)

    def _end_early(self) -> _Answer:
        """Fill what lies behind an end id with it, where asked for; the answers after that."""
        table, inputs, longest = self._table, self._inputs, self._shape.answer
        columns, open_ = self._answer()
        first = self._first_end(columns, open_)
        place = torch.arange(longest, device=table.device)
        asked = self._ints[:, IntField.EARLY_END, None] > 0
        fill = open_ & (place > first[:, None]) & asked & (columns < table.max_len)
        end = columns.gather(1, first[:, None].clamp(max=longest - 1))
        token = table.tokens[inputs.rows[:, None], end]  # [n, 1]
        rows = [(inputs.rows, slice(None))]
        if self._shape.guided:
            rows.append((inputs.uncond_rows, slice(-self._shape.guided, None)))
        for row, part in rows:
            index, own = row[:, None], columns[part]
            tokens = table.tokens[index, own]
            table.tokens[index, own] = torch.where(fill[part], token[part], tokens)
            table.masked[index, own] &= ~fill[part]
        # what was filled lies behind the first end id, so that stays where it is
        return _Answer(columns, open_ & ~fill, first, fill)

    def _note_written(self, write: Tensor, answer: _Answer) -> None:
        """Keep what is out of date: K,V of a token that was written are those of a mask."""
        table, inputs = self._table, self._inputs
        rows = [(inputs.rows, slice(None))]
        if self._shape.guided:
            rows.append((inputs.uncond_rows, slice(-self._shape.guided, None)))
        forward = (self._forwards + 1).float()[:, None]
        for row, part in rows:
            index = row[:, None]
            drifts = self._drifting(row)[:, None]
            note = torch.where(drifts, REWRITTEN, forward[part])
            filled = answer.columns[part], answer.filled[part]
            for place, new in ((inputs.block[part], write[part]), filled):
                stale = table.stale[index, place]
                table.stale[index, place] = torch.where(new, note, stale)

    def _drifting(self, rows: Tensor) -> Tensor:
        """[n] bool, rows whose ``stale`` is a drift."""
        return self._table.ints[rows, IntField.TRACK] == Track.DRIFT

    def _report(self, stats: TokenStats, answer: _Answer) -> Tensor:
        """[n, 5] int64, see :class:`dllmserve.core.scheduler.EntryReport`."""
        table, inputs, longest = self._table, self._inputs, self._shape.answer
        rows = inputs.rows[:, None]
        inside = inputs.block < table.max_len
        left = (table.masked[rows, inputs.block] & inside).sum(dim=-1)
        place = torch.arange(longest, device=table.device)
        frontier = torch.where(answer.open, place, longest).amin(dim=-1)
        # what may be masked again is not settled before its whole block is
        start = inputs.block[:, 0] - self._ints[:, IntField.PROMPT_LEN]
        held = (self._ints[:, IntField.REVOKES] > 0) & (left > 0)
        frontier = torch.where(held, torch.minimum(frontier, start), frontier)
        first = answer.first_end
        eos = torch.where(first < frontier, first, -1)
        end = torch.where(first < longest, first, -1)
        broken = torch.zeros_like(left).index_add(0, self._owner, stats.prob.isnan().long())
        return torch.stack((left, frontier, eos, broken, end), dim=1)


def apply_rules(
    rules: Mapping[str, UnmaskRule],
    names: tuple[str, ...],
    view: RuleView,
    kind: Tensor,  # [n] int64, rule_index of each entry's rule
) -> Update:
    """Each entry gets what its own rule says.

    Every rule in use sees all entries: that costs little on [n, W] numbers, and keeps
    the step's shape independent of which entry has which rule.

    Args:
        rules: unmask rules by name.
        names: those in use.
        view: all entries.
    """
    updates = [rules[name].apply(view) for name in names]
    if len(updates) == 1:
        return updates[0]
    tokens, write, memory = updates[0].tokens, updates[0].write, view.memory
    revoking = any(update.remask is not None for update in updates)
    remask = torch.zeros_like(write) if revoking else None
    for name, own in zip(names, updates, strict=True):
        mine = (kind == rule_index(name))[:, None]
        tokens = torch.where(mine, own.tokens, tokens)
        write = torch.where(mine, own.write, write)
        if remask is not None and own.remask is not None:
            remask = torch.where(mine, own.remask, remask)
        if memory is not None and own.memory is not None:
            memory = Memory(
                torch.where(mine[:, 0], own.memory.row, memory.row),
                torch.where(mine, own.memory.cells, memory.cells),
            )
    return Update(tokens, write, remask, memory)
