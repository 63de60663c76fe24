"""TritonConstraints: constraints on a CUDA device, without waiting for it; a twin in kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from dllmserve.constraints.sets import may_end_early, moves_of
from dllmserve.core.plan import OPEN, SpanField
from dllmserve.core.rows import RowInit
from dllmserve.decoding.rule import RuleView, Update
from dllmserve.decoding.stats import RowParams, scores
from dllmserve.parallel.vocab import VocabShard
from dllmserve.runtime.constraints import LOOK_AHEAD, fewer_taken_back
from dllmserve.runtime.edits import EditSizes
from dllmserve.runtime.inputs import span_fields
from dllmserve.runtime.kernels import constrain
from dllmserve.runtime.kernels.region_sets import REGIONS, Field, sweep
from dllmserve.runtime.shape import SegmentShape, StepShape
from dllmserve.runtime.state_table import StateTable
from dllmserve.runtime.tensors import HeadCells

if TYPE_CHECKING:
    from dllmserve.constraints.grammar import TokenGrammar

#: elements of each pool at first; pools double
_SMALL, _WIDE, _SETS = 1 << 20, 1 << 20, 1 << 22
#: states, and classes, that a tile takes
_ST, _CT = 16, 128
#: logits of so many rows are made float64 at once, where noise is drawn for them
_NOISY_ROWS = 64


@dataclass(frozen=True)
class _Packed:
    """A grammar as the pools hold it, and where it begins in them.

    Attributes:
        small: [..] int16.
        wide: [..] int32.
        fields: what a region's row says of it, with offsets from the grammar's own begin.
    """

    grammar: TokenGrammar
    small: NDArray[np.int16]
    wide: NDArray[np.int32]
    fields: dict[Field, int]


def _pack(grammar: TokenGrammar) -> _Packed:
    states, classes = len(grammar.delta) - 1, len(grammar.first)
    source, target = moves_of(grammar).edges
    over = grammar.over
    only = np.where(grammar.size == 1, grammar.first, -1)
    order = np.argsort(grammar.class_of, kind="stable")
    wide = [source | (target << 16), grammar.least, only, order]
    starts = np.cumsum([0, *(len(part) for part in wide)])
    small = np.concatenate([grammar.delta.ravel(), grammar.class_of])
    fields = {
        Field.STATES: states,
        Field.CLASSES: classes,
        Field.FIRST: grammar.start,
        Field.DELTA: 0,
        Field.CLASS_OF: grammar.delta.size,
        Field.EDGES: int(starts[0]),
        Field.EDGE_COUNT: len(source),
        Field.LEAST: int(starts[1]),
        Field.ONLY: int(starts[2]),
        Field.ORDER: int(starts[3]),
        Field.TAIL: int(may_end_early(grammar)),
        Field.OVER: over,
        Field.OVER_ID: int(grammar.first[grammar.delta[over] == over][0]) if over >= 0 else -1,
    }
    packed = np.concatenate(wide).astype(np.int32)
    return _Packed(grammar, small.astype(np.int16), packed, fields)


class _Pool:
    """A tensor that is filled from its beginning, and made anew when it is full.

    Args:
        size: elements at first.
        dtype, device: of the tensor.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.zeros(size, dtype=dtype, device=device)
        self.used = 0

    def has(self, count: int) -> bool:
        """Whether so many elements have room."""
        return self.used + count <= len(self.data)

    def take(self, count: int) -> int:
        """Where the next ``count`` elements begin."""
        self.used += count
        return self.used - count

    def empty(self, count: int) -> bool:
        """Forget all; make room for ``count`` elements and as many again. True if it has grown."""
        self.used, size = 0, len(self.data)
        while size < 2 * count:
            size *= 2
        grown = size > len(self.data)
        if grown:
            self.data = torch.zeros(size, dtype=self.data.dtype, device=self.data.device)
        return grown


