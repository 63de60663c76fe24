"""StepOps: a step's work on the state rows, before and after the model, in two twins.

TorchStep is made of plain operations, for any device; TritonStep does the same, bit for
bit, in a few launches. Neither waits for the device, and all sizes come from the shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dllmserve.core.model_spec import ModelSpec
from dllmserve.decoding.rule import UnmaskRule
from dllmserve.decoding.stats import TokenStats
from dllmserve.device import host_to_device
from dllmserve.runtime.decide import StepDecision, apply_rules
from dllmserve.runtime.graphs import StepOutputs
from dllmserve.runtime.inputs import build_inputs
from dllmserve.runtime.shape import SPAN_FIELDS, StepShape
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


def span_fields(packed: Tensor, shape: StepShape) -> Tensor:
    """[S, 10] int32, the spans at the start of a packing."""
    return packed[: shape.spans * SPAN_FIELDS].view(shape.spans, SPAN_FIELDS)


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
        spans = span_fields(packed, shape)
        inputs = build_inputs(spans, shape, table, spec.mask_id, spec.logit_shift)
        decision = StepDecision(table, self._rules, self._eos, shape, inputs)
        tensors = StepTensors(
            ids=inputs.ids,
            positions=inputs.positions,
            starts=inputs.starts.int(),
            head_rows=inputs.head_rows,
            head_uncond=inputs.head_uncond,
            cfg_scale=decision.cfg_scale,
            row_params=decision.row_params,
            cells=None if shape.plain else decision.cells(),
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
        return TritonWork(self, packed, shape, tensors)


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
