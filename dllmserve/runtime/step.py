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
from dllmserve.runtime.decide import Settle, StepDecision
from dllmserve.runtime.inputs import build_inputs
from dllmserve.runtime.shape import StepShape
from dllmserve.runtime.state_table import StateTable
from dllmserve.runtime.tensors import StepOutputs, StepTensors


class StepWork(Protocol):
    """One step."""

    @property
    def tensors(self) -> StepTensors:
        """What the step computes with."""
        ...

    def finish(
        self,
        stats: TokenStats,
        before: Callable[[], None] | None = None,
        settle: Settle | None = None,
    ) -> StepOutputs:
        """Apply the rules to the statistics of the M rows, write the state table, report.

        It runs out of memory before anything is written, or not at all.

        Args:
            stats: of the M rows.
            before: writes something else, just before; it takes no memory.
            settle: changes what the rules write, so that it fits constraints.
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


class TorchStep:
    """Plain torch operations.

    Args:
        table: state rows.
        rules: unmask rules by name.
        spec: the model.
    """

    def __init__(self, table: StateTable, rules: Mapping[str, UnmaskRule], spec: ModelSpec) -> None:
        self._table, self._rules, self._spec = table, rules, spec

    def begin(self, packed: Tensor, shape: StepShape) -> TorchWork:
        """See :class:`StepOps`."""
        spec, table = self._spec, self._table
        mask_id = None if spec.noise else spec.fed_mask_id
        inputs = build_inputs(packed, shape, table, mask_id, spec.logit_shift)
        decision = StepDecision(table, self._rules, shape, inputs)
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

    def finish(
        self,
        stats: TokenStats,
        before: Callable[[], None] | None = None,
        settle: Settle | None = None,
    ) -> StepOutputs:
        """See :class:`StepWork`."""
        return self.decision.finish(stats, before, settle)
