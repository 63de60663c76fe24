"""Constrained answers: every rule, cache and geometry, alone and in mixed batches, on ranks."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dllmserve import LLM, SamplingParams
from dllmserve.catalog import CACHES, RULES
from dllmserve.constraints.compile import compile_grammar
from dllmserve.constraints.compiled import Compiled
from dllmserve.constraints.grammar import TokenGrammar
from dllmserve.constraints.vocabulary import Vocabulary
from dllmserve.core.constrained import settle
from dllmserve.core.plan import OPEN, WRITTEN, EntryReport
from dllmserve.core.request import Forced, Request
from dllmserve.errors import InvalidParameterError
from dllmserve.outputs import RequestOutput
from tests import helpers
from tests.conftest import Engines
from tests.grammars import random_grammar
from tests.parallel.threads import threaded_llm

TRUTH = Path(__file__).parent.parent / "truth"
FULL, BLOCK, CAUSAL = "llada-kv2of4", "sdar-kv2of4", "qwen3-kv2of4"
#: rules with numbers at which they write several tokens at once
SPEEDS: dict[str, Any] = {"threshold": 0.05, "kl_threshold": 1.0, "factor": 3.0, "entropy_bound": 9}


def run(llm: LLM, requests: list[Request]) -> list[RequestOutput]:
    core, found = llm._engine, dict[Request, RequestOutput]()
    for request in requests:
        core.add(request)
    while core.has_work:
        events = core.step()
        assert not events.failed, [request.error for request in events.failed]
        found |= dict(events.finished)
    helpers.check_idle(llm)
    return [found[request] for request in requests]


def constrained(llm: LLM, grammar: TokenGrammar, prompt: list[int], **given: Any) -> Request:
    params = SamplingParams(**{"seed": 3, **given})
    return llm._engine.make_request(prompt, params, grammars=[Compiled(grammar)])


def check(grammar: TokenGrammar, output: RequestOutput) -> None:
    """The ids lead to an accepting state, and the answer is whole."""
    assert grammar.accepting[grammar.walk(output.token_ids)], output.token_ids
    assert output.finish_reason == "stop"
    assert len(output.steps) == len(output.token_ids)
    assert 0 < max(output.steps)


def variants(llm: LLM, dice: random.Random) -> list[dict[str, Any]]:
    """Each rule with some cache, cold and hot, and what else changes logits or steps."""
    full, found = llm.spec.geometry == "full", []
    for rule, info in RULES.own.items():
        if rule == "joint" or info.noise or (info.revokes and not full):
            continue  # what edits, or writes all at once, is not for constraints
        for temperature in (0.0, 1.3):
            given: dict[str, Any] = {"unmask": rule, "temperature": temperature, **SPEEDS}
            if full:
                given |= {"steps": dice.choice([3, 6, 24]), "block_length": dice.choice([6, 24])}
                names = [n for n, it in CACHES.own.items() if it.named and not it.windowed]
                names = [n for n in names if CACHES[n].whole or not info.revokes]
                given["cache"] = dice.choice(names)
            elif llm.spec.geometry == "block" and info.quota:
                given["steps_per_block"] = dice.choice([1, 2, 4])
            found.append(given)
    base = {"temperature": 0.0}
    found += [base | {"logit_bias": {5: 9.0, 7: -9.0}}, {"top_p": 0.6}, {"top_k": 3}]
    if full:
        found += [
            base | {"cfg_scale": 1.5, "steps": 6},
            base | {"early_end": True, "suffix_window": 3, "block_length": 6, "unmask": "factor"},
            base | {"remasking": "random", "steps": 6},
            {"schedule": "dream", "steps": 6, "confidence": "neg_entropy"},
            base | {"steps": 6, "confidence": "margin"},
            base | {"confidence_eos_eot_inf": True, "steps": 6},
        ]
    return found


@pytest.mark.parametrize("end", [True, False], ids=["ends", "exact"])
@pytest.mark.parametrize("name", [FULL, "dream-kv2of4", BLOCK, "fdv2-kv2of4", CAUSAL])
def test_every_rule_and_cache(engines: Engines, name: str, end: bool) -> None:
    """Answers are whole and match; alone, or beside others, which are as they would be alone."""
    llm, dice = engines(helpers.GOLDEN / name, kv_pages=300), random.Random(1)
    ids = llm.spec.embedding_size
    jobs = []
    for index, given in enumerate(variants(llm, dice)):
        grammar = random_grammar(index, ids, dice.choice([6, 30]), 8, end=end)
        grammar = for_model(grammar, llm)
        length = dice.choice([24, 17])
        given = {"gen_length": length, "ignore_eos": not end, **given}
        given.pop("early_end", None) if not end else None
        jobs.append((grammar, helpers.random_prompt(index, 3 + index), given))

    def made() -> list[Request]:
        return [constrained(llm, g, prompt, **given) for g, prompt, given in jobs]

    plain = SamplingParams(temperature=0.0, gen_length=12, steps=12, ignore_eos=True)
    prompts = [helpers.random_prompt(90 + i, 5 + 3 * i) for i in range(4)]
    free = llm.generate(prompts, plain, use_tqdm=False)
    alone = [run(llm, [request])[0] for request in made()]
    for (grammar, _, given), output in zip(jobs, alone, strict=True):
        check(grammar, output)
        assert len(output.token_ids) == given["gen_length"] or end
    beside = [llm._engine.make_request(prompt, plain) for prompt in prompts]
    mixed = made() + beside
    dice.shuffle(mixed)
    outputs = dict(zip(mixed, run(llm, mixed), strict=True))
    assert [outputs[r].token_ids for r in beside] == [o["token_ids"] for o in free]
    again = run(llm, made())
    assert [o.token_ids for o in again] == [o.token_ids for o in alone]
    assert [o.steps for o in again] == [o.steps for o in alone]
    own = [r for r in sorted(mixed, key=lambda r: r.id) if r.regions]
    assert [outputs[r].token_ids for r in own] == [o.token_ids for o in alone]


def for_model(grammar: TokenGrammar, llm: LLM) -> TokenGrammar:
    """A grammar whose last class is the model's end ids, and in which the mask is never allowed."""
    class_of = grammar.class_of.copy()
    ends = {len(grammar.first) - 1} if grammar.key.endswith("True") else set()
    class_of[[i for i, c in enumerate(class_of.tolist()) if c in ends]] = 1
    class_of[list(llm.spec.eos_ids)] = len(grammar.first) - 1 if ends else 0
    class_of[llm.spec.mask_id] = 0
    first = np.full_like(grammar.first, -1)
    first[class_of[::-1]] = np.arange(len(class_of))[::-1]
    size = np.bincount(class_of, minlength=len(first)).astype(np.int32)
    key = f"{grammar.key} of {llm.config.model}"
    return replace(grammar, key=key, class_of=class_of, first=first, size=size)


