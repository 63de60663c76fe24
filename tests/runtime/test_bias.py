"""The table of biases, and what a step adds to which LM-head row."""

import pytest
import torch

from dllmserve._values import MAX_LOGIT_BIAS
from dllmserve.catalog import RULES
from dllmserve.core.plan import Span, StepEntry, StepPlan
from dllmserve.core.rows import RowInit, RowSelect
from dllmserve.parallel.vocab import VocabShard
from dllmserve.runtime.bias import BiasTable, StepBias, head_entries
from dllmserve.runtime.inputs import build_inputs
from dllmserve.runtime.shape import EXACT, LADDER, Padding, empty_ints, lay_out
from dllmserve.runtime.state_table import StateTable
from dllmserve.runtime.step import span_fields

CPU = torch.device("cpu")
VOCABULARY = 50
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
                prompt=[1, 2],
                gen_length=6,
                floats=(0.0, 1.0, 0.9, 1.0, 0.1, 0.0, 0.4, 0.01, 2.0, 0.9),
                ints=(2, 6, 0, 7, 0, 0, 0, 1, RULES.index("steps"), 0, 0, 0),
                quotas=(1,),
                pages=[],
                confidence="probability",
                sampled=sampled,
                filtered=filtered,
                select=RowSelect(),
                bias=tuple((i, 1.0) for i in range(biases.get(row, 0))),
            )
        )
    entries = []
    for row, masks in ((6, 2), (0, 4), (3, 1), (5, 3), (1, 2)):
        table.masked[row, 2 + masks : 8] = False
        span = Span(row, 0, 8, 0, 0, 0, 2, 6, 0)
        twin = span._replace(row=2) if row == 1 else None
        entries.append(StepEntry(span, twin, masks, "steps"))
    return table, StepPlan(tuple(entries))


@pytest.mark.parametrize("pad", [EXACT, LADDER, MUCH], ids=["exact", "ladder", "much"])
def test_entries_of_head_rows(pad: Padding) -> None:
    """The same as what the masks themselves say, padding rows included."""
    table, plan = table_and_plan({})
    packing = lay_out(plan, table.host, lambda _: frozenset(), table.trash_row, pad)
    ints, shape = packed(packing.ints), packing.shape
    inputs = build_inputs(span_fields(ints, shape), shape, table, 49, 0)
    assert len(shape.segments) == 3
    assert torch.equal(head_entries(ints, shape), inputs.head_cells // shape.width)
    nothing = packed(empty_ints(shape, table.trash_row))
    rows = span_fields(nothing, shape)[head_entries(nothing, shape), 0]
    assert rows.tolist() == [table.trash_row] * shape.rows


@pytest.mark.parametrize("pad", [EXACT, LADDER], ids=["exact", "ladder"])
def test_a_segment_is_as_wide_as_its_longest_bias(pad: Padding) -> None:
    def widths(biases: dict[int, int]) -> list[int]:
        table, plan = table_and_plan(biases)
        packing = lay_out(plan, table.host, lambda _: frozenset(), table.trash_row, pad)
        return [segment.bias for segment in packing.shape.segments]

    assert widths({}) == [0, 0, 0]
    assert widths({0: 3, 3: 1, 1: 1}) == [pad.other(3), 0, 1]
    assert widths({5: MAX_LOGIT_BIAS}) == [0, MAX_LOGIT_BIAS, 0]
    assert widths({5: MAX_LOGIT_BIAS - 1})[1] <= MAX_LOGIT_BIAS


def test_what_is_added() -> None:
    table, plan = table_and_plan({6: 2, 3: 3})
    bias = BiasTable(table.trash_row + 1, VOCABULARY, VocabShard(VOCABULARY), CPU)
    bias.write_row(6, ((3, -100.0), (40, 2.5)))
    bias.write_row(3, ((0, 1.0), (3, 0.25), (49, 100.0)))
    packing = lay_out(plan, table.host, lambda _: frozenset(), table.trash_row)
    step = bias.begin(packed(packing.ints), packing.shape)
    assert step is not None
    assert step.rows.tolist() == [6] * 2 + [0] * 4 + [3] + [5] * 3 + [1] * 2
    z = torch.randn(12, VOCABULARY, generator=torch.Generator().manual_seed(0))
    expected = z.clone()
    expected[:2, 3] += -100.0
    expected[:2, 40] += 2.5
    expected[6, [0, 3, 49]] += torch.tensor([1.0, 0.25, 100.0])
    for low, high in ((0, 7), (0, 12), (1, 3), (6, 7)):
        for width in (3, 8, MAX_LOGIT_BIAS):
            got = step.add(z[low:high].clone(), slice(low, high), width)
            assert torch.equal(got, expected[low:high])


def test_half_precision_is_widened() -> None:
    """Tokens that a bias of 100 forces keep the order that the model gave them."""
    z = torch.tensor([[1.0, 1.0625, 0.5]], dtype=torch.bfloat16)
    ids = torch.tensor([[0, 1]])
    rows = torch.zeros(1, dtype=torch.int64)
    step = StepBias(ids, torch.full((1, 2), 100.0), rows, VocabShard(VOCABULARY))
    got = step.add(z, slice(0, 1), 2)
    assert got.dtype == torch.float32
    assert got.tolist() == [[101.0, 101.0625, 0.5]]
    assert z.tolist() == [[1.0, 1.0625, 0.5]]


def test_a_row_forgets_its_last_request() -> None:
    bias = BiasTable(3, VOCABULARY, VocabShard(VOCABULARY), CPU)
    bias.write_row(1, ((4, 1.0), (5, 2.0)))
    bias.write_row(1, ((6, 3.0),))
    assert bias.ids[1, 0] == 6
    assert bias.values[1].tolist() == [3.0] + [0.0] * (MAX_LOGIT_BIAS - 1)
    bias.write_row(1, ())
    assert not bias.values.any()
    assert bool((bias.ids >= 0).all() & (bias.ids < VOCABULARY).all())


def test_no_work_without_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    table, plan = table_and_plan({})
    bias = BiasTable(table.trash_row + 1, VOCABULARY, VocabShard(VOCABULARY), CPU)
    packing = lay_out(plan, table.host, lambda _: frozenset(), table.trash_row)
    monkeypatch.setattr("dllmserve.runtime.bias.torch", None)
    monkeypatch.setattr(bias, "values", None)
    bias.write_row(1, ())
    assert bias.begin(torch.empty(0), packing.shape) is None
