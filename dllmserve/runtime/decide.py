"""StepDecision: from the statistics of a step to what is written, and the report of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dllmserve.core.rows import FloatField, IntField, rule_index
from dllmserve.decoding.noise import position_uniforms, row_keys
from dllmserve.decoding.rule import RuleView, UnmaskRule, Update
from dllmserve.decoding.stats import RowParams, TokenStats
from dllmserve.runtime.graphs import StepOutputs
from dllmserve.runtime.inputs import StepInputs
from dllmserve.runtime.shape import StepShape
from dllmserve.runtime.state_table import StateTable
from dllmserve.sampling_params import CONFIDENCE


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
        self.cfg_scale = floats[:, FloatField.CFG_SCALE]
        self.row_params = RowParams(
            temperature=floats[:, FloatField.TEMPERATURE],
            top_p=floats[:, FloatField.TOP_P],
            top_k=ints[:, IntField.TOP_K],
            tempered=ints[:, IntField.TEMPERED] > 0,
            keys=self._keys,
        )

    def finish(self, stats: TokenStats) -> StepOutputs:
        """Apply the rules, write the state table, report."""
        confidence, entropy, tokens = self._block_view(stats)
        update = self._apply_rules(confidence, entropy, tokens)
        self._write(update)
        return StepOutputs(self._report(stats), tokens, confidence)

    def _block_view(self, stats: TokenStats) -> tuple[Tensor, Tensor | None, Tensor]:
        """Spread the [M] statistics over the [n, W] block cells."""
        kind = self._row_ints[:, IntField.CONFIDENCE]
        value = stats.prob
        if stats.margin is not None:
            value = torch.where(kind == CONFIDENCE.index("margin"), stats.margin, value)
        if stats.entropy is not None:
            value = torch.where(kind == CONFIDENCE.index("neg_entropy"), -stats.entropy, value)
        random = self._row_ints[:, IntField.RANDOM_REMASKING] > 0
        value = torch.where(random, position_uniforms(self._keys), value)
        entropy = None
        if stats.entropy is not None:
            entropy = self._spread(stats.entropy, torch.inf)
        tokens = torch.zeros_like(self._inputs.block).flatten()
        tokens.scatter_(0, self._inputs.head_cells, stats.token)
        return self._spread(value, -torch.inf), entropy, tokens.view(self._inputs.block.shape)

    def _spread(self, values: Tensor, empty: float) -> Tensor:
        """[M] values to [n, W] cells; ``empty`` where no LM-head row was.

        A padding row repeats a cell that need not be masked, so cells are filtered again.
        """
        eligible = self._inputs.eligible
        flat = torch.full((eligible.numel(),), empty, dtype=values.dtype, device=values.device)
        flat.scatter_(0, self._inputs.head_cells, values)
        return flat.view(eligible.shape).masked_fill(~eligible, empty)

    def _apply_rules(
        self,
        confidence: Tensor,  # [n, W] float64
        entropy: Tensor | None,  # [n, W] float64
        tokens: Tensor,  # [n, W] int64
    ) -> Update:
        """Each entry gets what its own rule says."""
        table, floats = self._table, self._floats
        step = self._forwards.clamp(max=table.quotas.shape[1] - 1)
        view = RuleView(
            eligible=self._inputs.eligible,
            tokens=tokens,
            confidence=confidence,
            entropy=entropy,
            quota=table.quotas[self._inputs.rows, step],
            threshold=floats[:, FloatField.THRESHOLD],
            factor=floats[:, FloatField.FACTOR],
            entropy_bound=floats[:, FloatField.ENTROPY_BOUND],
        )
        return apply_rules(self._rules, self._shape.rules, view, self._ints[:, IntField.RULE])

    def _write(self, update: Update) -> None:
        """Write where the rules say so; cells outside the block are trash."""
        table, inputs = self._table, self._inputs
        index, block = inputs.rows[:, None], inputs.block
        tokens = torch.where(update.write, update.tokens, table.tokens[index, block])
        masked = table.masked[index, block] & ~update.write
        table.tokens[index, block] = tokens
        table.masked[index, block] = masked
        guided = self._shape.guided
        if guided:  # both rows of a guided request hold the same answer
            twin, cells = inputs.uncond_rows[:, None], block[-guided:]
            table.tokens[twin, cells] = tokens[-guided:]
            table.masked[twin, cells] = masked[-guided:]
        table.forwards[inputs.rows] = self._forwards + 1

    def _report(self, stats: TokenStats) -> Tensor:
        """[n, 4] int64: masks left, frontier, first EOS before it or -1, rows without numbers."""
        table, inputs, longest = self._table, self._inputs, self._shape.answer
        rows = inputs.rows[:, None]
        inside = inputs.block < table.max_len
        left = (table.masked[rows, inputs.block] & inside).sum(dim=-1)
        place = torch.arange(longest, device=table.device)
        prompt = self._ints[:, IntField.PROMPT_LEN, None]
        length = self._ints[:, IntField.GEN_LENGTH, None]
        columns = torch.where(place < length, prompt + place, table.max_len)
        open_ = table.masked[rows, columns] | (place >= length)
        frontier = torch.where(open_, place, longest).amin(dim=-1)
        ends = (table.tokens[rows, columns][..., None] == self._eos).any(dim=-1)
        ends &= (place < frontier[:, None]) & (self._ints[:, IntField.IGNORE_EOS, None] == 0)
        first = torch.where(ends, place, longest).amin(dim=-1)
        eos = torch.where(first < longest, first, -1)
        broken = torch.zeros_like(left).index_add(0, self._owner, stats.prob.isnan().long())
        return torch.stack((left, frontier, eos, broken), dim=1)


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
    first, *others = names
    update = rules[first].apply(view)
    for name in others:
        other = rules[name].apply(view)
        mine = (kind == rule_index(name))[:, None]
        update = Update(
            tokens=torch.where(mine, other.tokens, update.tokens),
            write=torch.where(mine, other.write, update.write),
        )
    return update
