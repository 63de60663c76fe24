"""The step kernels against the torch operations of runtime.inputs and runtime.decide: same bits."""

import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dllmserve.catalog import RULES
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import Part, Span, StepEntry, StepPlan
from dllmserve.core.rows import RowInit, RowSelect
from dllmserve.decoding.rule import RuleView, UnmaskRule, Update, write_best
from dllmserve.decoding.stats import TokenStats
from dllmserve.models.loader import find_model, read_config, read_spec
from dllmserve.runtime.inputs import build_inputs
from dllmserve.runtime.kernels.pick import pick_best
from dllmserve.runtime.kernels.step import TritonStep
from dllmserve.runtime.shape import EXACT, LADDER, Padding, StepShape, empty_ints, lay_out
from dllmserve.runtime.state_table import StateTable
from dllmserve.runtime.step import TorchStep
from dllmserve.runtime.tensors import StepTensors
from dllmserve.sampling_params import CONFIDENCE

ROOT = Path(__file__).parents[2]
MASK, VOCABULARY = 7, 24
NEEDS = {"margin": {"margin"}, "neg_entropy": {"entropy"}}
#: rules whose steps the kernels take; the others keep something between forwards
PLAIN = tuple(n for n, rule in RULES.items() if not rule.memory and rule.needs <= {"entropy"})
#: More padding than an engine ever has: whole entries, tokens and rows of it.
MUCH = Padding(tokens=lambda n: n + 300, rows=lambda n: n + 150, other=lambda n: n + 3)


class Seen:
    """A rule that keeps what it was shown."""

    def __init__(self, rule: UnmaskRule, views: list[RuleView]) -> None:
        self._rule, self._views = rule, views

    def apply(self, view: RuleView) -> Update:
        self._views.append(view)
        return self._rule.apply(view)


def spec_with(shift: int, eos: Sequence[int]) -> ModelSpec:
    spec = read_spec(read_config(find_model("tiny")))
    return replace(spec, logit_shift=shift, mask_id=MASK, eos_ids=tuple(eos))


def init_of(
    dice: random.Random, row: int, rule: str, longest: int, eos: Sequence[int] = (3, 5)
) -> RowInit:
    """A row with a setting of every parameter."""
    confidence = dice.choice(CONFIDENCE)
    prompt = [dice.randrange(VOCABULARY) for _ in range(dice.randrange(1, 12))]
    gen = dice.randrange(1, longest + 1)
    floats = (
        dice.choice([0.0, 0.7]),
        dice.choice([1.0, 0.9]),
        dice.choice([0.0, 0.5, 1.0]),
        dice.choice([0.0, 1.0, 3.0]),
        dice.choice([0.0, 0.5, 9.0]),
        dice.choice([0.0, 1.5]),
        *(dice.choice([0.0, 0.4, 1.0]), dice.random(), 2.0, 0.9),
        *(dice.choice([0.0, 0.5, torch.inf]), dice.choice([1.0, 3.0])),
        *(48.0, 0.4, 0.8, 1.0, 0.005),
    )
    goes_on = dice.random() < 0.3
    ints = (
        *(len(prompt), gen, dice.choice([0, 5]), dice.getrandbits(63)),
        *(CONFIDENCE.index(confidence), dice.randrange(2), dice.randrange(2)),
        *(RULES.index(rule), 0 if goes_on else dice.choice([0, 0, 1, 2]), 0, 0),
        dice.choice([0, 0, dice.randrange(gen + 1)]),
    )
    return RowInit(
        row=row,
        ids=prompt,
        holes=holes_of(dice, len(prompt), len(prompt) + gen),
        floats=floats,
        ints=ints,
        ends=() if goes_on else tuple(eos),
        confidence=confidence,
        sampled=dice.random() < 0.3,
        filtered=dice.random() < 0.3,
        select=RowSelect(),
    )


def holes_of(dice: random.Random, start: int, end: int) -> tuple[tuple[int, int], ...]:
    """The answer, in some cases with a given token in its middle."""
    if end - start < 3 or dice.random() < 0.6:
        return ((start, end),)
    given = dice.randrange(start + 1, end - 1)
    return (start, given), (given + 1, end)


