"""StepDecision: from the statistics of a step to what is written, and the report of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dllmserve.catalog import RULES
from dllmserve.core.rows import IntField, Track
from dllmserve.decoding.noise import position_uniforms, row_keys
from dllmserve.decoding.rule import (
    CanvasView,
    Edits,
    Memory,
    RuleView,
    UnmaskRule,
    Update,
    edited,
)
from dllmserve.decoding.stats import RowParams, TokenStats
from dllmserve.runtime.inputs import StepInputs
from dllmserve.runtime.shape import StepShape
from dllmserve.runtime.state_table import REWRITTEN, StateTable
from dllmserve.runtime.tensors import HeadCells, StepOutputs
from dllmserve.sampling_params import CONFIDENCE, FLOATS


@dataclass(frozen=True)
class _Answer:
    """The answers of n entries after a step, at most A positions long.

    Attributes:
        columns: [n, A] int64, canvas positions; the trash column behind an answer's end.
        tokens: [n, A] int64, undefined where masked.
        masked: [n, A] bool.
        left: [n] int64, masks left in the block.
        first_end: [n] int64, answer index of the first end id that is written; A without one.
        changed: [n, A] bool, what the step wrote, or filled because it lies behind an end id.
        touched: [n, A] bool, that and the rest of the block, but for given tokens.
    """

    columns: Tensor
    tokens: Tensor
    masked: Tensor
    left: Tensor
    first_end: Tensor
    changed: Tensor
    touched: Tensor


#: from what a rule writes to what fits constraints
Settle = Callable[[Update, RuleView], Update]
#: a tensor of the state table, where in it, flattened, and what is written there
_Writing = tuple[Tensor, Tensor, Tensor]


class StepDecision:
    """One step: parameters before the LM head, decisions after it.

    Args:
        table: state rows.
        rules: unmask rules by name.
        shape, inputs: the step's.

    Attributes:
        row_params: parameters of the M LM-head rows.
        cfg_scale: [M] float64.
    """

    def __init__(
        self,
        table: StateTable,
        rules: Mapping[str, UnmaskRule],
        shape: StepShape,
        inputs: StepInputs,
    ) -> None:
        self._table, self._rules = table, rules
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
        self.cfg_scale = floats[:, FLOATS.index("cfg_scale")]
        self.row_params = RowParams(
            temperature=floats[:, FLOATS.index("temperature")],
            top_p=floats[:, FLOATS.index("top_p")],
            top_k=ints[:, IntField.TOP_K],
            tempered=ints[:, IntField.TEMPERED] > 0,
            keys=self._keys,
            given=self._given(cells),
        )

    def _given(self, cells: Tensor) -> Tensor | None:
        """[M] int64, the written token of rows that score one; -1 where one is proposed."""
        if not self._shape.blind:
            return None
        inputs = self._inputs
        tokens = self._table.tokens[inputs.rows[:, None], inputs.block]
        return torch.where(inputs.scored, tokens, -1).flatten()[cells]

    def cells(self) -> HeadCells:
        """Whose LM-head rows these are, for logit edits."""
        inputs, owner = self._inputs, self._owner
        real = inputs.head_real
        return HeadCells(
            row=torch.where(real, inputs.rows[owner], self._table.trash_row),
            column=inputs.head_cells % self._shape.width,
            step=inputs.step[owner].masked_fill(~real, 0),  # nothing is kept of padding
            forward=self._forwards[owner],
            real=real,
        )

    def finish(
        self,
        stats: TokenStats,
        before: Callable[[], None] | None = None,
        settle: Settle | None = None,
    ) -> StepOutputs:
        """Apply the rules, write the state table, report.

        All that is written is worked out first, and writing takes no memory: a step that runs out
        of it leaves the rows as they were, and can be run again.

        Args:
            stats: of the LM-head rows.
            before: writes something else, before anything is written here.
            settle: changes what the rules write, so that it fits constraints.
        """
        view, kind = self._block_view(stats)
        update = apply_rules(self._rules, self._shape.rules, view, kind)
        if settle is not None:
            update = settle(update, view)
        update, edits = with_edits(update, view)
        answer = self._answer(update)
        report = self._report(stats, answer, edits)
        writings = self._writings(update, answer)
        heads = None
        if stats.logprobs:
            heads = heads_of(view, edits, self._inputs.scored)
        confidence = shown_confidence(view, edits)
        if before is not None:
            before()
        for whole, cells, values in writings:
            whole.view(-1)[cells] = values  # with one index, which need not be copied
        return StepOutputs(report, view.tokens, confidence, stats.logprobs, heads, edits=edits)

    def _block_view(self, stats: TokenStats) -> tuple[RuleView, Tensor]:
        """Spread the [M] statistics over the [n, W] block cells."""
        inputs = self._inputs
        kind = self._row_ints[:, IntField.CONFIDENCE]
        value = stats.prob
        if stats.margin is not None:
            value = torch.where(kind == CONFIDENCE.index("margin"), stats.margin, value)
        if stats.entropy is not None:
            value = torch.where(kind == CONFIDENCE.index("neg_entropy"), -stats.entropy, value)
        random = self._row_ints[:, IntField.RANDOM_REMASKING] > 0
        value = torch.where(random, position_uniforms(self._keys), value)
        view = RuleView(
            eligible=inputs.eligible,
            tokens=self._to_cells(stats.token, 0),
            confidence=self._spread(value, inputs.eligible, -torch.inf),
            entropy=self._spread_some(stats.entropy),
            quota=inputs.quota,
            floats=self._floats,
            kl=self._spread_some(stats.kl),
            back=self._back(value) if self._shape.blind else None,
            memory=self._memory(),
            edits=self._edits(stats.prob),
            canvas=self._canvas(stats),
        )
        return view, self._ints[:, IntField.RULE]

    def _back(self, value: Tensor) -> Tensor:
        """[n, W] probability of each written token; +inf where none is, or where it was given."""
        inputs = self._inputs
        open_ = self._table.open[inputs.rows[:, None], inputs.block]
        return self._spread(value, inputs.scored & open_, torch.inf)

    def _edits(self, prob: Tensor) -> Edits | None:
        """What may be replaced, if anything may."""
        inputs = self._inputs
        if inputs.editable is None:
            return None
        current = self._table.tokens[inputs.rows[:, None], inputs.block]
        return Edits(current, self._spread(prob, inputs.editable, -torch.inf))

    def _canvas(self, stats: TokenStats) -> CanvasView | None:
        """What canvases of noise may hold next, if the model has such."""
        if stats.drawn is None:
            return None
        inputs, noise = self._inputs, self._table.noise
        draw = (self._ints[:, IntField.SEED], inputs.block, inputs.step)
        drawn = noise.drawn(self._to_cells(stats.drawn, 0), *draw)
        return CanvasView(inputs.step, drawn, noise.ids(*draw))

    def _spread_some(self, values: Tensor | None) -> Tensor | None:
        return None if values is None else self._spread(values, self._inputs.eligible, torch.inf)

    def _spread(self, values: Tensor, where: Tensor, empty: float) -> Tensor:
        """[M] values to the [n, W] cells where they are wanted; ``empty`` elsewhere."""
        return self._to_cells(values, empty).masked_fill(~where, empty)

    def _to_cells(self, values: Tensor, empty: float) -> Tensor:
        """[M] values to [n, W] cells; ``empty`` where no LM-head row was.

        A padding row repeats a cell, but need not have its value: it goes to a cell of its own.
        """
        inputs, count = self._inputs, self._inputs.block.numel()
        cells = torch.where(inputs.head_real, inputs.head_cells, count)
        flat = torch.full((count + 1,), empty, dtype=values.dtype, device=values.device)
        return flat.scatter_(0, cells, values)[:-1].view(inputs.block.shape)

    def _memory(self) -> Memory | None:
        """What the rules kept, or begin a block with."""
        if "memory" not in self._shape.needs:
            return None
        table, inputs = self._table, self._inputs
        row = table.memory_row[inputs.rows]
        cells = table.memory_cells[inputs.rows[:, None], inputs.block]
        for name in self._shape.rules:
            start = RULES[name].memory
            if start is not None:
                mine = (inputs.step == 0) & (self._ints[:, IntField.RULE] == RULES.index(name))
                row = torch.where(mine, start[0], row)
                cells = torch.where(mine[:, None], start[1], cells)
        return Memory(row, cells)

    def _answer(self, update: Update) -> _Answer:
        """What the step makes of the answers: the rules' update, and what follows an end id."""
        table, inputs, longest = self._table, self._inputs, self._shape.answer
        index = torch.arange(longest, device=table.device)
        start = self._ints[:, IntField.START, None]
        inside = index < self._ints[:, IntField.LENGTH, None]
        columns = torch.where(inside, start + index, table.max_len)
        rows = inputs.rows[:, None]
        written = self._laid_over(torch.zeros_like(inside), update.write)
        tokens = self._laid_over(table.tokens[rows, columns], update.tokens, update.write)
        if update.draft is not None:
            tokens = self._laid_over(tokens, update.draft, inputs.eligible & ~update.write)
        masked = (table.masked[rows, columns] & inside) & ~written
        if update.remask is not None:
            masked |= self._laid_over(torch.zeros_like(inside), update.remask)
        open_ = table.open[rows, columns] & inside
        counts = index >= self._ints[:, IntField.ENDS_FROM, None]
        first = self._first_end(tokens, open_ & ~masked & counts)
        asked = self._ints[:, IntField.EARLY_END, None]
        end = tokens.gather(1, first[:, None].clamp(max=longest - 1))
        # what is filled lies behind the first end id, so that stays where it is
        fill = (masked & (asked > 0)) | (open_ & (tokens != end) & (asked > 1))
        fill &= index > first[:, None]
        masked = masked & ~fill
        of_block = self._laid_over(torch.zeros_like(inside), inputs.block < table.max_len)
        return _Answer(
            columns=columns,
            tokens=torch.where(fill, end, tokens),
            masked=masked,
            left=(masked & of_block).sum(dim=-1),
            first_end=first,
            changed=written | fill,
            touched=(of_block & open_) | fill,
        )

    def _laid_over(self, whole: Tensor, block: Tensor, where: Tensor | None = None) -> Tensor:
        """[n, A] of the answers with the [n, W] of their blocks laid over, or a part of that."""
        inputs, longest = self._inputs, self._shape.answer
        index = inputs.block - self._ints[:, IntField.START, None]
        # a block may hold given tokens before the answer's start and behind its end
        inside = (inputs.block < self._table.max_len) & (index >= 0) & (index < longest)
        if where is not None:
            inside &= where
        room = F.pad(whole, (0, 1))  # for what lies outside
        return room.scatter_(1, torch.where(inside, index, longest), block)[:, :-1]

    def _first_end(self, tokens: Tensor, written: Tensor) -> Tensor:
        """Answer position [n] of the first end id that is written; the width without one."""
        index = torch.arange(tokens.shape[1], device=tokens.device)
        own = self._table.ends[self._inputs.rows]  # [n, E]
        ends = (tokens[..., None] == own[:, None]).any(dim=-1) & written
        return torch.where(ends, index, tokens.shape[1]).amin(dim=-1)

    def _writings(self, update: Update, answer: _Answer) -> list[_Writing]:
        """All that the step leaves in the state table; what is not the step's goes to trash."""
        table, inputs, guided = self._table, self._inputs, self._shape.guided
        writings: list[_Writing] = [(table.forwards, inputs.rows, self._forwards + inputs.fills)]
        if update.memory is not None:
            cells = self._cells(inputs.rows, inputs.block)
            # a forward that only stores, between two that decide, is none of the rule's business
            row = torch.where(inputs.fills, update.memory.row, table.memory_row[inputs.rows])
            writings.append((table.memory_row, inputs.rows, row))
            writings.append((table.memory_cells, cells, update.memory.cells))
        cells = self._cells(inputs.rows, answer.columns, answer.changed)
        number = (self._forwards + 1).int()
        writings.append((table.steps, cells, number[:, None].expand_as(cells)))
        owners = [(inputs.rows, slice(None))]
        if guided:  # both rows of a guided request hold the same answer
            owners.append((inputs.uncond_rows, slice(-guided, None)))
        for rows, part in owners:
            touched = answer.touched[part]
            cells = self._cells(rows, answer.columns[part], touched)
            writings.append((table.tokens, cells, answer.tokens[part]))
            writings.append((table.masked, cells, answer.masked[part] & touched))
            if "track" in self._shape.needs:
                # K,V of a token that was written are those of a mask
                forward = (self._forwards[part] + 1).float()
                note = torch.where(self._drifting(rows), REWRITTEN, forward)
                cells = self._cells(rows, answer.columns[part], answer.changed[part])
                writings.append((table.stale, cells, note[:, None].expand_as(cells)))
        return writings

    def _cells(self, rows: Tensor, columns: Tensor, where: Tensor | None = None) -> Tensor:
        """Where columns [n, k] of rows [n] lie in a flattened tensor of the table: [n, k] int64.

        What is not wanted lies in the trash column.
        """
        if where is not None:
            columns = torch.where(where, columns, self._table.max_len)
        return rows[:, None] * self._table.tokens.shape[1] + columns

    def _drifting(self, rows: Tensor) -> Tensor:
        """[n] bool, rows whose ``stale`` is a drift."""
        return self._table.ints[rows, IntField.TRACK] == Track.DRIFT

    def _report(self, stats: TokenStats, answer: _Answer, edits: Tensor | None) -> Tensor:
        """[n, REPORT_FIELDS] int64, see :class:`dllmserve.core.plan.EntryReport`."""
        inputs, longest, left = self._inputs, self._shape.answer, answer.left
        index = torch.arange(longest, device=left.device)
        open_ = answer.masked | (index >= self._ints[:, IntField.LENGTH, None])
        frontier = torch.where(open_, index, longest).amin(dim=-1)
        # what may be masked again is not settled before its whole block is
        start = (inputs.block[:, 0] - self._ints[:, IntField.START]).clamp(min=0)
        held = (self._ints[:, IntField.REVOKES] > 0) & (left > 0)
        frontier = torch.where(held, torch.minimum(frontier, start), frontier)
        first = answer.first_end
        eos = torch.where(first < frontier, first, -1)
        end = torch.where(first < longest, first, -1)
        bad = stats.prob.isnan() & inputs.head_real
        broken = torch.zeros_like(left).index_add(0, self._owner, bad.long())
        replaced = torch.zeros_like(left) if edits is None else edits.sum(dim=-1)
        return torch.stack((left, frontier, eos, broken, end, replaced), dim=1)


