"""Constraints in kernels against their slow twin, on random grammars and partly filled rows."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dllmserve.catalog import RULES
from dllmserve.constraints.compiled import Compiled
from dllmserve.constraints.sets import Moves, RegionSets
from dllmserve.core.plan import Part, Span, StepEntry, StepPlan
from dllmserve.core.request import Region
from dllmserve.core.rows import RowInit, RowSelect
from dllmserve.decoding.rule import RuleView, Update
from dllmserve.parallel.vocab import VocabShard
from dllmserve.runtime.constraints import ConstraintEdit
from dllmserve.runtime.edits import EditSizes
from dllmserve.runtime.kernels.constraints import TritonConstraints
from dllmserve.runtime.shape import EXACT, LADDER, Padding, lay_out
from dllmserve.runtime.state_table import StateTable
from dllmserve.runtime.step import TorchStep
from dllmserve.sampling_params import FLOATS
from tests.grammars import random_grammar
from tests.helpers import PLAIN

IDS, ROWS, LONGEST = 90, 6, 40
SPEC = replace(PLAIN, vocab_size=IDS, embedding_size=IDS, mask_id=0)
SIZES = EditSizes(rows=ROWS + 1, slots=0, max_len=LONGEST, ids=IDS, spec=SPEC)


def row_of(row: int, dice: random.Random) -> RowInit:
    """A prompt of 3, an answer of up to 30; unconstrained, constrained, or two holes that are."""
    length = dice.randint(9, 30)
    holes: tuple[tuple[int, int], ...] = ((3, 3 + length),)
    if row % 3 == 2:
        holes = ((3, 8), (10, 3 + length))
    regions = []
    for start, end in holes if row % 3 else ():
        grammar = random_grammar(row, IDS, dice.choice([7, 40]), 9, end=bool(row % 2))
        stop = end - dice.choice([0, 2]) if end == holes[-1][1] else end
        if RegionSets(Moves(grammar), stop - start).feasible:
            regions.append(Region(start, stop, Compiled(grammar)))
    return RowInit(
        row=row,
        ids=[5, 6, 7, *[8] * 9],
        holes=holes,
        floats=(0.8 * (row % 2), 1.0, *[0.0] * (len(FLOATS) - 2)),
        ints=(3, length, 0, 7 + row, 0, 0, 0, RULES.index("steps"), 0, 0, 0, 0),
        ends=(),
        confidence="probability",
        sampled=bool(row % 2),
        filtered=False,
        select=RowSelect(),
        edits={"constraint": ()} if regions else {},
        regions=tuple(regions),
    )


def fill(table: StateTable, init: RowInit, dice: random.Random, share: float) -> None:
    """Fill some slots of a row, with what its regions allow."""
    for region in init.regions:
        sets = RegionSets(Moves(region.grammar), region.end - region.start)
        for slot in range(len(sets)):
            if dice.random() < share:
                found = sets.allowed(slot).nonzero()[0].tolist()
                held = dice.choice(found)
                sets.fill(slot, held)
                table.tokens[init.row, region.start + slot] = int(region.grammar.first[held])
                table.masked[init.row, region.start + slot] = False


def twins(seed: int, device: torch.device, share: float) -> Any:
    """The same rows twice: their tables, and both twins; and a plan."""
    dice = random.Random(seed)
    inits = [row_of(row, dice) for row in range(ROWS)]
    slow = StateTable(ROWS, LONGEST, torch.device("cpu"))
    for init in inits:
        slow.write_row(init)
        fill(slow, init, dice, share)
    fast = StateTable(ROWS, LONGEST, device)
    fast.host = slow.host
    for name in ("tokens", "masked", "open", "ints", "floats"):
        getattr(fast, name).copy_(getattr(slow, name))
    edits = (
        ConstraintEdit(SIZES, VocabShard(IDS), torch.device("cpu")),
        TritonConstraints(SIZES, VocabShard(IDS), device),
    )
    for edit in edits:
        for init in inits:
            edit.admit(init)
    entries = []
    for init in sorted(inits, key=lambda init: bool(init.edits)):
        first = dice.randint(3, 6)
        length = dice.randint(4, init.holes[-1][1] - first)
        masks = int(slow.masked[init.row, first : first + length].sum())
        head = Part.BLOCK if init.row == 5 else Part.MASKED
        span = Span(init.row, 0, first + length, 0, 0, 0, first, length, head)
        entries.append(StepEntry(span, None, masks, "steps", quota=dice.choice([1, 3])))
    return (slow, fast), edits, StepPlan(tuple(entries))


def random_logits(rows: int, seed: int) -> Tensor:
    """Logits with ties: [rows, IDS] float32."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-6, 6, (rows, IDS), generator=draw).float() / 2


