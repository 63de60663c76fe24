"""Grammars against enumerated sets, and against lists of valid and invalid texts."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dllmserve.constraints.compile import compile_grammar, language
from dllmserve.constraints.grammar import TokenGrammar
from dllmserve.constraints.vocabulary import Vocabulary
from dllmserve.errors import InvalidParameterError
from tests.oracles.grammar import Fillings, allowed_sets, both_spacings

TRUTH = Path(__file__).parent.parent / "truth"
SETS = ("allowed_sets", "allowed_sets_exact_length", "multi_commit")


@cache
def read(name: str) -> Any:
    return json.loads((TRUTH / f"{name}.json").read_text(encoding="utf-8"))


def vocabulary(grammar: Any) -> Vocabulary:
    return Vocabulary([bytes.fromhex(t["hex"]) if "hex" in t else None for t in grammar["vocab"]])


@cache
def compiled(file: str, name: str) -> TokenGrammar:
    grammar = read(file)["grammars"][name]
    words = vocabulary(grammar)
    return compile_grammar(
        regex=grammar["regex"],
        vocabulary=words,
        vocab_size=len(words),
        mask_id=grammar["mask"],
        end_ids=() if grammar.get("eos") is None else (grammar["eos"],),
    )


def cases(*files: str) -> list[Any]:
    return [pytest.param(f, c, id=c["id"]) for f in files for c in read(f)["cases"]]


@pytest.mark.parametrize(("file", "case"), cases(*SETS[:2]))
def test_allowed_sets(file: str, case: Any) -> None:
    grammar = compiled(file, case["grammar"])
    mask = read(file)["grammars"][case["grammar"]]["mask"]
    feasible, found = allowed_sets(grammar, case["row"], mask)
    assert feasible == case["feasible"]
    assert {str(slot): ids for slot, ids in found.items()} == case["allowed"]


def test_least_canvas() -> None:
    for name, grammar in read("allowed_sets")["grammars"].items():
        found = compiled("allowed_sets", name)
        assert found.least[found.start] == grammar["min_slots"]


@pytest.mark.parametrize("name", sorted(read("allowed_sets")["grammars"]))
def test_the_oracles_agree(name: str) -> None:
    """Trying every filling gives the same sets as sweeping over the automaton."""
    import re

    grammar = read("allowed_sets")["grammars"][name]
    pieces = vocabulary(grammar).pieces
    tried = Fillings(
        pieces, lambda text: re.fullmatch(grammar["regex"], text) is not None, [grammar["eos"]]
    )
    for row in ([grammar["mask"]] * 3, [grammar["mask"], grammar["eos"]], [grammar["eos"]] * 2):
        expected = tried.allowed(row, grammar["mask"])
        found = allowed_sets(compiled("allowed_sets", name), row, grammar["mask"])
        assert found[0] == expected[0]
        assert not expected[0] or found == expected


@pytest.mark.parametrize(("file", "case"), cases("multi_commit"))
def test_several_writes_a_step(file: str, case: Any) -> None:
    """The most confident slots are visited, and each takes its best id of those allowed now."""
    data = read(file)["grammars"][case["grammar"]]
    grammar, mask = compiled(file, case["grammar"]), data["mask"]
    row, logits = list(case["row"]), case["logits"]
    for step in case["steps"]:
        feasible, allowed = allowed_sets(grammar, row, mask)
        assert feasible
        confidence = {
            slot: 1
            / sum(math.exp(logits[slot][i] - max(logits[slot][j] for j in ids)) for i in ids)
            for slot, ids in allowed.items()
        }
        chosen = sorted(confidence, key=lambda slot: (-confidence[slot], slot))[: case["k"]]
        written = []
        for slot in chosen:
            now = allowed_sets(grammar, row, mask)[1][slot]
            row[slot] = max(now, key=lambda id: logits[slot][id])
            written.append([slot, row[slot]])
        assert written == step
    assert row == case["final"]


def test_texts_that_a_checkpoint_wrote() -> None:
    data = read("constrained_decode_llada-kv2of4")
    words = Vocabulary([None if v is None else bytes.fromhex(v) for v in data["vocab"]])
    end = data["eos_token_id"]
    for case in data["cases"]:
        grammar = compile_grammar(
            regex=case["regex"],
            vocabulary=words,
            vocab_size=len(words),
            mask_id=data["mask_token_id"],
            end_ids=(end,),
        )
        assert grammar.accepting[grammar.walk(case["expected"])]
        ids = [id for id in case["expected"] if id != end]
        assert b"".join(words.pieces[id] or b"" for id in ids).decode() == case["text"]


@pytest.mark.parametrize("case", read("regexes")["regexes"], ids=lambda case: case["regex"])
def test_regexes(case: Any) -> None:
    found = language(regex=case["regex"])
    assert all(map(found.accepts, case["valid"]))
    assert not any(map(found.accepts, case["invalid"]))


@pytest.mark.parametrize("case", read("schemas")["schemas"], ids=lambda case: case["name"])
def test_schemas(case: Any) -> None:
    found = language(json_schema=json.dumps(case["schema"]))
    for value in case["valid"]:
        assert any(map(found.accepts, both_spacings(value))), value
    for value in case["invalid"]:
        assert not any(map(found.accepts, both_spacings(value))), value


REASONS = {
    "recursive-ref": r"at /properties/next/anyOf/0: \$ref '#/\$defs/node' is recursive",
    "if-then": "the keyword 'if' is not supported",
    "lookahead": r"pattern '\^\(\?=.*' uses lookaround",
}


@pytest.mark.parametrize("case", read("schemas_refuse")["schemas"], ids=lambda case: case["name"])
def test_what_is_refused_or_exact(case: Any) -> None:
    schema = json.dumps(case["schema"])
    if case["name"] in REASONS:
        with pytest.raises(InvalidParameterError, match=REASONS[case["name"]]):
            language(json_schema=schema)
        return
    found = language(json_schema=schema)  # multiples of 7
    for n in range(-50, 1000):
        assert found.accepts(json.dumps({"n": n})) == (n % 7 == 0)
