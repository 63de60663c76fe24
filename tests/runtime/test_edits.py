"""Logit edits: whose LM-head rows they see, and what a bias adds."""

from dataclasses import replace

import pytest
import torch

from dllmserve._values import MAX_LOGIT_BIAS
from dllmserve.catalog import RULES
from dllmserve.core.plan import Span, StepEntry, StepPlan
from dllmserve.core.rows import RowInit, RowSelect
from dllmserve.parallel.vocab import VocabShard
from dllmserve.runtime.edits import BiasEdit, EditSizes
from dllmserve.runtime.inputs import head_cells
from dllmserve.runtime.logits import StepEdits
from dllmserve.runtime.shape import EXACT, LADDER, Padding, SegmentShape, empty_ints, lay_out
from dllmserve.runtime.state_table import StateTable
from dllmserve.runtime.step import TorchStep
from dllmserve.runtime.tensors import HeadCells
from dllmserve.sampling_params import FLOATS
from tests.helpers import PLAIN

CPU = torch.device("cpu")
VOCABULARY = 50
SPEC = replace(PLAIN, vocab_size=VOCABULARY, mask_id=49)
SIZES = EditSizes(rows=9, slots=0, max_len=12, ids=VOCABULARY, spec=SPEC)
PAIRS = tuple((i, 1.0) for i in range(MAX_LOGIT_BIAS))
MUCH = Padding(tokens=lambda n: n + 7, rows=lambda n: n + 5, other=lambda n: n + 3)


def packed(ints: object) -> torch.Tensor:
    return torch.tensor([*ints, -(10**6)], dtype=torch.int32)  # type: ignore[misc]


def table_and_plan(biases: dict[int, int]) -> tuple[StateTable, StepPlan]:
    """Entries on rows 6, 0, 3, 5 and 1 with 2, 4, 1, 3 and 2 masks; the last is guided.

    Of ``biases``, each row has so many ids.
    """
    table = StateTable(8, 12, CPU)
    kinds = {6: (False, False), 0: (False, False), 3: (False, False), 5: (True, True)}
    for row in (6, 0, 3, 5, 1, 2):
        sampled, filtered = kinds.get(row, (False, False))
        table.write_row(
            RowInit(
                row=row,
                ids=[1, 2],
                holes=((2, 8),),
                floats=(0.0,) * len(FLOATS),
                ints=(2, 6, 0, 7, 0, 0, 0, RULES.index("steps"), 0, 0, 0, 0),
                ends=(),
                confidence="probability",
                sampled=sampled,
                filtered=filtered,
                select=RowSelect(),
                edits={"bias": tuple((i, 1.0) for i in range(biases[row]))}
                if row in biases
                else {},
            )
        )
    entries = []
    for row, masks in ((6, 2), (0, 4), (3, 1), (5, 3), (1, 2)):
        table.masked[row, 2 + masks : 8] = False
        span = Span(row, 0, 8, 0, 0, 0, 2, 6)
        twin = span._replace(row=2) if row == 1 else None
        entries.append(StepEntry(span, twin, masks, "steps"))
    return table, StepPlan(tuple(entries))


@pytest.mark.parametrize("pad", [EXACT, LADDER, MUCH], ids=["exact", "ladder", "much"])
@pytest.mark.parametrize("shift", [0, 1])
def test_whose_head_rows_they_are(pad: Padding, shift: int) -> None:
    """The host's numbers say the same as the masks themselves, padding rows included."""
    table, plan = table_and_plan({})
    plan = StepPlan(tuple(e._replace(step=0 if e.masks == 6 else 1) for e in plan.entries))
    packing = lay_out(plan, table.host, lambda _: frozenset(), table.trash_row, pad)
    ints, shape = packed(packing.ints), packing.shape
    work = TorchStep(table, {}, replace(SPEC, logit_shift=shift)).begin(ints, shape)
    expected, got = work.decision.cells(), head_cells(ints, shape, table, work.tensors, shift)
    assert len(shape.segments) == 3
    assert torch.equal(got.real, expected.real)
    real = expected.real
    for name in ("row", "column", "step", "forward"):
        assert torch.equal(getattr(got, name)[real], getattr(expected, name)[real]), name
    assert bool((got.row[~real] == table.trash_row).all())
    nothing = packed(empty_ints(shape, table.trash_row))
    rows = head_cells(nothing, shape, table, work.tensors, shift).row
    assert rows.tolist() == [table.trash_row] * shape.rows


@pytest.mark.parametrize("first", [True, False], ids=["open", "given"])
def test_a_row_that_begins_with_a_hole(first: bool) -> None:
    """Of a shifted model the first two positions are read at the same one."""
    table, plan = table_and_plan({})
    table.masked[6, :4] = torch.tensor([first, True, False, True])
    table.masked[6, 4:] = False
    span = Span(6, 0, 8, 0, 0, 0, 0, 8)
    plan = StepPlan((StepEntry(span, None, 2 + first, "steps"), *plan.entries[1:]))
    packing = lay_out(plan, table.host, lambda _: frozenset(), table.trash_row, LADDER)
    ints, shape = packed(packing.ints), packing.shape
    work = TorchStep(table, {}, replace(SPEC, logit_shift=1)).begin(ints, shape)
    expected, got = work.decision.cells(), head_cells(ints, shape, table, work.tensors, 1)
    real = expected.real
    assert torch.equal(got.column[real], expected.column[real])
    own = got.column[real & (got.row == 6)].tolist()
    assert own == ([0, 1, 3] if first else [1, 3])


