"""The slow decoder of rules and refresh policies, held to the older oracles and to itself."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from dllmserve import SamplingParams
from tests.checkpoints import Shape, config, random_tensors
from tests.oracles import dream, fast_dllm, llada, policies, rules, spans
from tests.oracles.block_rules import RULES
from tests.oracles.models import KV, OracleModel, shift
from tests.oracles.policies import Result
from tests.oracles.spans import CACHES, UNWRITTEN, Block, Policy, Slots, Store
from tests.reference import decode

Options = dict[str, Any]

SHAPES = {
    "llada": Shape(family="llada"),
    "dream": Shape(family="dream", seed=5),
    # a quarter of the vocabulary ends an answer
    "llada-eos": Shape(family="llada", eos_ids=tuple(range(10, 25)), seed=8),
    "dream-eos": Shape(family="dream", eos_ids=tuple(range(10, 25)), seed=9),
}
FAMILIES = ("llada", "dream")
PROMPTS = [[5, 9, 33, 2, 17, 8, 41], [21, 3]]
SIZES = [len(prompt) for prompt in PROMPTS]
#: random models are seldom sure: these write several slots a forward
EAGER: Options = {"threshold": 0.4, "factor": 2.0, "entropy_bound": 3.0, "low_threshold": 0.1}
EAGER |= {"kl_threshold": 1.0, "kl_history": 1, "threshold_back": 0.6}


@cache
def model(name: str) -> OracleModel:
    return OracleModel(config(SHAPES[name]), random_tensors(SHAPES[name]))


def run(
    name: str, unmask: str = "threshold", caching: str = "none", **options: Any
) -> list[Result]:
    given: Options = {"gen_length": 21, "block_length": 8, **EAGER}
    if unmask == "steps":
        given["steps"] = 11
    return policies.generate(
        model(name), PROMPTS, unmask=unmask, cache=caching, **{**given, **options}
    )


def tokens(results: list[Result]) -> list[list[int]]:
    return [result.tokens for result in results]


# -- the older oracles


@pytest.mark.parametrize(("steps", "block"), [(6, 4), (12, 4), (12, 12), (24, 12), (5, 12)])
def test_steps_equal_llada(steps: int, block: int) -> None:
    options: Options = {"gen_length": 12, "block_length": block}
    steps = max(steps // (12 // block), 1) * (12 // block)
    results = run("llada", "steps", steps=steps, **options)
    for prompt, result in zip(PROMPTS, results, strict=True):
        out = llada.generate(model("llada"), torch.tensor([prompt]), steps=steps, **options)
        assert result.tokens == out[0].tolist()
        assert result.forwards == min(steps, 12)
        assert result.computed == result.forwards * (len(prompt) + 12)
        assert sum(result.writes) == 12


@pytest.mark.parametrize("steps", [1, 4, 8, 16])
def test_steps_equal_dream(steps: int) -> None:
    eps = -1e-4  # a hair below zero, so that the counts come out even as LLaDA's are
    assert rules.dream_counts(16, steps, eps) == rules.split(16, steps)
    results = run("dream", "steps", steps=steps, gen_length=16, block_length=16)
    for prompt, result in zip(PROMPTS, results, strict=True):
        ids = torch.tensor([prompt])
        out = dream.generate(model("dream"), ids, steps=steps, gen_length=16, eps=eps)
        assert result.tokens == out[0].tolist()
        assert result.forwards == steps


@pytest.mark.parametrize("caching", fast_dllm.CACHES)
@pytest.mark.parametrize(
    ("unmask", "theirs"),
    [
        ("threshold", {"threshold": 0.2}),
        ("threshold", {"threshold": 0.4}),
        ("factor", {"factor": 2.0}),
        ("steps", {}),
    ],
)
def test_two_caches_equal_fast_dllm(caching: str, unmask: str, theirs: Options) -> None:
    options: Options = {"gen_length": 24, "block_length": 8, "steps": 12}
    results = run("llada", unmask, caching, **options, **theirs)
    for prompt, result in zip(PROMPTS, results, strict=True):
        ids = torch.tensor([prompt])
        out = fast_dllm.generate(model("llada"), ids, cache=caching, **options, **theirs)
        assert result.tokens == out[0].tolist()
        assert result.forwards < 24


@pytest.mark.parametrize("caching", fast_dllm.CACHES)
@pytest.mark.parametrize("unmask", ["steps", "threshold", "factor", "entropy_bound"])
def test_spans_equal_the_reference_decoder(caching: str, unmask: str) -> None:
    """For Dream's spans, which start one token early, and the entropy bound."""
    shared: Options = {"gen_length": 21, "block_length": 8, "unmask": unmask, "cache": caching}
    shared |= {"threshold": 0.4, "factor": 2.0, "entropy_bound": 3.0, "steps": 11}
    params = SamplingParams(temperature=0.0, ignore_eos=True, **shared)
    results = policies.generate(model("dream"), PROMPTS, **shared)
    for prompt, result in zip(PROMPTS, results, strict=True):
        expected = decode(model("dream"), prompt, params)
        assert (result.tokens, result.forwards) == (expected.ids, expected.forwards)


