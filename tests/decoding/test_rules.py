"""Rules against their scalar twins, on drawn confidences."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllmserve.catalog import RULES
from dllmserve.decoding.rule import Memory, RuleView, UnmaskRule, rank_of
from dllmserve.sampling_params import FLOATS
from tests.oracles import rules

#: few values, so that ties are common, beside any value at all
CONFIDENCE = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]), st.floats(0.0, 1.0))
ENTROPY = st.one_of(st.sampled_from([0.0, 0.1, 0.5]), st.floats(0.0, 6.0))
Row = list[tuple[bool, float, float]]  # masked, confidence, entropy; of others: doubts
ROWS = st.lists(
    st.lists(st.tuples(st.booleans(), CONFIDENCE, ENTROPY), min_size=1, max_size=9),
    min_size=1,
    max_size=4,
)
PARAMETERS = st.fixed_dictionaries(
    {
        "quota": st.integers(1, 9),
        "threshold": CONFIDENCE,
        "factor": st.floats(0.0, 4.0),
        "entropy_bound": ENTROPY,
        "low_threshold": CONFIDENCE,
        "kl_threshold": ENTROPY,
        "kl_history": st.integers(1, 3),
        "threshold_back": CONFIDENCE,
        "last_accept": st.integers(1, 6),
        "min_tokens_per_step": st.integers(1, 9),
    }
)
Parameters = dict[str, float]
Twin = Callable[[list[float], list[float], list[bool], Parameters], list[int]]

TWINS: dict[str, Twin] = {
    "steps": lambda c, h, m, p: rules.steps(c, m, int(p["quota"])),
    "sequential": lambda c, h, m, p: rules.sequential(m, int(p["quota"])),
    "dynamic": lambda c, h, m, p: rules.dynamic(c, m, p["threshold"], most(p)),
    "threshold": lambda c, h, m, p: rules.threshold(c, m, p["threshold"]),
    "factor": lambda c, h, m, p: rules.factor(c, m, p["factor"]),
    "entropy_bound": lambda c, h, m, p: rules.entropy_bound(h, m, p["entropy_bound"]),
    "threshold_strict": lambda c, h, m, p: rules.threshold_strict(c, m, p["threshold"], least(p)),
    "threshold_dinfer": lambda c, h, m, p: rules.credit_threshold(c, m, p["threshold"]),
    "joint": lambda c, h, m, p: rules.threshold_strict(c, m, p["threshold"], least(p)),
    "factor_strict": lambda c, h, m, p: rules.factor_strict(c, m, p["factor"]),
    "hierarchy": lambda c, h, m, p: rules.hierarchy(c, m, p["threshold"], p["low_threshold"]),
    "credit": lambda c, h, m, p: rules.credit_threshold(c, m, p["threshold"]),
    "klass": lambda c, h, m, p: rules.klass(c, m, calm(h, p), p["threshold"], int(p["kl_history"])),
    "wino": lambda c, h, m, p: doubt(c, m, p)[0],
}


def least(parameters: Parameters) -> int:
    """Tokens that a step writes at least."""
    return int(parameters["min_tokens_per_step"])


def most(parameters: Parameters) -> int:
    """The same with a schedule."""
    return max(least(parameters), int(parameters["quota"]))


def calm(kl: list[float], parameters: Parameters) -> list[int]:
    """Forwards in a row with a small divergence, when the forwards before had been 1 each."""
    return [2 if h < parameters["kl_threshold"] else 0 for h in kl]


def doubt(
    confidence: list[float], masked: list[bool], p: Parameters
) -> tuple[list[int], list[int], int]:
    """WINO, where a written position's back-confidence stands in its place among confidences."""
    written = [not m for m in masked]
    last, tau, back = int(p["last_accept"]), p["threshold"], p["threshold_back"]
    return rules.wino(confidence, masked, confidence, written, last, tau, back)


def view(rows: list[Row], parameters: list[Parameters]) -> RuleView:
    """Rows of different lengths as padded tensors; what is not eligible is -inf and +inf."""
    width = max(len(row) for row in rows)
    shape = (len(rows), width)
    eligible = torch.zeros(shape, dtype=torch.bool)
    confidence = torch.full(shape, -torch.inf, dtype=torch.float64)
    entropy = torch.full(shape, torch.inf, dtype=torch.float64)
    back = entropy.clone()
    for i, row in enumerate(rows):
        for j, (masked, c, h) in enumerate(row):
            if masked:
                eligible[i, j], confidence[i, j], entropy[i, j] = True, c, h
            else:
                back[i, j] = c

    floats = torch.zeros(len(rows), len(FLOATS), dtype=torch.float64)
    for i, chosen in enumerate(parameters):
        for column, name in enumerate(FLOATS):
            floats[i, column] = chosen.get(name, 0.0)
    tokens = torch.arange(len(rows) * width).view(shape)
    return RuleView(
        eligible=eligible,
        tokens=tokens,
        confidence=confidence,
        entropy=entropy,
        quota=torch.tensor([int(p["quota"]) for p in parameters]),
        floats=floats,
        kl=entropy,
        back=back,
        memory=Memory(
            torch.tensor([float(p.get("last_accept", 30)) for p in parameters]).double(),
            torch.ones(shape, dtype=torch.float64),
        ),
    )


def rule(name: str) -> UnmaskRule:
    made: UnmaskRule = RULES[name].load()()
    return made


