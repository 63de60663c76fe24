"""The state table, the packed inputs and the chunked head."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllmserve.catalog import RULES
from dllmserve.core.plan import Part, Span, StepEntry, StepPlan, Store
from dllmserve.core.rows import IntField, RowInit, RowSelect
from dllmserve.decoding.rule import RuleView, Update
from dllmserve.decoding.stats import RowParams, TokenStats
from dllmserve.parallel.vocab import VocabShard
from dllmserve.runtime.edits import BiasEdit, EditSizes
from dllmserve.runtime.inputs import StepInputs, build_inputs, compact
from dllmserve.runtime.logits import LogitsHead, StepEdits, TorchReducer
from dllmserve.runtime.shape import (
    EXACT,
    LADDER,
    SPAN_FIELDS,
    Padding,
    SegmentShape,
    StepShape,
    empty_ints,
    lay_out,
)
from dllmserve.runtime.state_table import StateTable
from dllmserve.runtime.step import TorchStep
from dllmserve.runtime.tensors import HeadCells
from dllmserve.sampling_params import FLOATS
from tests.helpers import PLAIN

CPU = torch.device("cpu")
MASK = 99


def init(row: int, prompt: list[int], gen: int, ends: tuple[int, ...] = ()) -> RowInit:
    return RowInit(
        row=row,
        ids=prompt,
        holes=((len(prompt), len(prompt) + gen),),
        floats=tuple(0.4 if name == "cfg_scale" else 0.5 for name in FLOATS),
        ints=(len(prompt), gen, 3, 2**63 - 1, 1, 0, 0, RULES.index("steps"), 0, 0, 0, 0),
        ends=ends,
        confidence="probability",
        sampled=False,
        filtered=False,
        select=RowSelect(),
    )


def test_rows_are_filled_and_reused() -> None:
    table = StateTable(2, 16, CPU)
    table.write_row(init(1, [5, MASK, 7], 6, (9,)))
    assert table.read_masked(1) == [True] * 6
    table.tokens[1, 3:9] = torch.arange(6)
    table.masked[1, 3:5] = False
    table.forwards[1] = 2
    assert table.read_answer(1, 4) == [0, 1, 2, 3]
    assert table.read_masked(1) == [False] * 2 + [True] * 4
    assert int(table.ints[1, IntField.SEED]) == 2**63 - 1
    assert float(table.floats[1, FLOATS.index("cfg_scale")]) == 0.4
    table.write_row(init(1, [8], 2))
    assert table.read_masked(1) == [True, True]
    assert int(table.masked[1].sum()) == 2
    assert int(table.forwards[1]) == 0
    assert not bool(table.masked[0].any())


@given(st.lists(st.booleans(), max_size=40))
def test_compact_is_nonzero(flags: list[bool]) -> None:
    given_flags = torch.tensor(flags, dtype=torch.bool)
    got = compact(given_flags, sum(flags))
    assert got.tolist() == given_flags.nonzero().flatten().tolist()


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 9))
def test_compact_pads_with_the_first_cell(flags: list[bool], more: int) -> None:
    found = [i for i, flag in enumerate(flags) if flag]
    got = compact(torch.tensor(flags, dtype=torch.bool), len(found) + more)
    assert got.tolist() == found + [0] * more


def two_widths(shift: int) -> tuple[StateTable, StepPlan]:
    """A plan with two block widths and one guided entry, and the table it runs on."""
    table = StateTable(4, 12, CPU)
    for row, prompt in ((0, [11, 12, MASK]), (1, [21, 22]), (2, [MASK, MASK])):
        table.write_row(init(row, prompt, 6))
    table.tokens[:, 2:5] = 50
    table.masked[0, 4] = False  # a committed token
    table.masked[1:3, 3] = False
    first = Span(0, 0, 9, 0, 0, 0, 3, 4)
    start = 2 - shift
    guided = Span(1, start, 3 + shift, 2, 0, 0, shift, 3)
    plan = StepPlan(
        (
            StepEntry(first, None, 3, "steps"),
            StepEntry(guided, guided._replace(row=2), 2, "steps"),
        )
    )
    return table, plan


def inputs_of(
    table: StateTable, plan: StepPlan, shift: int, pad: Padding = EXACT
) -> tuple[StepInputs, StepShape, tuple[int, ...]]:
    packing = lay_out(plan, table.host, lambda _: frozenset(), table.trash_row, pad)
    ints = torch.tensor(packing.ints, dtype=torch.int32)
    inputs = build_inputs(ints, packing.shape, table, MASK, shift)
    return inputs, packing.shape, packing.indices


@pytest.mark.parametrize("shift", [0, 1])
def test_inputs(shift: int) -> None:
    """Ids, positions and head rows."""
    table, plan = two_widths(shift)
    inputs, _, places = inputs_of(table, plan, shift)
    assert places == (0, 1, 2)
    window = list(range(2 - shift, 5))
    assert inputs.positions.tolist() == [*range(9), *window, *window]
    side = [MASK, 50, MASK]  # canvas 2, 3 and 4 of rows 1 and 2
    head = [[22], [MASK]] if shift else [[], []]
    expected = [11, 12, 50, MASK, 50] + [MASK] * 4 + head[0] + side + head[1] + side
    assert inputs.ids.tolist() == expected
    assert inputs.rows.tolist() == [0, 1]
    assert inputs.uncond_rows.tolist() == [2]
    assert inputs.block.tolist() == [[3, 4, 5, 6], [2, 3, 4, 12]]
    assert inputs.eligible.tolist() == [[True, False, True, True], [True, False, True, False]]
    assert inputs.head_cells.tolist() == [0, 2, 3, 4, 6]
    second, third = 9, 9 + 3 + shift
    assert inputs.head_rows.tolist() == [3 - shift, 5 - shift, 6 - shift, second, second + 2]
    assert inputs.head_uncond.tolist() == [third, third + 2]


class Counts:
    """A rule that counts its forwards, and writes nothing."""

    def apply(self, view: RuleView) -> Update:
        assert view.memory is not None
        return Update(
            view.tokens, view.eligible & False, memory=replace(view.memory, row=view.memory.row + 1)
        )


@pytest.mark.parametrize(("fills", "counted"), [(True, 8.0), (False, 7.0)])
def test_a_forward_that_only_stores_is_none_of_a_rules(fills: bool, counted: float) -> None:
    table = StateTable(2, 8, CPU)
    table.write_row(init(0, [1, 2], 4))
    table.memory_row[0] = 7.0
    span = Span(0, 0, 2, 0, Store.POSITIONS, head=Part.NONE)
    if fills:
        span = Span(0, 0, 6, 0, blk_off=2, blk_len=4)
    plan = StepPlan((StepEntry(span, None, 4 * fills, "wino"),))
    packing = lay_out(plan, table.host, lambda _: frozenset({"memory"}), table.trash_row)
    work = TorchStep(table, {"wino": Counts()}, PLAIN).begin(
        torch.tensor(packing.ints, dtype=torch.int32), packing.shape
    )
    rows = packing.shape.rows
    tokens, prob = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), 0.5).double()
    work.finish(TokenStats(tokens, prob, None, None))
    assert float(table.memory_row[0]) == counted
    assert int(table.forwards[0]) == fills


@pytest.mark.parametrize("shift", [0, 1])
def test_padding_adds_nothing_that_counts(shift: int) -> None:
    """In a larger shape the same tokens, cells and rows come first in their segments."""

    def more(size: int) -> int:
        return LADDER.other(size) + 4

    table, plan = two_widths(shift)
    plain, _, _ = inputs_of(table, plan, shift)
    wide, shape, places = inputs_of(table, plan, shift, Padding(tokens=more, rows=more, other=more))
    count = plan.tokens
    assert shape.tokens > count
    assert torch.equal(wide.ids[:count], plain.ids)
    assert torch.equal(wide.positions[:count], plain.positions)
    assert bool((wide.positions[count:] == 0).all())
    for index, place in enumerate(places[:2]):
        assert int(wide.rows[place]) == int(plain.rows[index])
        assert torch.equal(wide.block[place, :4], plain.block[index])
        assert torch.equal(wide.eligible[place, :4], plain.eligible[index])
    others = [i for i in range(shape.entries) if i not in places]
    assert bool((wide.rows[others] == table.trash_row).all())
    assert not bool(wide.eligible[others].any())
    first, second = shape.segments
    assert wide.head_rows[:3].tolist() == plain.head_rows[:3].tolist()
    assert wide.head_rows[first.rows : first.rows + 2].tolist() == plain.head_rows[3:].tolist()
    assert wide.head_uncond[:2].tolist() == plain.head_uncond.tolist()
    assert len(wide.head_rows) == first.rows + second.rows


def test_the_host_knows_where_head_rows_lie() -> None:
    """Per entry: first row and number of rows, then those of its segment's padding."""

    def more(size: int) -> int:
        return size + 2

    table, plan = two_widths(0)
    pad = Padding(tokens=more, rows=more, other=more)
    packing = lay_out(plan, table.host, lambda _: frozenset(), table.trash_row, pad)
    shape = packing.shape
    heads = list(packing.ints[shape.spans * SPAN_FIELDS :])
    none = [3, 0, 0, 0, 0, 0]
    assert heads == [0, 3, 3, 2, -1, 0, *none, *none, 5, 2, 7, 2, -1, 0, *[7, 0, 0, 0, 0, 0] * 2]
    empty = empty_ints(shape, table.trash_row)
    assert len(empty) == len(packing.ints)
    assert list(empty[:SPAN_FIELDS]) == [table.trash_row] + [0] * (SPAN_FIELDS - 1)
    none = [0, 0, 0, 0, 0, 0]
    assert list(empty[shape.spans * SPAN_FIELDS :]) == [
        *(0, 0, 0, 5, 0, 0, *none, *none),
        *(5, 0, 5, 4, 0, 0, *[5, 0, 0, 0, 0, 0] * 2),
    ]