class TritonConstraints:
    """See :class:`dllmserve.runtime.constraints.ConstraintEdit`, its slow twin.

    Grammars and sets lie in pools on the device. Those of requests that have ended stay until a
    pool is full; then what is needed is laid out anew, in a larger pool if need be.

    Attributes:
        on_growth: called when tensors that CUDA graphs may hold have been replaced.
    """

    statistic = ""

    def __init__(self, sizes: EditSizes, vocab: VocabShard, device: torch.device) -> None:
        self._vocab, self._device = vocab, device
        shape = (sizes.rows, REGIONS, len(Field))
        self._fields = torch.zeros(shape, dtype=torch.int64, device=device)
        self._entry_of = torch.zeros(sizes.rows, dtype=torch.int32, device=device)
        self._small = _Pool(_SMALL, torch.int16, device)
        self._wide = _Pool(_WIDE, torch.int32, device)
        self._sets = _Pool(_SETS, torch.uint8, device)
        self._packed: dict[str, tuple[_Packed, int, int]] = {}
        self._rows: dict[int, RowInit] = {}
        self._most = _CT
        self.on_growth: Callable[[], None] | None = None

    @staticmethod
    def nbytes(sizes: EditSizes) -> int:
        """See :class:`LogitEdit`; pools that grow take what the device has left."""
        return 2 * _SMALL + 4 * _WIDE + _SETS + sizes.rows * (REGIONS * len(Field) * 8 + 4)

    def admit(self, init: RowInit) -> None:
        """Lay out the regions of a new request, and forget those of the row's last one."""
        if init.row in self._rows and not init.regions:
            del self._rows[init.row]
            self._fields[init.row] = 0
        if not init.regions:
            return
        self._rows[init.row] = init
        made = [self._place(region.grammar) for region in init.regions]
        if None in made or not self._lay_out(init):
            self._lay_out_all()

    def _place(self, grammar: TokenGrammar) -> tuple[_Packed, int, int] | None:
        """Where a grammar lies; None if there is no room for it."""
        if grammar.key not in self._packed:
            packed = _pack(grammar)
            if not (self._small.has(len(packed.small)) and self._wide.has(len(packed.wide))):
                return None
            self._put(packed)
        return self._packed[grammar.key]

    def _put(self, packed: _Packed) -> None:
        places = []
        for pool, part in ((self._small, packed.small), (self._wide, packed.wide)):
            place = pool.take(len(part))
            pool.data[place : place + len(part)] = self._to_device(part)
            places.append(place)
        self._packed[packed.grammar.key] = packed, places[0], places[1]
        most = max(self._most, triton.next_power_of_2(len(packed.grammar.first)))
        if most > self._most:
            self._most = most
            self._has_grown()

    def _to_device(self, values: NDArray[np.integer]) -> Tensor:
        """A copy on the device, which waits for nothing that was launched before."""
        staged = torch.from_numpy(values)
        if self._device.type == "cuda":
            staged = staged.pin_memory()
        return staged.to(self._device, non_blocking=True)

    def _has_grown(self) -> None:
        if self.on_growth is not None:
            self.on_growth()

    def _lay_out(self, init: RowInit) -> bool:
        """Give a row's regions their sets, and say where all is; False if there is no room."""
        rows = []
        for region in init.regions:
            packed, small, wide = self._packed[region.grammar.key]
            slots = region.end - region.start
            size = 2 * (slots + 1) * (packed.fields[Field.STATES] + 1)
            if not (self._sets.has(size) and self._wide.has(slots)):
                return False
            at = {Field.DELTA: small, Field.CLASS_OF: small}
            at |= dict.fromkeys((Field.EDGES, Field.LEAST, Field.ONLY, Field.ORDER), wide)
            own = {field: value + at.get(field, 0) for field, value in packed.fields.items()}
            own |= {Field.START: region.start, Field.SLOTS: slots}
            own |= {Field.SETS: self._sets.take(size), Field.HELD: self._wide.take(slots)}
            rows.append([own[field] for field in Field])
        rows += [[0] * len(Field)] * (REGIONS - len(rows))
        self._fields[init.row] = self._to_device(np.array(rows))
        return True

    def _lay_out_all(self) -> None:
        """Lay out what running requests need, and nothing else."""
        grammars = {r.grammar.key: r.grammar for i in self._rows.values() for r in i.regions}
        packed = [_pack(grammar) for grammar in grammars.values()]
        states = {p.grammar.key: p.fields[Field.STATES] for p in packed}
        regions = [region for init in self._rows.values() for region in init.regions]
        slots = [region.end - region.start for region in regions]
        sizes = (n + 1 for n in slots)
        cells = sum(
            2 * n * (states[r.grammar.key] + 1) for n, r in zip(sizes, regions, strict=True)
        )
        self._packed = {}
        grown = [
            self._small.empty(sum(len(p.small) for p in packed)),
            self._wide.empty(sum(len(p.wide) for p in packed) + sum(slots)),
            self._sets.empty(cells),
        ]
        for one in packed:
            self._put(one)
        for init in self._rows.values():
            self._lay_out(init)
        if any(grown):
            self._has_grown()

    def begin(self, packed: Tensor, shape: StepShape, table: StateTable) -> None:
        """See :class:`ConstraintEdit`."""
        self._step, self._shape, self._table = packed, shape, table
        self._sweep()
        size = (shape.entries, shape.width, self._most)
        self._allowed = torch.zeros(size, dtype=torch.uint8, device=self._device)
        constrain.allowed_classes[size[:2]](
            *(packed, table.masked, self._fields, self._small.data, self._sets.data),
            *(self._allowed, shape.width, table.masked.shape[1]),
            MOST=self._most,
            ST=_ST,
            CT=_CT,
        )
        self._best: Tensor | None = None
        if any(segment.joint for segment in shape.segments if segment.constrained):
            self._best = torch.full(size, -(2**63), dtype=torch.int64, device=self._device)

    def _sweep(self) -> None:
        table, shape = self._table, self._shape
        sweep[(shape.entries, REGIONS)](
            *(self._step, table.tokens, table.masked, self._fields, self._small.data),
            *(self._wide.data, self._sets.data, self._entry_of, table.tokens.shape[1]),
            LOOK=LOOK_AHEAD,
            TILE=1024,
            num_warps=8,
        )

    def apply(self, z: Tensor, cells: HeadCells, rows: slice, size: int) -> Tensor:
        """Logits [n, v] with ids that may not stand at their position at -inf, in place."""
        own, column = cells.row[rows].contiguous(), cells.column[rows].contiguous()
        constrain.strike[(len(z), triton.cdiv(z.shape[1], 2048))](
            *(z, own, column, self._step, self._fields, self._small.data, self._entry_of),
            *(self._allowed, self._shape.width, z.shape[1], z.stride(0), self._vocab.start),
            MOST=self._most,
            TILE=2048,
        )
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
        """See :class:`ConstraintEdit`."""
        if self._best is None or not segment.joint:
            return
        own, column = cells.row[rows].contiguous(), cells.column[rows].contiguous()
        if not segment.sampled and not segment.filtered:
            self._note(z, own, column)
            return
        how = mask_id, segment.sampled, segment.filtered, self._vocab
        for low in range(0, len(z), _NOISY_ROWS):
            part = slice(low, low + _NOISY_ROWS)
            values = scores(z[part], params[part], *how).float()
            self._note(values, own[part], column[part])

    def _note(self, z: Tensor, rows: Tensor, columns: Tensor) -> None:
        size = self._vocab.size
        constrain.note_best[(len(z), triton.cdiv(size, 2048))](
            *(z, rows, columns, self._step, self._fields, self._small.data, self._wide.data),
            *(self._entry_of, self._best, self._shape.width, z.shape[1], z.stride(0)),
            *(self._vocab.start, size),
            MOST=self._most,
            TILE=2048,
        )

    def settle(self, update: Update, view: RuleView) -> Update:
        """See :class:`ConstraintEdit`."""
        tokens, write = update.tokens.clone(), update.write.to(torch.uint8)
        best = self._best
        if best is not None and self._vocab.ranks > 1:
            best = self._vocab.group.all_gather(best).amax(dim=0)
        constrain.settle[(self._shape.entries,)](
            *(self._step, self._fields, self._small.data, self._wide.data, self._sets.data),
            *(view.confidence, tokens, write, write.clone()),
            *(tokens if best is None else best, self._shape.width, self._shape.spans),
            MOST=self._most,
            LOOK=LOOK_AHEAD,
            WIDTH=triton.next_power_of_2(self._shape.width),
            TILE=1024,
            ST=_ST,
            CT=_CT,
            num_warps=8,
        )
        left = write > 0
        rows = span_fields(self._step, self._shape)[: len(left), SpanField.ROW].long()
        own = self._fields[rows, 0, Field.STATES] > 0
        remask = fewer_taken_back(update.remask, left, view, own)
        return replace(update, tokens=tokens, write=left, remask=remask)

    def holds(self, shape: StepShape, table: StateTable) -> Tensor:
        """See :class:`ConstraintEdit`."""
        self._sweep()
        size = (shape.entries, shape.answer)
        found = torch.full(size, OPEN, dtype=torch.int64, device=self._device)
        constrain.only_ids[size](
            *(self._step, table.masked, table.ints, self._fields, self._small.data),
            *(self._wide.data, self._sets.data, found, shape.answer, table.masked.shape[1]),
            LOOK=LOOK_AHEAD,
            ST=_ST,
            CT=_CT,
        )
        return found