# -- what a policy must equal


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("unmask", RULES)
def test_refreshing_always_is_no_cache(name: str, unmask: str) -> None:
    plain = run(name, unmask)
    assert all(len(result.tokens) == 21 for result in plain)
    assert run(name, unmask, "dual", refresh_every=1) == plain
    if unmask in ("threshold", "credit", "klass"):
        assert run(name, unmask, "dual", refresh_delay=99) == plain
        for caching in ("prefix", "delayed"):
            assert run(name, unmask, caching, refresh_every=1) == plain


@pytest.mark.parametrize("name", FAMILIES)
def test_a_wide_window_is_no_cache(name: str) -> None:
    plain = run(name)
    for caching in ("dual", "prefix"):
        assert run(name, "threshold", caching, refresh_window=99) == plain
        assert run(name, "threshold", caching, refresh_window=2) != plain


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("unmask", "every"), [("steps", None), ("threshold", 2), ("klass", None)])
def test_caches_that_fall_together(name: str, unmask: str, every: int | None) -> None:
    dual = run(name, unmask, "dual", refresh_every=every)
    drift = run(name, unmask, "drift", refresh_share=1.0, refresh_every=every)
    assert drift == dual
    one: Options = {"block_length": 21, "refresh_every": every}
    assert run(name, unmask, "rolling", **one) == run(name, unmask, "dual", **one)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_forwards_a_block_leave_delayed_nothing_to_skip(name: str) -> None:
    options: Options = {"gen_length": 24, "steps": 6}
    assert run(name, "steps", "delayed", **options) == run(name, "steps", "dual", **options)
    options["steps"] = 12
    delayed, dual = (run(name, "steps", caching, **options) for caching in ("delayed", "dual"))
    assert all(d.computed < e.computed for d, e in zip(delayed, dual, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("caching", CACHES)
def test_a_wide_suffix_window_is_none(name: str, caching: str) -> None:
    wide, plain = (run(name, "threshold", caching, suffix_window=x) for x in (21, None))
    if caching == "rolling":  # which computes the suffix at each block's entry, given a window
        assert all(w.computed > p.computed for w, p in zip(wide, plain, strict=True))
    else:
        assert wide == plain


# -- what a policy computes


def blocks_of(
    result: Result, prompt: int, gen_length: int, block: int
) -> list[tuple[int, int, list[int]]]:
    """Start, end and writes of each block of a whole answer."""
    found, at = [], 0
    for start in range(0, gen_length, block):
        end = min(start + block, gen_length)
        first = at
        while sum(result.writes[first:at]) < end - start:
            at += 1
        found.append((prompt + start, prompt + end, result.writes[first:at]))
    assert at == result.forwards == len(result.writes)
    return found


Cost = Callable[[int, int, int, int, list[int]], int]  # canvas, start, end, shift, writes


def dual_cost(canvas: int, start: int, end: int, extra: int, writes: list[int]) -> int:
    return canvas + (len(writes) - 1) * (end - start + extra)


def prefix_cost(canvas: int, start: int, end: int, extra: int, writes: list[int]) -> int:
    return canvas + (len(writes) - 1) * (canvas - start + extra)


def delayed_cost(canvas: int, start: int, end: int, extra: int, writes: list[int]) -> int:
    total = canvas
    for t in range(1, len(writes)):
        masks = end - start - sum(writes[:t])
        if extra:
            total += min(end - start + 1, 2 * masks + writes[t - 1])
        else:
            total += masks + writes[t - 1]
    return total


COSTS: dict[str, Cost] = {
    "none": lambda canvas, start, end, extra, writes: canvas * len(writes),
    "prefix": prefix_cost,
    "dual": dual_cost,
    "delayed": delayed_cost,
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("caching", COSTS)
@pytest.mark.parametrize("suffix", [None, 5])
def test_computed(name: str, caching: str, suffix: int | None) -> None:
    extra = int(name == "dream")
    results = run(name, "threshold", caching, suffix_window=suffix)
    for result, size in zip(results, SIZES, strict=True):
        total = 0
        for start, end, writes in blocks_of(result, size, 21, 8):
            canvas = size + 21 if suffix is None else min(size + 21, end + suffix)
            total += COSTS[caching](canvas, start, end, extra, writes)
        assert result.computed == total


def entry(caching: str, total: int, block: tuple[int, int], extra: int, suffix: int | None) -> int:
    """Rows of the first forward of a block that is not the first, by closed form."""
    start, end = block
    own = end - start + extra
    canvas = total if suffix is None else min(total, end + suffix)
    if caching == "rolling":
        return (end if suffix is None else canvas) - (start - 8) + extra
    opened = 0 if suffix is None else canvas - max(end, min(total, start + suffix))
    others = canvas - own
    return own + min(opened + math.ceil(0.3 * others), others)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("caching", ["rolling", "drift"])
@pytest.mark.parametrize("suffix", [None, 5, 10])
def test_computed_at_block_entry(name: str, caching: str, suffix: int | None) -> None:
    extra = int(name == "dream")
    results = run(name, "threshold", caching, suffix_window=suffix, refresh_share=0.3)
    for result, size in zip(results, SIZES, strict=True):
        total = 0
        for start, end, writes in blocks_of(result, size, 21, 8):
            if start == size:
                total += size + 21 if suffix is None else min(size + 21, end + suffix)
            else:
                total += entry(caching, size + 21, (start, end), extra, suffix)
            total += (len(writes) - 1) * (end - start + extra)
        assert result.computed == total


@pytest.mark.parametrize("name", FAMILIES)
def test_refresh_every_and_delay(name: str) -> None:
    extra = int(name == "dream")
    options: Options = {"steps": 8, "gen_length": 8, "refresh_delay": 1, "refresh_every": 3}
    # forwards 0 1 . . 4 . . 7 are whole
    for result, size in zip(run(name, "steps", "dual", **options), SIZES, strict=True):
        assert result.computed == 4 * (size + 8) + 4 * (8 + extra)
    options = {"steps": 8, "gen_length": 16, "block_length": 16, "refresh_window": 1}
    for result, size in zip(run(name, "steps", "dual", **options), SIZES, strict=True):
        assert result.computed == size + 16 + 7 * (16 + extra + 1)  # nothing lies behind the block


# -- choices by hand


def slots_of(masked: str, writers: list[int]) -> Slots:
    return Slots([0] * len(masked), [c == "m" for c in masked], writers)


def test_delayed_rows_of_a_plain_model() -> None:
    masked, none = "..m.m.", UNWRITTEN
    slots = slots_of(masked, [-1, 4, none, 6, none, 5])
    policy = Policy("delayed")
    span = spans.choose(policy, slots, Store(6, 0), Block(1, 6, None), 3, 7, 6)
    assert span.rows == [2, 3, 4]  # 3 was written by forward 6, 5 is stored already


def test_delayed_rows_of_a_shifted_model() -> None:
    none = UNWRITTEN
    policy = Policy("delayed", shift=1)
    block = Block(2, 8, None)
    # masked 3; rows 2 and 3 are needed, 2 * 1 + 1 may be computed: the newest of the others
    slots = slots_of("...m....", [-1, -1, 2, none, 6, 5, 5, 4])
    assert spans.delayed(policy, slots, block, 7) == [2, 3, 4]
    # masks 3 and 4 need 2, 3, 4; of the four (and w = 0) the fourth is 6, newer than the rest
    slots = slots_of("...mm...", [-1, -1, 2, none, none, 4, 5, 5])
    assert spans.delayed(policy, slots, block, 7) == [2, 3, 4, 6]  # the lower of two equals
    # the first slot needs the row before the block, which otherwise comes last
    slots = slots_of("..m.....", [-1, -1, none, 6, 5, 5, 4, 4])
    assert spans.delayed(policy, slots, block, 7) == [1, 2, 3]
    slots = slots_of("..mmmmm.", [-1, -1, none, none, none, none, none, 6])
    assert spans.delayed(policy, slots, block, 7) == [1, 2, 3, 4, 5, 6, 7]  # never more than all


def test_drift_chooses_what_moved_most() -> None:
    store = Store(12, 0)
    store.seen = set(range(10))
    store.drift = dict.fromkeys(range(10), 0.0) | {1: 0.5, 7: 4.0, 9: 0.25, 8: 0.25}
    policy = Policy("drift", share=0.5)
    # 7 others, of which 4
    assert spans.drifted(policy, store, [3, 4, 5], 10) == [1, 3, 4, 5, 7, 8, 9]
    policy = Policy("drift", share=0.3)
    assert spans.drifted(policy, store, [3, 4, 5], 10) == [1, 3, 4, 5, 7, 8]
    # a window that opened two more: both, and ceil(.3 * 9) = 3 of the others
    assert spans.drifted(policy, store, [3, 4, 5], 12) == [1, 3, 4, 5, 7, 8, 10, 11]
    policy = Policy("drift", share=0.0)
    assert spans.drifted(policy, store, [3, 4, 5], 10) == [3, 4, 5]


def test_drift_of_stored_values() -> None:
    def kv(*rows: list[float]) -> list[KV]:
        v = torch.tensor(rows).view(1, 1, len(rows), 2)
        return [(torch.zeros_like(v), v)]

    store = Store(3, 0)
    store.keep([0, 1, 2], kv([1.0, 0.0], [0.0, 2.0], [3.0, 4.0]))
    assert store.drift == {0: 1.0, 1: 1.0, 2: 1.0}
    store.drift[2] = spans.JUST_WRITTEN
    store.keep([0, 1], kv([0.0, 5.0], [0.0, 7.0]))
    assert store.drift == {0: 1.0, 1: 0.0, 2: 4.0}
    store.keep([2], kv([-3.0, -4.0]))
    assert store.drift[2] == pytest.approx(2.0)
    assert store.kv[0][1][0, 0].tolist() == [[0.0, 5.0], [0.0, 7.0], [-3.0, -4.0]]


def test_what_does_not_go_together_is_refused() -> None:
    for caching in ("rolling", "drift"):
        with pytest.raises(ValueError, match="refresh_delay"):
            run("llada", caching=caching, refresh_delay=1)
    with pytest.raises(ValueError, match="wino"):
        run("llada", "wino", "prefix")
    with pytest.raises(ValueError, match="cache"):
        run("llada", caching="best")
    with pytest.raises(ValueError, match="steps"):
        run("llada", "steps", steps=None)


# -- rules over whole answers


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("unmask", RULES)
def test_every_rule_fills_every_answer(name: str, unmask: str) -> None:
    cachings = ["none", "dual"]  # a rule with every cache, every rule with two caches
    if unmask != "wino":
        cachings = list(CACHES) if unmask == "threshold" else ["delayed", "drift"]
    for caching in cachings:
        for result in run(name, unmask, caching, suffix_window=6):
            assert len(result.tokens) == sum(result.writes) == 21
            assert result.forwards == len(result.writes) <= 21
            assert SHAPES[name].mask_id not in result.tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_rules_that_never_dare_write_one_at_a_time(name: str) -> None:
    plain = tokens(run(name, "steps", steps=24))
    assert tokens(run(name, "threshold_strict", threshold=1.0)) == plain
    assert tokens(run(name, "klass", kl_threshold=0.0)) == plain
    assert tokens(run(name, "hierarchy", threshold=1.0, low_threshold=1.0)) == plain
    assert tokens(run(name, "factor_strict", factor=0.0)) == plain
    assert tokens(run(name, "wino", threshold=1.0)) == plain


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("caching", ["none", "dual"])
def test_wino_without_doubts_is_a_threshold(name: str, caching: str) -> None:
    options: Options = {"block_length": 5, "threshold_back": 0.0}  # its cap is 5 at least
    undoubting = run(name, "wino", caching, **options)
    plain = run(name, "threshold_strict", caching, **options)
    assert tokens(undoubting) == tokens(plain)
    for shadowed, bare in zip(undoubting, plain, strict=True):
        assert shadowed.writes == bare.writes
        blocks = blocks_of(bare, 0, 21, 5)
        shadows = sum((end - start) * len(writes) for start, end, writes in blocks)
        assert shadowed.computed == bare.computed + shadows


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("caching", ["none", "dual"])
def test_wino_masks_again_and_still_ends(name: str, caching: str) -> None:
    options: Options = {"threshold": 0.1, "threshold_back": 2.0, "block_length": 21}
    for result in run(name, "wino", caching, **options):
        assert sum(result.writes) == 21
        assert result.forwards <= 21
    wary = run(name, "wino", caching, **options)
    bold = run(name, "wino", caching, **{**options, "threshold_back": 0.0})
    assert sum(r.forwards for r in wary) > sum(r.forwards for r in bold)


def test_a_shifted_span_reads_one_row_earlier() -> None:
    """The first forward proposes what Dream's shifted logits propose."""
    oracle = model("dream")
    (result, *_) = run("dream", "steps", steps=1, gen_length=6, block_length=6)
    ids = torch.tensor([PROMPTS[0] + [oracle.mask_id] * 6])
    z = shift(oracle(ids))[0, -6:]
    z[:, oracle.mask_id] = -torch.inf
    assert result.tokens == z.argmax(dim=-1).tolist()


# -- early end


def begun(early: bool = True) -> policies.Request:
    request = policies.begin(model("llada"), [1, 2], Policy("none"), 9, 3)
    request.eos_ids = (7, 8) if early else ()
    return request


def test_masks_behind_an_end_id_are_filled() -> None:
    request = begun()
    block = request.blocks[1]
    for position, token in ((2, 20), (3, 21), (4, 22), (6, 7)):
        request.write(position, token)
    request.fill()
    assert request.slots.tokens[5] == SHAPES["llada"].mask_id
    assert request.slots.tokens[6:] == [7] * 5
    assert request.slots.masked == [False] * 5 + [True] + [False] * 5
    assert request.ended() is None
    assert request.limit(block) == 8
    request.write(5, 8)  # an earlier end id
    assert request.ended() == 5
    assert begun().limit(block) == 11


def test_without_early_end_an_end_id_is_a_token() -> None:
    request = begun(early=False)
    request.write(2, 7)
    request.fill()
    assert request.slots.masked[3:] == [True] * 8
    assert request.ended() is None


def test_a_window_and_an_end_both_cut_the_canvas() -> None:
    request = policies.begin(model("llada"), [1, 2], Policy("none", suffix_window=4), 9, 3)
    assert [request.limit(block) for block in request.blocks] == [9, 11, 11]
    request.eos_ids = (7,)
    request.write(3, 7)
    assert request.limit(request.blocks[0]) == 5
    assert request.limit(request.blocks[1]) == 8  # never before the block's own end


@pytest.mark.parametrize("name", ["llada-eos", "dream-eos"])
@pytest.mark.parametrize("unmask", RULES)
def test_early_ends(name: str, unmask: str) -> None:
    eos = SHAPES[name].eos_ids
    early: Options = {"early_end": True, "eos_ids": eos}
    stopped = 0
    for caching in ("none", "dual", *(CACHES if unmask == "threshold" else ())):
        for result in run(name, unmask, caching, **early):
            assert not set(result.tokens[:-1]) & set(eos)
            assert result.forwards == len(result.writes)
            if len(result.tokens) < 21:
                stopped += 1
                assert result.tokens[-1] in eos
    assert stopped


@pytest.mark.parametrize("name", ["llada-eos", "dream-eos"])
@pytest.mark.parametrize("suffix", [None, 3])
def test_cut_canvases_equal_a_plain_loop(name: str, suffix: int | None) -> None:
    oracle, eos, mask = model(name), SHAPES[name].eos_ids, SHAPES[name].mask_id
    results = run(name, early_end=True, eos_ids=eos, suffix_window=suffix)
    for prompt, result in zip(PROMPTS, results, strict=True):
        size, ids, seen = len(prompt), prompt + [mask] * 21, []
        for start in range(size, size + 21, 8):
            end = min(start + 8, size + 21)
            while mask in ids[start:end]:
                found = [p for p in range(size, size + 21) if ids[p] in eos]
                last = end if found else min(size + 21, end + (21 if suffix is None else suffix))
                z = oracle(torch.tensor([ids[:last]]))
                z = (shift(z) if oracle.shifted else z)[0, start:end]
                confidence, best = z.double().softmax(-1)[:, :mask].max(-1)
                masked = [token == mask for token in ids[start:end]]
                for slot in rules.threshold(confidence.tolist(), masked, EAGER["threshold"]):
                    ids[start + slot] = int(best[slot])
                found = [p for p in range(size, size + 21) if ids[p] in eos]
                if found:
                    stop = found[0]
                    ids[stop:] = [ids[stop] if t == mask else t for t in ids[stop:]]
                seen.append(last)
            if any(token in eos for token in ids[size:end]):
                break
        assert ids[size : size + len(result.tokens)] == result.tokens
        assert result.computed == sum(seen[: result.forwards])
