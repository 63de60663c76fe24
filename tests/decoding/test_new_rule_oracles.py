"""The newer rules' slow twins against cases worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from tests.checkpoints import Shape, config, random_tensors
from tests.oracles import rules
from tests.oracles import wino as shadows
from tests.oracles.block_rules import BlockRule, Settings, divergence, proposal
from tests.oracles.models import OracleModel
from tests.oracles.spans import Block, Store

FAMILIES = ("llada", "dream")
MASK = 3  # of the four tokens in the logits below


def all_masked(confidence: list[float]) -> list[bool]:
    return [True] * len(confidence)


@pytest.mark.parametrize(
    ("confidence", "tau", "strict", "loose"),
    [
        ([0.9, 0.95, 0.3], 0.9, [1], [0, 1]),  # exactly at the threshold
        ([0.9, 0.9, 0.3], 0.9, [0], [0, 1]),  # none above: the best one, the lower of two
        ([0.2, 0.3, 0.1], 0.9, [1], [1]),
        ([1.0, 1.0], 1.0, [0], [0, 1]),
        ([0.91, 0.95, 0.99], 0.9, [0, 1, 2], [0, 1, 2]),
    ],
)
def test_threshold_strict(
    confidence: list[float], tau: float, strict: list[int], loose: list[int]
) -> None:
    masked = all_masked(confidence)
    assert rules.threshold_strict(confidence, masked, tau) == strict
    assert rules.threshold(confidence, masked, tau) == loose


def test_threshold_strict_sees_masked_slots_only() -> None:
    assert rules.threshold_strict([0.99, 0.2, 0.95], [False, True, True], 0.9) == [2]
    assert rules.threshold_strict([0.99, 0.2, 0.1], [False, True, True], 0.9) == [1]
    assert rules.threshold_strict([0.99], [False], 0.9) == []


@pytest.mark.parametrize(
    ("confidence", "f", "chosen"),
    [
        ([0.99, 0.98, 0.9, 0.5], 1.0, [0, 1, 2]),  # bounds .667, .75, .8
        ([0.99, 0.9, 0.2], 1.0, [0, 1]),
        ([0.3, 0.2], 1.0, [0]),
        ([0.3], 1.0, [0]),
        ([0.5, 0.98, 0.9, 0.99], 1.0, [1, 2, 3]),  # ranks, not places
        ([0.9, 0.5, 0.9, 0.9], 1.0, [0, 2, 3]),
        ([0.99, 0.98], 0.0, [0]),  # the bound is 1
        ([0.01, 0.01, 0.01], 4.0, [0, 1, 2]),  # bounds -.33, 0, .2 of ranks 2, 3, 4
        ([0.1, 0.1, 0.1, 0.1], 4.0, [0, 1, 2]),  # .2 is the first to fail
        ([0.5, 0.5, 0.9], 1.5, [0, 2]),  # .5 equals rank 2's bound; rank 3's is .625
    ],
)
def test_factor_strict(confidence: list[float], f: float, chosen: list[int]) -> None:
    assert rules.factor_strict(confidence, all_masked(confidence), f) == chosen


@pytest.mark.parametrize(
    ("confidence", "masked", "chosen"),
    [
        # one run: its best
        ([0.5, 0.6, 0.7], "mmm", [2]),
        # a written slot parts two runs
        ([0.5, 0.6, 0.9, 0.45, 0.42], "mm.mm", [1, 3]),
        # a run whose best is not above low gives none
        ([0.5, 0.6, 0.9, 0.4, 0.3], "mm.mm", [1]),
        # ... but the best of all is always there
        ([0.1, 0.2, 0.9, 0.3, 0.3], "mm.mm", [3]),
        # above the threshold from any place of a run
        ([0.95, 0.96, 0.97, 0.9, 0.5], "mmmmm", [0, 1, 2]),
        # written slots at the edges, runs of one, a tie inside a run
        ([0.9, 0.5, 0.9, 0.7, 0.7], ".m.mm", [1, 3]),
        ([0.9, 0.9], "..", []),
    ],
)
def test_hierarchy(confidence: list[float], masked: str, chosen: list[int]) -> None:
    assert rules.hierarchy(confidence, [c == "m" for c in masked], 0.9, 0.4) == chosen


def test_runs() -> None:
    flags = [c == "m" for c in "mm..m.mmm"]
    assert rules.runs(flags) == [[0, 1], [4], [6, 7, 8]]
    assert rules.runs([False, False]) == []


@pytest.mark.parametrize(
    ("confidence", "chosen"),
    [
        ([0.9, 0.95, 0.3], [0, 1]),  # at the threshold is enough
        ([0.5, 0.499995, 0.4999], [0, 1]),  # within 1e-5 of the best
        ([0.3, 0.5, 0.5], [1, 2]),  # both of two equals
        ([0.9000001, 0.899999, 0.89], [0, 1]),  # the best minus 1e-5 is the lower bound here
    ],
)
def test_credit_threshold(confidence: list[float], chosen: list[int]) -> None:
    assert rules.credit_threshold(confidence, all_masked(confidence), 0.9) == chosen


@pytest.mark.parametrize(
    ("confidence", "calm", "chosen"),
    [
        ([0.95, 0.95, 0.95], [2, 1, 3], [0, 2]),
        ([0.9, 0.95, 0.5], [2, 1, 3], [1]),  # stable slots are not sure: the best of all
        ([0.95, 0.99, 0.5], [0, 0, 0], [1]),
        ([0.95, 0.99, 0.5], [2, 0, 0], [0]),  # a stable one is enough, though not the best
    ],
)
def test_klass(confidence: list[float], calm: list[int], chosen: list[int]) -> None:
    assert rules.klass(confidence, all_masked(confidence), calm, 0.9, 2) == chosen


@pytest.mark.parametrize(("masks", "cap"), [(3, 3), (5, 5), (6, 5), (8, 5), (10, 7), (32, 20)])
def test_wino_accepts_up_to_its_cap(masks: int, cap: int) -> None:
    confidence = [0.95 + 0.001 * i for i in range(masks)]
    blank = [0.0] * masks
    accepted, remasked, last = rules.wino(
        confidence, all_masked(confidence), blank, [False] * masks, 30, 0.9, 0.9
    )
    assert accepted == list(range(masks - cap, masks))  # the best ones
    assert (remasked, last) == ([], cap)


def test_wino_cap_ties_go_to_the_lower_position() -> None:
    flags, blank = [True] * 8, [0.0] * 8
    accepted, _, _ = rules.wino([0.95] * 8, flags, blank, [False] * 8, 30, 0.9, 0.9)
    assert accepted == [0, 1, 2, 3, 4]


def wino(
    confidence: list[float], back: list[float], last_accept: int
) -> tuple[list[int], list[int], int]:
    """Masked slots first, then written ones with these back-confidences."""
    n, w = len(confidence), len(back)
    masked = [True] * n + [False] * w
    written = [not m for m in masked]
    blanks = [0.0] * n
    return rules.wino(confidence + [1.0] * w, masked, blanks + back, written, last_accept, 0.9, 0.9)


def test_wino_masks_doubted_slots_again() -> None:
    assert wino([0.95, 0.99], [0.3, 0.9, 0.89], 30) == ([0, 1], [2, 4], 2)  # .9 is no doubt


def test_wino_doubts_nothing_after_a_single_write() -> None:
    assert wino([0.95, 0.5], [0.3, 0.1], 30) == ([0], [], 1)
    assert wino([0.8, 0.5], [0.3, 0.1], 30) == ([0], [], 1)  # none is sure: the best
    assert wino([0.9, 0.9], [0.3, 0.1], 30) == ([0], [], 1)  # at the threshold is not above it


def test_wino_masks_fewer_again_than_it_accepted_before() -> None:
    back = [0.3, 0.1, 0.2]  # slots 2, 3, 4
    assert wino([0.95, 0.99], back, 4)[1] == [2, 3, 4]
    assert wino([0.95, 0.99], back, 3)[1] == [3, 4]  # the two most doubted
    assert wino([0.95, 0.99], back, 2)[1] == [3]
    assert wino([0.95, 0.99], back, 1)[1] == []
    assert wino([0.95, 0.99], [0.2, 0.2, 0.2], 3)[1] == [2, 3]  # equal: the lower ones


def test_the_mask_id_is_never_proposed_but_counts() -> None:
    token, confidence = proposal(torch.tensor([0.0, 1.0, 1.0, 5.0]), MASK)
    assert token == 1  # the lower of two equal tokens
    total = 1 + 2 * math.e + math.exp(5)
    assert confidence == pytest.approx(math.e / total)


def test_divergence() -> None:
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert divergence(torch.tensor(p).log() + 3, torch.tensor(q).log()) == pytest.approx(expected)
    assert divergence(torch.tensor(p), torch.tensor(p)) == 0.0


def decide(rule: BlockRule, rows: dict[int, Tensor], size: int) -> dict[int, int]:
    masked = [slot in rows for slot in range(size)]
    decision = rule.decide(rows, masked, [0] * size, None)
    assert decision.erased == []
    return decision.writes


def test_credit_gathers_decays_and_moves_a_proposal() -> None:
    rule = BlockRule(Settings("credit", threshold=2.0), 2, MASK, [])
    low = torch.tensor([-9.0, -9.0, -9.0, 9.0])  # a slot that is never the best
    first = torch.tensor([2.0, 1.0, 0.0, -1.0])
    p = [math.exp(z) / sum(math.exp(y) for y in (2, 1, 0, -1)) for z in (2, 1, 0, -1)]
    decide(rule, {0: first, 1: low}, 2)
    expected = [p[0] ** 0.2, 0.0, 0.0, 0.0]
    assert rule.credit[0].tolist() == pytest.approx(expected)
    # token 1 is a little ahead now, so it gains; token 0 keeps 0.8 of its credit
    second = torch.tensor([2.0, 2.1, 0.0, -1.0])
    q = [math.exp(z) / sum(math.exp(y) for y in (2, 2.1, 0, -1)) for z in (2, 2.1, 0, -1)]
    decide(rule, {0: second, 1: low}, 2)
    expected = [0.8 * expected[0], q[1] ** 0.2, 0.0, 0.0]
    assert rule.credit[0].tolist() == pytest.approx(expected, rel=1e-6)
    # with equal logits the token whose credit is fresher is proposed, not the lower one
    assert decide(rule, {0: torch.tensor([2.0, 2.05, 0.0, -1.0]), 1: low}, 2) == {0: 1}


def test_credit_counts_in_the_confidence() -> None:
    rule = BlockRule(Settings("credit", threshold=0.6), 2, MASK, [])
    sure = torch.tensor([8.0, 0.0, 0.0, 0.0])
    # p = e / (e + 3) = .475; with credit c = .475^.2 = .862 its weight is e * 1.862^.7 = 4.20
    # and p = 4.20 / 7.20 = .583
    shy = torch.tensor([1.0, 0.0, 0.0, 0.0])
    rows = {0: sure, 1: shy}
    assert decide(rule, rows, 2) == {0: 0}
    # c = .8 * .862 + .862 = 1.551: e * 2.551^.7 = 5.24, p = .636
    assert decide(rule, rows, 2) == {0: 0, 1: 0}


def test_klass_waits_for_calm_slots() -> None:
    rule = BlockRule(Settings("klass", threshold=0.5, kl_threshold=0.01), 3, MASK, [])
    sure, surer = torch.tensor([3.0, 0.0, 0.0, 0.0]), torch.tensor([4.0, 0.0, 0.0, 0.0])
    unsure = torch.tensor([0.1, 0.0, 0.0, 0.0])
    assert decide(rule, {0: sure, 1: surer, 2: unsure}, 3) == {1: 0}  # nothing to compare with
    assert decide(rule, {0: sure, 2: unsure}, 3) == {0: 0}  # calm once; still the best one
    assert rule.calm[2] == 1


def test_klass_prefers_a_calm_slot_to_the_best() -> None:
    rule = BlockRule(Settings("klass", threshold=0.5, kl_threshold=0.01), 4, MASK, [])
    rows = {i: torch.tensor([3.0 + i, 0.0, 0.0, 0.0]) for i in range(4)}
    assert decide(rule, rows, 4) == {3: 0}
    del rows[3]
    assert decide(rule, rows, 4) == {2: 0}
    del rows[2]
    rows[1] = torch.tensor([0.0, 5.0, 0.0, 0.0])  # another token: the best, but not calm
    assert decide(rule, rows, 4) == {0: 0}
    assert rule.calm == [2, 0, 1, 0]
    assert decide(rule, {1: rows[1]}, 4) == {1: 1}


def test_steps_follow_their_quotas() -> None:
    rule = BlockRule(Settings("steps"), 3, MASK, [2, 1])
    rows = {i: torch.tensor([float(i), 0.0, 0.0, 0.0]) for i in range(3)}
    assert set(decide(rule, rows, 3)) == {1, 2}
    assert set(decide(rule, {0: rows[0]}, 3)) == {0}


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="unmask"):
        Settings("best")


# -- WINO's shadow


def model(family: str, layers: int) -> OracleModel:
    shape = Shape(family=family, layers=layers, seed=11)
    return OracleModel(config(shape), random_tensors(shape))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_shadow_stands_for_its_slot(name: str) -> None:
    """In one layer, a lone shadow sees what the slot's query sees with the slot itself masked."""
    oracle, ids = model(name, layers=1), [5, 9, 33, 2, 17, 8]
    block, rows = Block(3, 4, None), list(range(len(ids)))
    z, _, judged = shadows.forward(oracle, ids, rows, None, block, len(ids))
    plain = oracle(torch.tensor([ids]))[0]
    torch.testing.assert_close(z, plain, atol=1e-4, rtol=0)
    if oracle.shifted:
        order = [0, 1, 2, 4, 5]  # the mask joins the token before the slot, at its position
        seen = torch.tensor([[*(ids[p] for p in order), oracle.mask_id]])
        alone = oracle.forward(seen, torch.tensor([*order, 2])).logits[0, -1]
    else:
        alone = oracle(torch.tensor([[*ids[:3], oracle.mask_id, *ids[4:]]]))[0, 3]
    torch.testing.assert_close(judged[0], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_shadow_over_stored_rows_equals_the_whole(name: str) -> None:
    oracle, ids = model(name, layers=2), [5, 9, 33, 2, 17, 8, 40, 41]
    block, limit = Block(3, 6, None), 7
    store = Store(8, 0)
    rows = list(range(limit))
    whole, kv, judged = shadows.forward(oracle, ids[:limit], rows, None, block, limit)
    store.keep(rows, kv)
    some = [2, 3, 4, 5]
    past = store.past(some, limit, 3)
    z, _, again = shadows.forward(oracle, [ids[p] for p in some], some, past, block, limit)
    torch.testing.assert_close(z, whole[some], atol=1e-4, rtol=0)
    torch.testing.assert_close(again, judged, atol=1e-4, rtol=0)
    with pytest.raises(RuntimeError, match="never computed"):
        store.past(some, 8, 3)


def test_listed_rows_are_replaced() -> None:
    oracle, ids = model("llada", layers=2), torch.tensor([[5, 9, 33, 2, 17, 8]])
    whole = oracle.forward(ids)
    stale = [(k.clone(), v.clone()) for k, v in whole.kv]
    for k, v in stale:
        k[:, :, [1, 4]], v[:, :, [1, 4]] = 7.0, 7.0
    out = oracle.forward(ids[:, [4, 1]], torch.tensor([4, 1]), stale, [4, 1])
    torch.testing.assert_close(out.logits, whole.logits[:, [4, 1]], atol=1e-4, rtol=0)
    hidden = torch.ones(6, 6, dtype=torch.bool)
    hidden[:, 4:] = False
    short = oracle.forward(ids[:, :4])
    seen = oracle.forward(ids, sees=hidden)
    torch.testing.assert_close(seen.logits[:, :4], short.logits, atol=1e-4, rtol=0)