@pytest.mark.parametrize("name", [BLOCK, CAUSAL])
def test_pages_that_are_taken_and_prefixes_that_are_found(engines: Engines, name: str) -> None:
    large = engines(helpers.GOLDEN / name, kv_pages=300)
    small = engines(helpers.GOLDEN / name, kv_pages=18, page_size=4, max_num_seqs=8)
    grammar = for_model(random_grammar(5, large.spec.embedding_size, 30, 8, end=True), large)
    prompt = helpers.random_prompt(1, 9)

    def made(llm: LLM) -> list[Request]:
        return [
            constrained(llm, grammar, prompt, gen_length=16, temperature=t, seed=s)
            for s, t in enumerate([0.0, 0.5, 1.0, 2.0, 0.0, 1.0])
        ]

    expected = [o.token_ids for o in run(large, made(large))]
    for _ in range(2):
        assert [o.token_ids for o in run(small, made(small))] == expected
    assert small._engine.scheduler.storage.preempted > 0
    for request, output in zip(made(small), run(small, made(small)), strict=True):
        check(request.regions[0].grammar, output)


@pytest.mark.parametrize("name", [FULL, BLOCK])
def test_on_two_ranks(monkeypatch: pytest.MonkeyPatch, engines: Engines, name: str) -> None:
    one = engines(helpers.GOLDEN / name, kv_pages=300)
    two, _, _ = threaded_llm(monkeypatch, str(helpers.GOLDEN / name), 2, kv_pages=300)
    found = []
    for llm in (one, two):
        dice, requests = random.Random(2), []
        for index, given in enumerate(variants(llm, dice)[:12]):
            grammar = random_grammar(index, llm.spec.embedding_size, 12, 8, end=True)
            prompt = helpers.random_prompt(index, 7)
            requests.append(
                constrained(llm, for_model(grammar, llm), prompt, gen_length=12, **given)
            )
        found.append([o.token_ids for o in run(llm, requests)])
    assert found[0] == found[1]


