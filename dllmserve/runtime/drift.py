"""DriftMeter: how far cached V move when their positions are computed again."""

from __future__ import annotations

import torch
from torch import Tensor

from dllmserve.attention.backend import AttentionStep, token_slots
from dllmserve.core.plan import Store
from dllmserve.core.rows import IntField, Track
from dllmserve.layers.modules import AttentionContext
from dllmserve.parallel.group import join
from dllmserve.runtime.state_table import NEVER_COMPUTED, StateTable

#: Tokens that are compared at once: a step may have many, and float32 copies are large.
_CHUNK = 4096
#: Drifts are multiples of 1 / _STEPS.
_STEPS = 4096.0
#: Drift of a position that was computed once.
UNKNOWN = 1.0
#: Below it, a product of norms counts as this.
_LEAST_NORM = 1e-8


class DriftMeter:
    """An attention context that measures, in one layer, before it attends.

    The drift of a position is ``1 - cos(V now, V before)`` over all K,V heads, in float32, rounded
    down to a multiple of 2**-12; 1, which is much, when it is computed for the first time. It is
    kept in ``StateTable.stale`` of rows that track it.

    Args:
        context: attends.
        step: its step, with positions and owners.
        table: state rows.
        layer: where V is compared.
    """

    def __init__(
        self, context: AttentionContext, step: AttentionStep, table: StateTable, layer: int
    ) -> None:
        self._context, self._table, self._layer = context, table, layer
        rows, positions, slots = token_slots(step, (Store.POSITIONS, Store.AHEAD))
        tracked = (rows >= 0) & (table.ints[rows, IntField.TRACK] == Track.DRIFT)
        # what tracks no drift is read from and written to trash
        self._rows = torch.where(tracked, rows, table.trash_row)
        self._positions = positions.masked_fill(~tracked, table.max_len)
        self._slots = torch.where(tracked, slots, 0)
        self._cache, self._group = step.kv.v[layer], step.group
        self._drift = torch.zeros(len(rows), device=rows.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :class:`dllmserve.layers.modules.AttentionContext`."""
        if layer == self._layer:
            for low in range(0, len(v), _CHUNK):
                self._measure(v, slice(low, low + _CHUNK))
        return self._context.attend(layer, q, k, v)

    def keep(self) -> None:
        """Keep what was measured. Call it when the step has gone through: it may be run again."""
        self._table.stale[self._rows, self._positions] = self._drift

    def _measure(self, v: Tensor, chunk: slice) -> None:
        """Compare a chunk of V [N, Hkv, D] with what the pages hold."""
        row, position = self._rows[chunk], self._positions[chunk]
        now, before = v[chunk].float(), self._cache[self._slots[chunk]].float()
        # head by head, and then in one order whatever ranks have them
        found = torch.stack([(a * b).sum(dim=2) for a, b in _pairs(now, before)], dim=2)
        both, one, other = join(self._group, found, 1).sum(dim=1).unbind(dim=1)  # [n]
        norms = (one * other).sqrt().clamp(min=_LEAST_NORM)
        drift = 1.0 - both / norms
        # what did not move moves by rounding errors, and those must not decide
        drift = (drift * _STEPS).floor().clamp(min=0.0) / _STEPS
        known = self._table.stale[row, position] < NEVER_COMPUTED
        self._drift[chunk] = torch.where(known, drift, UNKNOWN)


def _pairs(now: Tensor, before: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    return (now, before), (now, now), (before, before)
