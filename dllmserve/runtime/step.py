"""StepOps: a step's work on the state rows, before and after the model, in two twins.

TorchStep is made of plain operations, for any device; TritonStep does the same, bit for
bit, in a few launches. Neither waits for the device, and all sizes come from the shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import SpanField
from dllmserve.decoding.rule import UnmaskRule
from dllmserve.decoding.stats import TokenStats
from dllmserve.device import host_to_device
from dllmserve.runtime.decide import HeadCells, StepDecision, apply_rules
from dllmserve.runtime.graphs import StepOutputs
from dllmserve.runtime.inputs import build_inputs, entry_fields, span_fields
from dllmserve.runtime.shape import EntryField, StepShape
from dllmserve.runtime.state_table import StateTable
from dllmserve.runtime.tensors import StepTensors


class StepWork(Protocol):
    """One step."""

    @property
    def tensors(self) -> StepTensors:
        """What the step computes with."""
        ...

    def finish(self, stats: TokenStats, before: Callable[[], None] | None = None) -> StepOutputs:
        """Apply the rules to the statistics of the M rows, write the state table, report.

        It runs out of memory before anything is written, or not at all.

        Args:
            stats: of the M rows.
            before: writes something else, just before; it takes no memory.
        """
        ...


class StepOps(Protocol):
    """Reads and writes the state table."""

    def begin(self, packed: Tensor, shape: StepShape) -> StepWork:
        """Gather a step's inputs.

        Args:
            packed: int32, ``Packing.ints`` on the device; it may be longer.
            shape: the packing's.
        """
        ...


def step_ops(
    kernels: str, table: StateTable, rules: Mapping[str, UnmaskRule], spec: ModelSpec
) -> StepOps:
    """The twin that ``kernels`` names: "torch" or "triton"."""
    kind = TritonStep if kernels == "triton" else TorchStep
    return kind(table, rules, spec)


class TorchStep:
    """Plain torch operations.

    Args:
        table: state rows.
        rules: unmask rules by name.
        spec: the model.
    """

    def __init__(self, table: StateTable, rules: Mapping[str, UnmaskRule], spec: ModelSpec) -> None:
        self._table, self._rules, self._spec = table, rules, spec
        self._eos = host_to_device(spec.eos_ids, table.device)

    def begin(self, packed: Tensor, shape: StepShape) -> TorchWork:
        """See :class:`StepOps`."""
        spec, table = self._spec, self._table
        inputs = build_inputs(packed, shape, table, spec.mask_id, spec.logit_shift)
        decision = StepDecision(table, self._rules, self._eos, shape, inputs)
        tensors = StepTensors(
            ids=inputs.ids,
            positions=inputs.positions,
            starts=inputs.starts.int(),
            head_rows=inputs.head_rows,
            head_uncond=inputs.head_uncond,
            cfg_scale=decision.cfg_scale,
            row_params=decision.row_params,
            cells=decision.cells() if shape.edited else None,
            owners=None if shape.plain else inputs.owners,
        )
        return TorchWork(tensors, decision)


@dataclass(frozen=True)
class TorchWork:
    """See :class:`StepWork`."""

    tensors: StepTensors
    decision: StepDecision

    def finish(self, stats: TokenStats, before: Callable[[], None] | None = None) -> StepOutputs:
        """See :class:`StepWork`."""
        return self.decision.finish(stats, before)


class TritonStep:
    """Three launches besides what the rules do.

    Steps that keep something between forwards, or choose their queries on the device, are left
    to the other twin.

    Args:
        table: state rows.
        rules: unmask rules by name.
        spec: the model.
    """

    def __init__(self, table: StateTable, rules: Mapping[str, UnmaskRule], spec: ModelSpec) -> None:
        self.table, self.rules, self.spec = table, rules, spec
        # never empty: no token is -1
        self.eos = host_to_device((*spec.eos_ids, -1), table.device)
        self._other = TorchStep(table, rules, spec)

    def begin(self, packed: Tensor, shape: StepShape) -> StepWork:
        """See :class:`StepOps`."""
        if not shape.plain:
            return self._other.begin(packed, shape)
        from dllmserve.runtime.kernels.begin import begin_step

        spec = self.spec
        tensors = begin_step(packed, shape, self.table, spec.mask_id, spec.logit_shift)
        if shape.edited:
            cells = head_cells(packed, shape, self.table, tensors, spec.logit_shift)
            tensors = replace(tensors, cells=cells)
        return TritonWork(self, packed, shape, tensors)


def head_cells(
    packed: Tensor, shape: StepShape, table: StateTable, tensors: StepTensors, shift: int
) -> HeadCells:
    """Whose LM-head rows a step's are, from what the host knows of them."""
    spans, entries = span_fields(packed, shape).long(), entry_fields(packed, shape)
    index = torch.arange(shape.rows, dtype=torch.int32, device=packed.device)
    # of entries that begin at the same row all but the last are empty
    first = entries[:, EntryField.FIRST_ROW].contiguous()
    entry = torch.searchsorted(first, index, right=True) - 1
    last_row = (first + entries[:, EntryField.ROWS]).index_select(0, entry)
    real, own = index < last_row, spans.index_select(0, entry)
    block = own[:, SpanField.Q_START] + own[:, SpanField.BLK_OFF]
    row = own[:, SpanField.ROW].masked_fill(~real, table.trash_row)
    return HeadCells(
        row=row,
        column=tensors.positions[tensors.head_rows] + shift - block,
        entering=entries[:, EntryField.ENTERING].index_select(0, entry) > 0,
        forward=table.forwards[row],
        real=real,
    )


@dataclass(frozen=True)
class TritonWork:
    """See :class:`StepWork`."""

    ops: TritonStep
    packed: Tensor
    shape: StepShape
    tensors: StepTensors

    def finish(self, stats: TokenStats, before: Callable[[], None] | None = None) -> StepOutputs:
        """See :class:`StepWork`."""
        from dllmserve.runtime.kernels.finish import commit_step, spread_stats

        table, shape = self.ops.table, self.shape
        keys = self.tensors.row_params.keys
        view, kind = spread_stats(self.packed, shape, table, stats, keys)
        update = apply_rules(self.ops.rules, shape.rules, view, kind)
        report = commit_step(self.packed, shape, table, update, stats.prob, self.ops.eos, before)
        return StepOutputs(report, view.tokens, view.confidence)