def truth(name: str) -> Any:
    return json.loads((TRUTH / name).read_text())


def vocabulary(texts: list[str | None]) -> Vocabulary:
    return Vocabulary([None if text is None else bytes.fromhex(text) for text in texts])


def test_decodes_of_the_low_confidence_schedule(engines: Engines) -> None:
    """As a plain loop decodes them, step by step; steps whose outcome is known cost no forward."""
    data = truth(f"constrained_decode_{FULL}.json")
    llm, spared = engines(helpers.GOLDEN / FULL), 0
    known, end = vocabulary(data["vocab"]), data["eos_token_id"]
    requests = []
    for case in data["cases"]:
        grammar = compile_grammar(
            regex=case["regex"],
            vocabulary=known,
            vocab_size=llm.spec.embedding_size,
            mask_id=data["mask_token_id"],
            end_ids=(end,),
        )
        requests.append(
            constrained(llm, grammar, case["prompt"], temperature=0.0, **case["params"])
        )
    for case, output in zip(data["cases"], run(llm, requests), strict=True):
        ids = case["expected"]
        length = ids.index(end) + 1 if end in ids else len(ids)
        assert output.token_ids == ids[:length], case["id"]
        assert output.steps == case["step_map"][:length], case["id"]
        assert output.forward_passes <= case["forwards"]
        spared += case["forwards"] - output.forward_passes
    assert spared > 20


def test_one_answer_alone_costs_no_forward(engines: Engines) -> None:
    llm = engines(helpers.GOLDEN / FULL)
    data = truth(f"constrained_decode_{FULL}.json")
    grammar = compile_grammar(
        choice=("no",),
        vocabulary=Vocabulary([b"n", b"o", None]),
        vocab_size=llm.spec.embedding_size,
        mask_id=llm.spec.mask_id,
        end_ids=(data["eos_token_id"],),
    )
    (output,) = run(llm, [constrained(llm, grammar, [4, 5], gen_length=8, temperature=0.0)])
    assert output.token_ids == [0, 1, data["eos_token_id"]]
    assert output.forward_passes == 0


def test_a_canvas_without_room(engines: Engines) -> None:
    llm = engines(helpers.GOLDEN / FULL)
    grammar = compile_grammar(
        regex="aaaa|aaaaaa",
        vocabulary=Vocabulary([b"a", None]),
        vocab_size=llm.spec.embedding_size,
        mask_id=llm.spec.mask_id,
    )
    with pytest.raises(InvalidParameterError, match="fewer than 4 tokens, and gen_length is 3"):
        constrained(llm, grammar, [4], gen_length=3, ignore_eos=True)
    with pytest.raises(InvalidParameterError, match="exactly 5 tokens"):
        constrained(llm, grammar, [4], gen_length=5, ignore_eos=True)
    with pytest.raises(InvalidParameterError, match="end_padding=True writes over"):
        constrained(llm, grammar, [4], gen_length=6, early_end=True, end_padding=True)
    (output,) = run(llm, [constrained(llm, grammar, [4], gen_length=6, ignore_eos=True)])
    assert output.token_ids == [0] * 6


def test_tokens_that_the_host_wrote_may_be_taken_back(engines: Engines) -> None:
    """A rule masks one again that had to stand there: what stands there later is another one."""
    llm = engines(helpers.GOLDEN / FULL)
    grammar = for_model(random_grammar(1, llm.spec.embedding_size, 30, 8, end=True), llm)
    request = constrained(llm, grammar, [5, 6, 7], gen_length=8, unmask="wino")
    request.forced = {5: Forced(40, 1), 6: Forced(41, 1)}
    request.progress.step_in_block = 1
    ends = llm.spec.eos_ids
    holds = [OPEN, WRITTEN, WRITTEN, OPEN, OPEN, OPEN, 44, OPEN]
    settle(request, EntryReport(6, 0, -1, holds=holds), ends)
    assert {p: it.token for p, it in request.forced.items()} == {5: 40, 9: 44}
    assert request.with_forced([0] * 8) == [0, 0, 40, 0, 0, 0, 44, 0]