Found = tuple[Tensor, Tensor, Tensor, Tensor]


def step(table: StateTable, edit: Any, plan: StepPlan, pad: Padding, seed: int) -> Found:
    """One step of a twin: logits struck off, what is written where, and what rows then hold."""
    packing = lay_out(plan, table.host, lambda _: frozenset(), table.trash_row, pad)
    shape, draw = packing.shape, torch.Generator().manual_seed(seed)
    confidence = torch.rand(shape.entries, shape.width, generator=draw, dtype=torch.float64)
    confidence = (confidence * 8).round() / 8  # with ties
    chosen = torch.rand(shape.entries, shape.width, generator=draw) < 0.5
    packed = torch.tensor(packing.ints, dtype=torch.int32).to(table.device)
    work = TorchStep(table, {}, SPEC).begin(packed, shape)
    cells, inputs = work.decision.cells(), work.decision._inputs
    edit.begin(packed, shape, table)
    logits, start = random_logits(shape.rows, seed).to(table.device), 0
    for segment in shape.segments:
        rows = slice(start, start + segment.rows)
        start += segment.rows
        if segment.constrained:
            edit.apply(logits[rows], cells, rows, 0)
            params = work.tensors.row_params[rows]
            edit.note(logits[rows], params, cells, rows, segment, SPEC.mask_id)
    tokens = work.decision._to_cells(logits.argmax(dim=-1), 0)
    write, device = chosen.to(table.device) & inputs.eligible, table.device
    floats = torch.zeros(shape.entries, 1, device=device)
    view = RuleView(inputs.eligible, tokens, confidence.to(device), None, inputs.quota, floats)
    update = edit.settle(Update(tokens, write), view)
    at = inputs.rows[:, None].expand_as(update.write)[update.write]
    table.tokens[at, inputs.block[update.write]] = update.tokens[update.write]
    table.masked[at, inputs.block[update.write]] = False
    holds = edit.holds(shape, table)
    held = [
        holds[index, : table.host[entry.span.row].length].cpu()
        for index, entry in zip(packing.indices, plan.entries, strict=False)
        if table.host[entry.span.row].regions
    ]
    real, where = cells.real.cpu(), update.write.cpu()
    return logits.cpu()[real], where, update.tokens.cpu()[where], torch.cat(held)


@pytest.mark.parametrize(
    ("seed", "share", "pad"),
    [(1, 0.0, LADDER), (2, 0.3, EXACT), (3, 0.6, LADDER), (4, 0.85, EXACT)],
    ids=["empty", "some", "most", "nearly full"],
)
def test_both_twins_say_the_same(
    seed: int, share: float, pad: Padding, device: torch.device
) -> None:
    tables, edits, plan = twins(seed, device, share)
    slow, fast = (step(t, e, plan, pad, seed) for t, e in zip(tables, edits, strict=True))
    for one, other in zip(slow, fast, strict=True):
        assert torch.equal(one, other)
    for init in tables[0].host.values():  # what is written can still be filled to the end
        for region in init.regions:
            sets = RegionSets(Moves(region.grammar), region.end - region.start)
            masked = tables[0].masked[init.row, region.start : region.end].tolist()
            ids = tables[0].tokens[init.row, region.start : region.end].tolist()
            for slot, (open_, token) in enumerate(zip(masked, ids, strict=True)):
                if not open_:
                    sets.fill(slot, int(region.grammar.class_of[token]))
            assert sets.feasible


def test_pools_that_are_full_are_laid_out_anew(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dllmserve.runtime.kernels import constraints

    for name in ("_SMALL", "_WIDE", "_SETS"):
        monkeypatch.setattr(constraints, name, 256)
    grown: list[bool] = []
    edit = TritonConstraints(SIZES, VocabShard(IDS), device)
    edit.on_growth = lambda: grown.append(True)
    dice = random.Random(5)
    inits = [row_of(row, dice) for row in (1, 2, 4, 5)]
    for _ in range(3):
        for init in inits:
            edit.admit(init)
    assert grown
    count = len(grown)
    for _ in range(20):
        edit.admit(inits[0])
    assert len(grown) == count  # what ended makes room
    edit.admit(replace(inits[0], regions=(), edits={}))
    assert not edit._fields[inits[0].row].any()


def test_the_compiler_takes_them() -> None:
    """The interpreter, under which the others run without a GPU, is not as strict."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.kernels.compiled"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