def apply_rules(
    rules: Mapping[str, UnmaskRule],
    names: tuple[str, ...],
    view: RuleView,
    kind: Tensor,  # [n] int64, index of each entry's rule in RULES
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
    draft: Tensor | None = None
    for name, own in zip(names, updates, strict=True):
        mine = (kind == RULES.index(name))[:, None]
        tokens = torch.where(mine, own.tokens, tokens)
        write = torch.where(mine, own.write, write)
        if remask is not None and own.remask is not None:
            remask = torch.where(mine, own.remask, remask)
        if memory is not None and own.memory is not None:
            memory = Memory(
                torch.where(mine[:, 0], own.memory.row, memory.row),
                torch.where(mine, own.memory.cells, memory.cells),
            )
        if own.draft is not None:
            draft = torch.where(mine, own.draft, own.tokens if draft is None else draft)
    return Update(tokens, write, remask, memory, draft)


def with_edits(update: Update, view: RuleView) -> tuple[Update, Tensor | None]:
    """An update that also writes what is edited, and where that is: [n, W] bool, None for none."""
    edits = edited(view)
    if edits is None:
        return update, None
    tokens = torch.where(edits, view.tokens, update.tokens)
    return replace(update, tokens=tokens, write=update.write | edits), edits


def shown_confidence(view: RuleView, edits: Tensor | None) -> Tensor:
    """[n, W] float64, see :class:`dllmserve.runtime.tensors.StepOutputs`."""
    if view.edits is None or edits is None:
        return view.confidence
    return torch.where(edits, view.edits.prob, view.confidence)


def heads_of(view: RuleView, edits: Tensor | None, scored: Tensor | None) -> Tensor:
    """[n, W] int8, see :class:`dllmserve.runtime.tensors.StepOutputs`."""
    heads = view.eligible.to(torch.int8)
    if scored is not None:
        heads = heads + 2 * scored
    if view.edits is not None and edits is not None:
        heads = heads + torch.where(edits, 1, 2) * (view.edits.prob != -torch.inf)
    return heads