@dataclass(frozen=True)
class Case:
    """One state of an engine, twice, with all that a step needs."""

    spec: ModelSpec
    tables: tuple[StateTable, StateTable]
    spans: list[tuple[Span, Span | None, str]]

    def plan(self) -> StepPlan:
        """The plan that the scheduler would make of what the table holds."""
        return StepPlan(
            tuple(
                StepEntry(
                    one,
                    twin,
                    self._masks(one),
                    rule,
                    quota=1 + one.row % 4,
                    fills=self._count(self.tables[0].open, one),
                )
                for one, twin, rule in self.spans
            )
        )

    def _masks(self, span: Span) -> int:
        return self._count(self.tables[0].masked, span)

    @staticmethod
    def _count(flags: Tensor, span: Span) -> int:
        return int(flags[span.row, span.blk_start : span.blk_end].sum())

    def shape(self, pad: Padding) -> tuple[StepShape, Tensor]:
        """The plan's shape and its packing on the device."""
        table = self.tables[0]

        def needs(entry: StepEntry) -> frozenset[str]:
            wanted = NEEDS.get(table.host[entry.span.row].confidence, set())
            replaces = {"replace"} if entry.span.head == Part.OPEN else set()
            return RULES[entry.rule].needs | frozenset(wanted) | replaces

        packing = lay_out(self.plan(), table.host, needs, table.trash_row, pad)
        return packing.shape, on_device(list(packing.ints), table.device)


def on_device(ints: Sequence[int], device: torch.device) -> Tensor:
    """A packing at the start of a buffer with rubbish behind it."""
    return torch.tensor([*ints, *[-(10**6)] * 99], dtype=torch.int32).to(device)


def make_case(
    seed: int,
    device: torch.device,
    *,
    entries: int = 5,
    longest: int = 40,
    rules: Sequence[str] = PLAIN,
    eos: Sequence[int] = (3, 5),
) -> Case:
    dice = random.Random(seed)
    shift = seed % 2
    first = StateTable(2 * entries + 1, longest + 20, device, VOCABULARY)
    numbers = torch.Generator().manual_seed(seed)
    first.tokens.copy_(torch.randint(VOCABULARY, first.tokens.shape, generator=numbers))
    first.tokens[-1] = 0
    rows = list(range(2 * entries + 1))
    dice.shuffle(rows)
    guided = sorted(dice.random() < 0.4 for _ in range(entries))
    spans = []
    for twin in guided:
        rule = dice.choice(rules)
        init = init_of(dice, rows.pop(), rule, longest, eos)
        first.write_row(init)
        start = len(init.ids) + dice.randrange(init.length)
        stop = dice.randrange(start, len(init.ids) + init.length) + 1
        low = dice.choice([0, start - shift])
        high = dice.choice([stop, len(init.ids) + init.length])
        span = Span(init.row, low, high - low, 0, 0, 0, start - low, stop - start)
        if dice.random() < 0.2:  # it only stores
            span = span._replace(blk_off=0, blk_len=0, head=Part.NONE)
        elif RULES[rule].edits and dice.random() < 0.7:
            span = span._replace(head=Part.OPEN)
        other = None
        committed = torch.rand(stop - start, generator=numbers) < dice.choice([0.0, 0.5, 0.9])
        committed[dice.randrange(stop - start)] = False
        first.masked[init.row, len(init.ids) : start] = False
        first.masked[init.row, start:stop] &= ~committed.to(device)
        first.forwards[init.row] = dice.choice([0, 1, 5, 10**4])
        if twin:
            other = span._replace(row=rows.pop())
            first.write_row(replace(init, row=other.row, ids=[MASK] * len(init.ids)))
            first.masked[other.row] = first.masked[init.row]
        spans.append((span, other, rule))
    second = StateTable(2 * entries + 1, longest + 20, device, VOCABULARY)
    for name in ("tokens", "masked", "open", "floats", "ints", "ends", "forwards"):
        getattr(second, name).copy_(getattr(first, name))
    return Case(spec_with(shift, eos), (first, second), spans)


def make_stats(case: Case, shape: StepShape, packed: Tensor, seed: int, nan: bool) -> TokenStats:
    """Statistics with many ties; padding rows have none."""
    table, spec = case.tables[0], case.spec
    inputs = build_inputs(packed, shape, table, spec.mask_id, spec.logit_shift)
    cells = inputs.head_cells.cpu()
    numbers = torch.Generator().manual_seed(seed)
    count = shape.entries * shape.width

    def values(scale: float) -> Tensor:
        steps = torch.randint(0, 9, (count,), generator=numbers).double() * scale
        if nan:
            steps[torch.rand(count, generator=numbers) < 0.1] = torch.nan
        return steps[cells].to(table.device)

    token = torch.randint(VOCABULARY, (count,), generator=numbers)[cells].to(table.device)
    prob, margin, entropy = values(1 / 8), values(1 / 8), values(0.1)
    prob[~inputs.head_real] = torch.nan  # what padding gives reaches nothing
    return TokenStats(
        token=token,
        prob=prob,
        margin=margin if "margin" in shape.needs else None,
        entropy=entropy if "entropy" in shape.needs else None,
    )


