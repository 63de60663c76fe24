"""In float32 on a CPU an element, or a row, comes out the same bits wherever it stands.

Products are the library's, whose order of summation is not ours: tests/ordered.py stands in for it.
ATEN_CPU_CAPABILITY chooses the vector instructions; "make numerics" runs this under all that the
processor has.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dllmserve.core.model_spec import ExpertSpec
from dllmserve.decoding.stats import log_sum
from dllmserve.layers.ops import HeadNorms, LayerOps, rms_norm, silu
from dllmserve.parallel.vocab import VocabShard
from dllmserve.runtime.edits import CreditEdit, EditSizes, KlObserver, LogitEdit
from dllmserve.runtime.tensors import HeadCells
from tests import ordered
from tests.helpers import PLAIN
from tools.capabilities import LADDER, below

CPU = torch.device("cpu")
WIDE, NARROW = torch.float64, torch.float32

#: what the step path computes element by element, besides what IEEE 754 defines
ELEMENTWISE: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype]] = {
    "silu": (silu, NARROW),
    "exp": (torch.exp, NARROW),
    "exp of float64": (torch.exp, WIDE),
    "log of float64": (lambda x: x.abs().log(), WIDE),
    "log1p": (lambda x: x.abs().log1p(), NARROW),
    "log1p of float64": (lambda x: x.abs().log1p(), WIDE),
    "sqrt": (lambda x: x.abs().sqrt(), NARROW),
}
#: what it computes row by row
ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": lambda x: rms_norm(x, torch.linspace(0.5, 2.0, x.shape[1]), 1e-5),
    "softmax": lambda x: x.softmax(dim=-1),
    "softmax of float64": lambda x: x.softmax(dim=-1, dtype=WIDE),
    "sum": lambda x: x.sum(dim=-1, keepdim=True),
    "sum of float64": lambda x: x.double().sum(dim=-1, keepdim=True),
    "cumsum of float64": lambda x: x.double().cumsum(dim=-1),
    "log_sum": lambda x: log_sum(x, VocabShard(x.shape[1])),
    "ordered product": lambda x: ordered.linear(x, numbers(9, x.shape[1])),
}


def numbers(*shape: int, dtype: torch.dtype = NARROW) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (4 * torch.randn(*shape, generator=generator, dtype=WIDE)).to(dtype)


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" not in os.environ, reason="the processor's best")
def test_the_capability_that_was_asked_for() -> None:
    asked = os.environ["ATEN_CPU_CAPABILITY"]
    assert torch.backends.cpu.get_cpu_capability().lower() == asked


def test_the_capabilities_to_test_with() -> None:
    """Whatever this very process was told, those below the processor's own."""
    assert [below(own) for own in LADDER] == [(), ("default",), ("default", "avx2")]
    assert below("no such") == ("default",)
    found = subprocess.run(
        [sys.executable, "tools/capabilities.py"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert tuple(found.stdout.split()) == below(found.stderr.split()[-1])


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_element(name: str) -> None:
    function, dtype = ELEMENTWISE[name]
    x = numbers(40 * 66, dtype=dtype)
    whole = function(x)
    for start in (*range(33), 1000, 2007):
        for length in (*range(1, 35), 131):
            part = x[start : start + length]
            assert torch.equal(function(part), whole[start : start + length]), (start, length)
            assert torch.equal(function(part.clone()), whole[start : start + length])
    table = x.view(40, 66)
    assert torch.equal(function(table[:, :33]), whole.view(40, 66)[:, :33])  # a gate of gate_up
    assert torch.equal(function(x[::3]), whole[::3])
    assert torch.equal(function(table.t()), whole.view(40, 66).t())


@pytest.mark.parametrize("width", [16, 37, 300, 1000])
@pytest.mark.parametrize("name", ROWS)
def test_a_row(name: str, width: int) -> None:
    function, x = ROWS[name], numbers(41, width)
    whole = function(x)
    for low, high in ((0, 1), (1, 2), (0, 40), (3, 20), (40, 41), (5, 41), (0, 16)):
        assert torch.equal(function(x[low:high]), whole[low:high]), (low, high)
        assert torch.equal(function(x[low:high].clone()), whole[low:high]), (low, high)


def test_a_head() -> None:
    """Normalised and rotated, whatever rows and heads are beside it."""
    ops, heads, positions = LayerOps(16, 100.0, 64, CPU), numbers(9, 9, 16), torch.arange(9) * 7
    norms = HeadNorms(numbers(16), numbers(2, 16)[1], 4, 1e-5)
    whole = ops.rotate(heads, 6, ops.at(positions), norms)
    for rows in (slice(0, 1), slice(3, 8), slice(8, 9)):
        got = ops.rotate(heads[rows], 6, ops.at(positions[rows]), norms)
        assert torch.equal(got, whole[rows])
    for queries, keys in (([2, 3], [5]), ([0], [4, 5])):  # of a rank
        mine = [*queries, *keys, 8]
        some = norms._replace(queries=len(queries))
        got = ops.rotate(heads[:, mine], len(mine) - 1, ops.at(positions), some)
        assert torch.equal(got, whole[:, mine[:-1]])


def test_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's experts, whichever tokens are beside it and whichever rank has an expert."""
    ordered.use_ordered_products(monkeypatch)
    ops = LayerOps(2, 1.0, 0, CPU)
    spec = ExpertSpec(layers=(True,), count=6, per_token=2, size=5, groups=3, top_groups=2)
    x, gate, bias = numbers(9, 16), numbers(6, 16), numbers(6)
    gate_up, down = numbers(7, 10, 16), numbers(7, 16, 5)

    def mixed(x: Tensor, held: range) -> tuple[Tensor, Tensor]:
        routed = ops.route(x, gate, bias, spec, held)
        mine = slice(held.start, held.stop)
        inner = ops.expert_up(x, routed, gate_up[mine])
        rows = ops.expert_down(inner, routed, down[mine])
        return rows.view(len(x), -1, 16), ops.combine(rows, routed)

    every = ops.route(x, gate, bias, spec, range(7))
    rows, whole = mixed(x, range(7))  # the last is the shared expert
    for start, stop in ((0, 1), (3, 8), (8, 9)):
        assert torch.equal(mixed(x[start:stop], range(7))[1], whole[start:stop])
    total = torch.zeros(9, 16)
    for held in (range(2), range(2, 6)):
        here = (every.ids[:, :2] >= held.start) & (every.ids[:, :2] < held.stop)
        got, part = mixed(x, held)
        assert torch.equal(got[here], rows[:, :2][here])
        total += part
    torch.testing.assert_close(total + rows[:, 2], whole)
    assert every.ids[:, 2].tolist() == [6] * 9 and every.weights[:, 2].tolist() == [1.0] * 9


def test_equal_scores() -> None:
    """The expert with the smaller number, and the earlier group, come first."""
    ops, spec = LayerOps(2, 1.0, 0, CPU), ExpertSpec(layers=(), count=6, per_token=3, size=1)
    x = torch.ones(1, 4)
    assert ops.route(x, torch.zeros(6, 4), None, spec, range(6)).ids.tolist() == [[0, 1, 2]]
    grouped = replace(spec, groups=3, top_groups=2)
    assert ops.route(x, torch.zeros(6, 4), None, grouped, range(6)).ids.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("x", [[-200.0, -89.0, 0.0, 89.0, 3e38], [-3e38, -0.0, 1e-30, 20.0, 200.0]])
def test_silu_is_silu(x: list[float]) -> None:
    """Also where exp(-x) is infinite or vanishes."""
    exact = torch.tensor(x, dtype=WIDE)
    got = silu(torch.tensor(x))
    torch.testing.assert_close(got.double(), F.silu(exact), rtol=3e-7, atol=1e-35)
    assert torch.equal(silu(torch.tensor(x).bfloat16()), F.silu(torch.tensor(x).bfloat16()))


@pytest.mark.parametrize("kind", ["kl", "credit"])
def test_what_rules_keep(kind: str) -> None:
    """Logits in chunks, forward after forward, leave what they leave in one piece."""

    def forwards(step: int) -> list[Tensor]:
        vocab, rows = VocabShard(40), 200
        edit: LogitEdit
        spec = replace(PLAIN, vocab_size=40, mask_id=39)
        if kind == "kl":
            edit = KlObserver(EditSizes(rows, rows, 1, 40, spec), vocab, CPU)
            edit.slots[:, 0] = torch.arange(rows)
        else:
            edit = CreditEdit(EditSizes(rows, 1, 1, 40, spec), vocab, CPU)
        row = torch.arange(rows)
        seen = []
        for forward in range(3):
            cells = HeadCells(
                row=row,
                column=row * 0,
                step=torch.full((rows,), forward),
                forward=row * 0 + forward,
                real=row >= 0,
            )
            z = numbers(rows + forward, 40)[:rows]
            parts = [
                edit.apply(z[low : low + step], cells, slice(low, low + step), 0)
                for low in range(0, rows, step)
            ]
            seen.append(torch.cat(parts))
        return seen

    whole = forwards(200)
    for step in (1, 7, 16, 129):
        for got, expected in zip(forwards(step), whole, strict=True):
            assert torch.equal(got, expected), step
