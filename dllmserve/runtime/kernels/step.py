"""TritonStep: a step's work on the state rows in a few launches; the twin of ``TorchStep``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from dllmserve.core.model_spec import ModelSpec
from dllmserve.decoding.rule import UnmaskRule
from dllmserve.decoding.stats import TokenStats
from dllmserve.runtime.decide import (
    Settle,
    apply_rules,
    heads_of,
    shown_confidence,
    with_edits,
)
from dllmserve.runtime.inputs import head_cells
from dllmserve.runtime.kernels.begin import begin_step
from dllmserve.runtime.kernels.finish import commit_step, spread_stats
from dllmserve.runtime.shape import StepShape
from dllmserve.runtime.state_table import StateTable
from dllmserve.runtime.step import StepWork, TorchStep
from dllmserve.runtime.tensors import StepOutputs, StepTensors


class TritonStep:
    """Three launches besides what the rules do.

    Steps that keep something between forwards, or choose their queries on the device, are left
    to the torch twin.

    Args:
        table: state rows.
        rules: unmask rules by name.
        spec: the model.
    """

    def __init__(self, table: StateTable, rules: Mapping[str, UnmaskRule], spec: ModelSpec) -> None:
        self.table, self.rules, self.spec = table, rules, spec
        self._other = TorchStep(table, rules, spec)

    def begin(self, packed: Tensor, shape: StepShape) -> StepWork:
        """See :class:`StepOps`."""
        if not shape.plain:
            return self._other.begin(packed, shape)
        spec = self.spec
        tensors = begin_step(packed, shape, self.table, spec.fed_mask_id, spec.logit_shift)
        if shape.edited:
            cells = head_cells(packed, shape, self.table, tensors, spec.logit_shift)
            tensors = replace(tensors, cells=cells)
        return TritonWork(self, packed, shape, tensors)


@dataclass(frozen=True)
class TritonWork:
    """See :class:`StepWork`."""

    ops: TritonStep
    packed: Tensor
    shape: StepShape
    tensors: StepTensors

    def finish(
        self,
        stats: TokenStats,
        before: Callable[[], None] | None = None,
        settle: Settle | None = None,
    ) -> StepOutputs:
        """See :class:`StepWork`."""
        table, shape = self.ops.table, self.shape
        keys = self.tensors.row_params.keys
        view, kind = spread_stats(self.packed, shape, table, stats, keys)
        update = apply_rules(self.ops.rules, shape.rules, view, kind)
        if settle is not None:
            update = settle(update, view)
        update, edits = with_edits(update, view)
        heads = heads_of(view, edits, None) if stats.logprobs else None
        confidence = shown_confidence(view, edits)
        report = commit_step(self.packed, shape, table, update, stats.prob, before)
        return StepOutputs(report, view.tokens, confidence, stats.logprobs, heads, edits=edits)