def test_sizes_of_the_ladder() -> None:
    """They waste little, and there are few of them."""
    for size in range(1, 5000):
        tokens, rows, other = LADDER.tokens(size), LADDER.rows(size), LADDER.other(size)
        for padded, again in ((tokens, LADDER.tokens), (rows, LADDER.rows), (other, LADDER.other)):
            assert size <= padded
            assert again(padded) == padded
        assert tokens < max(2 * size, 2) or size == 1
        assert size <= 512 or tokens <= size * 1.07
    assert len({LADDER.rows(n) for n in range(1, 2049)}) <= 24
    assert len({LADDER.tokens(n) for n in range(1, 2049)}) <= 64


@pytest.mark.parametrize("max_rows", [2, 3, 5, 100])
def test_the_head_never_holds_more_rows_than_it_may(
    max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(13, 6, generator=generator)
    hidden = torch.randn(14, 6, generator=generator)
    seen: list[int] = []
    linear = torch.nn.functional.linear

    def counted(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return linear(x, w)

    monkeypatch.setattr("dllmserve.runtime.logits.F.linear", counted)
    scale = torch.full((10,), 0.5, dtype=torch.float64)
    params = RowParams(
        temperature=torch.zeros(10, dtype=torch.float64),
        top_p=torch.ones(10, dtype=torch.float64),
        top_k=torch.zeros(10, dtype=torch.int64),
        tempered=torch.zeros(10, dtype=torch.bool),
        keys=torch.zeros(10, dtype=torch.int64),
    )
    segments = (SegmentShape(1, 6, False, False, False), SegmentShape(1, 4, True, False, False))
    stats = LogitsHead(weight, max_rows, 12).stats(hidden, scale, params, segments, frozenset())
    plain = linear(hidden[:10], weight)
    twin = linear(hidden[10:], weight)
    plain[6:] = twin + 1.5 * (plain[6:] - twin)
    plain[:, 12] = -torch.inf
    assert stats.token.tolist() == plain.argmax(dim=-1).tolist()
    assert max(seen) <= max_rows
    halves = [n for n in seen if n <= max_rows // 2]
    assert len(halves) >= 2  # a guided row counts twice


@pytest.mark.parametrize("max_rows", [2, 4, 9, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_in_chunks(max_rows: int, dtype: torch.dtype) -> None:
    """The same rows get the same whatever the chunks; a widened row counts twice."""
    generator = torch.Generator().manual_seed(0)
    # small integers: products and sums are exact in either dtype
    weight = torch.randint(-3, 4, (13, 6), generator=generator).to(dtype)
    hidden = torch.randint(-3, 4, (13, 6), generator=generator).to(dtype)
    values = torch.zeros(3, 4)
    values[1], values[2, 0] = torch.tensor([-100.0, 2.25, 0.5, 0.0]), 0.125
    ids = torch.tensor([[0, 1, 2, 3], [4, 0, 9, 5], [7, 0, 1, 2]])
    rows = torch.tensor([0, 1, 1, 0, 2, 1, 2, 0, 1, 2])
    sizes = EditSizes(rows=3, slots=0, max_len=9, ids=13, spec=replace(PLAIN, vocab_size=13))
    bias = BiasEdit(sizes, VocabShard(13), CPU)
    bias.ids[:, :4], bias.values[:, :4] = ids, values
    cells = HeadCells(rows, rows * 0, rows < 0, rows * 0, rows >= 0)
    segments = (
        SegmentShape(1, 7, False, False, False, edits=(("bias", 4),)),
        SegmentShape(1, 3, True, False, False, edits=(("bias", 3),)),
    )
    seen: list[torch.Tensor] = []

    class Seeing(TorchReducer):
        def reduce(self, z: torch.Tensor, *rest: Any) -> TokenStats:
            seen.append(z)
            return super().reduce(z, *rest)

    params = RowParams(
        temperature=torch.zeros(10, dtype=torch.float64),
        top_p=torch.ones(10, dtype=torch.float64),
        top_k=torch.zeros(10, dtype=torch.int64),
        tempered=torch.zeros(10, dtype=torch.bool),
        keys=torch.zeros(10, dtype=torch.int64),
    )
    scale = torch.full((10,), 1.0, dtype=torch.float64)
    head = LogitsHead(weight, max_rows, 12, Seeing(VocabShard(13)))
    head.stats(hidden, scale, params, segments, frozenset(), StepEdits(cells, {"bias": bias}))
    z = (hidden[:10] @ weight.t()).float()
    twin = (hidden[10:] @ weight.t()).float()
    z[7:] = twin + 2 * (z[7:] - twin)
    for row, owner in enumerate(rows.tolist()):
        z[row].index_add_(0, ids[owner], values[owner])
    assert torch.equal(torch.cat(seen), z)
    limit = max_rows if dtype == torch.float32 else max(max_rows // 2, 1)
    assert max(len(chunk) for chunk in seen) <= limit