def same(got: Tensor | None, expected: Tensor | None, name: str) -> None:
    """The same dtype, shape and bits, but for which NaN it is."""
    assert (got is None) == (expected is None), name
    if got is None or expected is None:
        return
    assert got.dtype == expected.dtype, name
    assert got.shape == expected.shape, name
    if got.is_floating_point():
        assert torch.equal(got.isnan(), expected.isnan()), name
        got, expected = got.nan_to_num(nan=-9.0), expected.nan_to_num(nan=-9.0)
        assert torch.equal(got.signbit(), expected.signbit()), name
    assert torch.equal(got, expected), name


def same_tensors(got: StepTensors, expected: StepTensors) -> None:
    for field in fields(StepTensors):
        if field.name not in ("row_params", "cells", "owners"):
            same(getattr(got, field.name), getattr(expected, field.name), field.name)
    for field in fields(got.row_params):
        mine, theirs = getattr(got.row_params, field.name), getattr(expected.row_params, field.name)
        same(mine, theirs, field.name)


def same_tables(got: StateTable, expected: StateTable) -> None:
    """All but the trash, which padding may write."""
    for name in ("tokens", "masked", "steps"):
        same(getattr(got, name)[:-1, :-1], getattr(expected, name)[:-1, :-1], name)
    for name in ("floats", "ints", "ends"):
        same(getattr(got, name), getattr(expected, name), name)
    same(got.forwards[:-1], expected.forwards[:-1], "forwards")


def check(case: Case, pad: Padding, *, steps: int = 2, nan: bool = False) -> None:
    """Both twins do the same, step after step."""
    views: tuple[list[RuleView], list[RuleView]] = ([], [])
    ops = [
        kind(
            table,
            {n: Seen(RULES[n].load()(), seen) for n in RULES},
            case.spec,
        )
        for kind, table, seen in zip((TritonStep, TorchStep), case.tables, views, strict=True)
    ]
    for step in range(steps):
        shape, packed = case.shape(pad)
        stats = make_stats(case, shape, packed, step, nan)
        mine, theirs = (one.begin(packed, shape) for one in ops)
        same_tensors(mine.tensors, theirs.tensors)
        got, expected = mine.finish(stats), theirs.finish(stats)
        same_views(*(seen[-1] for seen in views))
        same(got.confidence, expected.confidence, "confidence")
        same(got.tokens, expected.tokens, "tokens")
        same_tables(*case.tables)
        same(got.report, expected.report, "report")
        assert nan or not expected.report[:, 3].any()


def same_views(got: RuleView, expected: RuleView) -> None:
    for name in ("eligible", "confidence", "entropy", "quota", "floats"):
        same(getattr(got, name), getattr(expected, name), name)
    assert (got.edits is None) == (expected.edits is None)
    if got.edits is not None and expected.edits is not None:
        may = expected.edits.prob != -torch.inf
        same(got.edits.prob, expected.edits.prob, "probability of edits")
        same(got.edits.current, expected.edits.current.masked_fill(~may, 0), "current")


#: Random cases: few of those that take the interpreter long.
CASES = [
    *((seed, EXACT) for seed in range(5)),
    *((seed, LADDER) for seed in range(20, 23)),
    *((seed, MUCH) for seed in range(40, 42)),
]


@pytest.mark.parametrize(("seed", "pad"), CASES)
def test_random_steps(seed: int, pad: Padding, device: torch.device) -> None:
    """Every parameter, segments of every kind, all rules at once."""
    check(make_case(seed, device), pad)


@pytest.mark.parametrize("rule", PLAIN)
@pytest.mark.parametrize("pad", [EXACT, LADDER], ids=["exact", "ladder"])
def test_one_rule(rule: str, pad: Padding, device: torch.device) -> None:
    """Until nothing is left of the blocks, or nearly."""
    check(make_case(100, device, rules=[rule]), pad, steps=3)


