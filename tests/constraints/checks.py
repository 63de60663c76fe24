"""Texts of an automaton at random, and another library's word on JSON schemas."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dllmserve.constraints.dfa import Dfa
from tests.oracles.grammar import FORMAT_CHECKS


def random_text(dfa: Dfa, rng: random.Random, length: int) -> str:
    """A text that an automaton accepts: a random walk, then the shortest way to an end."""
    count = dfa.states
    far = np.where(dfa.accepting, 0, 1 << 30)
    for _ in range(count):
        nearer = np.minimum(far, far[dfa.delta].min(axis=1) + 1)
        if np.array_equal(nearer, far):
            break
        far = nearer
    sets = dfa.alphabet.sets()
    state, text = dfa.start, ""
    while True:
        row = dfa.delta[state]
        choices = [k for k in range(len(row)) if row[k] != count and sets[k]]
        if len(text) >= length:
            if dfa.accepting[state]:
                return text
            choices = [k for k in choices if far[row[k]] < far[state]]
        elif dfa.accepting[state] and (not choices or rng.random() < 0.1):
            return text
        kind = rng.choice(choices)
        low, high = rng.choice(sets[kind])
        text += chr(rng.randint(low, high))
        state = int(row[kind])


def validator(schema: Any) -> Callable[[Any], bool]:
    """Says whether a value is valid by a schema, with another library."""
    jsonschema = pytest.importorskip("jsonschema")
    checker = jsonschema.FormatChecker(())
    for name, check in FORMAT_CHECKS.items():
        checker.checkers[name] = (
            lambda value, check=check: not isinstance(value, str) or check(value),
            ValueError,
        )
    found = jsonschema.Draft202012Validator(schema, format_checker=checker)
    return lambda value: bool(found.is_valid(value))