def test_every_rule_has_a_twin() -> None:
    assert {*TWINS, "renoise"} == set(RULES)
    for name in RULES:
        assert RULES[name].needs <= {"entropy", "kl", "back", "credit", "noise", "tempering"}
        assert (RULES[name].memory is not None) == bool(RULES[name].needs & {"kl", "back", "noise"})


@pytest.mark.parametrize("name", TWINS)
@given(rows=ROWS, data=st.data())
def test_rule_equals_its_twin(name: str, rows: list[Row], data: st.DataObject) -> None:
    parameters = [data.draw(PARAMETERS) for _ in rows]
    given_view = view(rows, parameters)
    update = rule(name).apply(given_view)
    assert torch.equal(update.tokens, given_view.tokens)
    assert not bool((update.write & ~given_view.eligible).any())
    for i, row in enumerate(rows):
        masked = [m for m, _, _ in row]
        twin = TWINS[name]([c for _, c, _ in row], [h for _, _, h in row], masked, parameters[i])
        assert update.write[i].nonzero().flatten().tolist() == twin
        assert bool(update.write[i].any()) == any(masked)


@given(rows=ROWS, data=st.data())
def test_wino_doubts_as_its_twin(rows: list[Row], data: st.DataObject) -> None:
    parameters = [data.draw(PARAMETERS) for _ in rows]
    update = rule("wino").apply(view(rows, parameters))
    assert update.remask is not None and update.memory is not None
    for i, row in enumerate(rows):
        masked = [m for m, _, _ in row]
        if any(masked):
            _, remasked, accepted = doubt([c for _, c, _ in row], masked, parameters[i])
            assert update.remask[i].nonzero().flatten().tolist() == remasked
            assert update.memory.row[i] == accepted


def test_klass_counts_calm_forwards() -> None:
    row: Row = [(True, 0.95, 0.005), (True, 0.99, 0.5), (False, 0.9, 0.0)]
    chosen: Parameters = {"quota": 1, "threshold": 0.9, "kl_threshold": 0.01, "kl_history": 3}
    update = rule("klass").apply(view([row], [chosen]))
    assert update.memory is not None
    assert update.memory.cells[0].tolist() == [2.0, 0.0, 0.0]
    assert update.write[0].tolist() == [False, True, False]  # none is calm enough: the best


@pytest.mark.parametrize("name", TWINS)
def test_rows_do_not_see_each_other(name: str) -> None:
    rows = [[(True, c, 1 - c) for c in row] for row in ([0.9, 0.2], [0.1, 0.8, 0.8], [0.5])]
    parameters: list[Parameters] = [
        {
            "quota": 1 + i,
            "threshold": 0.3 * i,
            "factor": 1.0 + i,
            "entropy_bound": 0.2 * i,
            "low_threshold": 0.1 * i,
            "kl_threshold": 0.5,
            "kl_history": 1 + i,
        }
        for i in range(3)
    ]
    together = rule(name).apply(view(rows, parameters)).write
    for i, row in enumerate(rows):
        alone = rule(name).apply(view([row], parameters[i : i + 1])).write
        assert together[i, : len(row)].tolist() == alone[0].tolist()


@pytest.mark.parametrize(
    ("confidence", "count"),
    [
        ([0.99, 0.98, 0.9, 0.5], 4),  # a failure at the last rank writes that one too
        ([0.99, 0.9, 0.2], 3),
        ([0.3, 0.2], 2),  # rank 2 of 2 fails, and is written
        ([0.3], 1),
        ([0.4, 0.9, 0.1, 0.2], 1),
        ([0.99] * 6, 6),
    ],
)
def test_factor_keeps_upstreams_quirks(confidence: list[float], count: int) -> None:
    parameters: Parameters = {"quota": 1, "threshold": 0.0, "factor": 1.0, "entropy_bound": 0.0}
    write = rule("factor").apply(view([[(True, c, 0.0) for c in confidence]], [parameters])).write
    assert int(write.sum()) == count


@pytest.mark.parametrize(
    ("bound", "count"), [(0.0, 1), (0.005, 1), (0.01, 2), (0.07, 3), (0.15, 3), (0.27, 4)]
)
def test_the_entropy_bound_counts_the_entropies_before(bound: float, count: int) -> None:
    row: Row = [(True, 0.0, h) for h in (0.01, 0.05, 0.2, 1.0)]
    parameters: Parameters = {"quota": 1, "threshold": 0, "factor": 0, "entropy_bound": bound}
    write = rule("entropy_bound").apply(view([row], [parameters])).write
    assert int(write.sum()) == count


def test_the_entropy_rule_says_when_the_statistic_is_missing() -> None:
    from dataclasses import replace

    row: Row = [(True, 0.5, 0.5)]
    parameters: Parameters = {"quota": 1, "threshold": 0, "factor": 0, "entropy_bound": 0}
    with pytest.raises(ValueError, match="entropy"):
        rule("entropy_bound").apply(replace(view([row], [parameters]), entropy=None))


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=12))
def test_ties_go_to_the_lower_position(keys: list[float]) -> None:
    order = sorted(range(len(keys)), key=lambda i: (-keys[i], i))
    expected = [order.index(i) for i in range(len(keys))]
    assert rank_of(torch.tensor([keys]))[0].tolist() == expected