@pytest.mark.parametrize("seed", [0, 1])
def test_numbers_that_are_none(seed: int, device: torch.device) -> None:
    check(make_case(seed, device), EXACT, nan=True)
    check(make_case(seed + 10, device), LADDER, nan=True)


@pytest.mark.parametrize("eos", [(), (0,), tuple(range(VOCABULARY))])
def test_ends(eos: tuple[int, ...], device: torch.device) -> None:
    check(make_case(4, device, eos=eos), EXACT)


@pytest.mark.parametrize("pad", [EXACT, LADDER], ids=["exact", "ladder"])
def test_one_request(pad: Padding, device: torch.device) -> None:
    for seed in range(3):
        check(make_case(seed + 20, device, entries=1), pad)


@pytest.mark.parametrize("seed", [0, 1])
def test_blocks_and_answers_wider_than_a_tile(seed: int, device: torch.device) -> None:
    check(make_case(seed, device, entries=2, longest=2600), EXACT, steps=1)
    check(make_case(seed + 30, device, entries=3, longest=700), LADDER, steps=1, nan=True)


_MORE_PARAMETERS = """
import dataclasses, torch
from dllmserve import sampling_params
sampling_params.FLOATS = (*sampling_params.FLOATS, *"ABCDEFG")
from tests.kernels import test_step_kernels as steps
made = steps.init_of
def init_of(*given):
    init = made(*given)
    return dataclasses.replace(init, floats=(*init.floats, *range(1, 8)))
steps.init_of = init_of
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
case = steps.make_case(1, device, entries=2)
assert case.tables[0].floats.shape[1] == len(sampling_params.FLOATS) == 24
steps.check(case, steps.EXACT, steps=1)
"""


def test_more_parameters_than_now() -> None:
    """The kernels follow FLOATS, whatever its length."""
    subprocess.run([sys.executable, "-c", _MORE_PARAMETERS], cwd=ROOT, check=True)


def test_many_spans(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are added up at once."""
    monkeypatch.setattr("dllmserve.runtime.kernels.begin._SPANS", 4)
    check(make_case(5, device, entries=9, longest=3), EXACT, steps=1)


def test_a_packing_of_padding_alone_changes_nothing(device: torch.device) -> None:
    """What a shape is rehearsed with; its rows must still point at tokens."""
    case = make_case(6, device)
    shape, _ = case.shape(LADDER)
    got, expected = case.tables
    packed = on_device(empty_ints(shape, got.trash_row), device)
    rules = {name: RULES[name].load()() for name in RULES}
    work = TritonStep(got, rules, case.spec).begin(packed, shape)
    same_tensors(work.tensors, TorchStep(expected, rules, case.spec).begin(packed, shape).tensors)
    assert not work.tensors.head_rows.any()
    work.finish(make_stats(case, shape, packed, 0, False))
    same_tables(got, expected)
    same(got.tokens, expected.tokens, "tokens")


def test_rows_of_masks_that_are_gone_point_at_tokens(device: torch.device) -> None:
    """A step may be run twice, to measure it: then the host counts more masks than there are."""
    case = make_case(7, device, rules=["steps"])
    shape, packed = case.shape(LADDER)
    table = case.tables[0]
    rules = {name: RULES[name].load()() for name in RULES}
    ops = TritonStep(table, rules, case.spec)
    for _ in range(2):
        stats = make_stats(case, shape, packed, 1, False)
        work = ops.begin(packed, shape)
        rows = torch.cat((work.tensors.head_rows, work.tensors.head_uncond))
        assert bool(((rows >= 0) & (rows < shape.tokens)).all())
        work.finish(stats)


@pytest.mark.parametrize("width", [1, 5, 32, 33, 129, 300])
def test_best_positions(width: int, device: torch.device) -> None:
    """Ties, both zeros, infinities and NaN, in the order of a stable sort."""
    dice = torch.Generator().manual_seed(width)
    pool = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e-310, 0.3])
    for dtype in (torch.float64, torch.float32):
        key = pool.to(dtype)[torch.randint(len(pool), (6, width), generator=dice)]
        eligible = torch.rand(6, width, generator=dice) < 0.8
        count = torch.randint(0, width + 1, (6,), generator=dice)
        zeros = torch.zeros(6, width, dtype=torch.int64)
        none = torch.zeros(6, dtype=torch.float64)
        view = RuleView(eligible, zeros, key, None, count, none)
        expected = write_best(view, key, count).write
        got = pick_best(*(x.to(device) for x in (key, count, eligible)))
        assert torch.equal(got.cpu(), expected)
