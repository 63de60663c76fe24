"""Random walks over tokens give texts that are right, as the tokenizer decodes them."""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dllmserve
from dllmserve.constraints.compile import compile_grammar
from dllmserve.constraints.grammar import TokenGrammar
from dllmserve.constraints.vocabulary import Vocabulary
from dllmserve.engine.tokenizer import load_tokenizer
from tests.constraints.checks import validator
from tests.constraints.test_vocabulary import llama, metaspace
from tests.oracles.grammar import read_json

TRUTH = Path(__file__).parent.parent / "truth"
TINY = Path(dllmserve.__file__).parent / "assets" / "tiny"
SCHEMAS = json.loads((TRUTH / "schemas.json").read_text(encoding="utf-8"))["schemas"]
REGEXES = json.loads((TRUTH / "regexes.json").read_text(encoding="utf-8"))["regexes"]


def walk(grammar: TokenGrammar, rng: random.Random, length: int) -> list[int]:
    """Random allowed tokens, which fit into a canvas of a length."""
    state, ids = grammar.start, []
    for left in range(length - 1, -1, -1):
        row = grammar.delta[state]
        classes = np.flatnonzero(grammar.least[row] <= left)
        kind = rng.choice(classes.tolist())
        ids.append(int(rng.choice(np.flatnonzero(grammar.class_of == kind).tolist())))
        state = int(row[kind])
    assert grammar.accepting[state]
    return ids


@cache
def tiny() -> Any:
    found = load_tokenizer(TINY)
    assert found is not None
    return found


@pytest.mark.parametrize("case", SCHEMAS, ids=lambda case: case["name"])
def test_schemas(case: Any) -> None:
    grammar = compile_grammar(
        json_schema=json.dumps(case["schema"]),
        vocabulary=tiny().vocabulary,
        vocab_size=4224,
        mask_id=2,
        end_ids=(0, 3),
    )
    valid, rng = validator(case["schema"]), random.Random(0)
    least = int(grammar.least[grammar.start])
    for length in (least, least + 1, least + 5, least + 40):
        text = tiny().decode(walk(grammar, rng, length))
        assert valid(read_json(text)), text


@pytest.mark.parametrize("case", REGEXES, ids=lambda case: case["regex"])
def test_regexes(case: Any) -> None:
    fast = {"always": metaspace("always"), "byte fallback": llama()}
    words = {name: Vocabulary.of_tokenizer(tokenizer) for name, tokenizer in fast.items()}
    rng = random.Random(0)
    for name, tokenizer in fast.items():
        if name == "always" and case["regex"] != r"(a|b)*abb":
            continue  # only byte fallback can write all of them
        grammar = compile_grammar(
            regex=case["regex"],
            vocabulary=words[name],
            vocab_size=len(words[name]) + 1,
            mask_id=len(words[name]),
        )
        least = int(grammar.least[grammar.start])
        for _ in range(20):
            text = tokenizer.decode(walk(grammar, rng, least))
            assert re.fullmatch(case["regex"], text), text