@pytest.mark.parametrize("pad", [EXACT, LADDER], ids=["exact", "ladder"])
def test_a_segment_has_one_set_of_edits_and_room_for_the_longest(pad: Padding) -> None:
    def edits(biases: dict[int, int]) -> list[tuple[tuple[str, int], ...]]:
        table, plan = table_and_plan(biases)
        packing = lay_out(plan, table.host, lambda _: frozenset(), table.trash_row, pad)
        return [segment.edits for segment in packing.shape.segments]

    assert edits({}) == [(), (), ()]
    some = (("bias", pad.other(3)),)
    assert edits({0: 3, 3: 1, 1: 1}) == [(), some, (), (("bias", 1),)]
    assert edits({5: MAX_LOGIT_BIAS}) == [(), (("bias", MAX_LOGIT_BIAS),), ()]
    assert edits({5: MAX_LOGIT_BIAS - 1})[1][0][1] <= MAX_LOGIT_BIAS


def admit(edit: BiasEdit, row: int, *pairs: tuple[int, float]) -> None:
    table, _ = table_and_plan({})
    edit.admit(replace(table.host[6], row=row, edits={"bias": pairs}))


def cells_of(rows: list[int]) -> HeadCells:
    row = torch.tensor(rows)
    return HeadCells(row, row * 0, row > 99, row * 0, row >= 0)


def test_what_is_added() -> None:
    bias = BiasEdit(SIZES, VocabShard(VOCABULARY), CPU)
    admit(bias, 6, (3, -100.0), (40, 2.5))
    admit(bias, 3, (0, 1.0), (3, 0.25), (49, 100.0))
    cells = cells_of([6] * 2 + [0] * 4 + [3] + [5] * 3 + [1] * 2)
    z = torch.randn(12, VOCABULARY, generator=torch.Generator().manual_seed(0))
    expected = z.clone()
    expected[:2, 3] += -100.0
    expected[:2, 40] += 2.5
    expected[6, [0, 3, 49]] += torch.tensor([1.0, 0.25, 100.0])
    for low, high in ((0, 7), (0, 12), (1, 3), (6, 7)):
        for width in (3, 8, MAX_LOGIT_BIAS):
            got = bias.apply(z[low:high].clone(), cells, slice(low, high), width)
            assert torch.equal(got, expected[low:high])


def test_half_precision_is_widened() -> None:
    """Tokens that a bias of 100 forces keep the order that the model gave them."""
    bias = BiasEdit(SIZES, VocabShard(VOCABULARY), CPU)
    admit(bias, 0, (0, 100.0), (1, 100.0))
    z = torch.zeros(1, VOCABULARY, dtype=torch.bfloat16)
    z[0, :3] = torch.tensor([1.0, 1.0625, 0.5])
    got = bias.apply(z, cells_of([0]), slice(0, 1), 2)
    assert got.dtype == torch.float32
    assert got[0, :3].tolist() == [101.0, 101.0625, 0.5]
    assert z[0, :3].tolist() == [1.0, 1.0625, 0.5]


def test_a_row_forgets_its_last_request() -> None:
    bias = BiasEdit(SIZES, VocabShard(VOCABULARY), CPU)
    admit(bias, 1, (4, 1.0), (5, 2.0))
    admit(bias, 1, (6, 3.0))
    assert bias.ids[1, 0] == 6
    assert bias.values[1].tolist() == [3.0] + [0.0] * (bias.values.shape[1] - 1)
    assert bool((bias.ids >= 0).all() & (bias.ids < VOCABULARY).all())


def test_edits_follow_their_order_and_observers_change_nothing() -> None:
    class Adds:
        statistic = ""

        def apply(self, z: torch.Tensor, *_: object) -> torch.Tensor:
            return z + 1

    class Doubles(Adds):
        def apply(self, z: torch.Tensor, *_: object) -> torch.Tensor:
            return 2 * z

    class Sees(Adds):
        statistic = "kl"

        def apply(self, z: torch.Tensor, *_: object) -> torch.Tensor:
            return z.sum(dim=-1).double()

    edits = {"a": Adds(), "b": Doubles(), "c": Sees()}
    step = StepEdits(cells_of([0]), edits)  # type: ignore[arg-type]
    order = (("c", 0), ("a", 0), ("b", 0), ("c", 0))
    segment = SegmentShape(1, 1, False, False, False, edits=order)
    z, found = step.apply(torch.tensor([[1.0, 2.0]]), slice(0, 1), segment)
    assert z.tolist() == [[4.0, 6.0]]
    assert {name: value.tolist() for name, value in found.items()} == {"kl": [10.0]}


def test_no_work_without_edits() -> None:
    table, plan = table_and_plan({})
    packing = lay_out(plan, table.host, lambda _: frozenset(), table.trash_row)
    assert not packing.shape.edited
    tensors = TorchStep(table, {}, SPEC).begin(packed(packing.ints), packing.shape).tensors
    assert tensors.cells is None
