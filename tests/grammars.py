"""Random grammars over tokens, for tests that need no text."""

import random

import numpy as np

from dllmserve.constraints.grammar import TokenGrammar, finished


def random_grammar(seed: int, ids: int, states: int, classes: int, *, end: bool) -> TokenGrammar:
    """Live states and random moves; with ``end``, the last class ends a text, and goes on ending.

    Id 0 is never allowed. Some classes have one id alone.
    """
    dice, draw = random.Random(seed), np.random.default_rng(seed)
    dead = states
    delta = np.full((states + 1, classes), dead, np.int32)
    last = classes - 1 if end else classes
    for state in range(states - end):
        for move in dice.sample(range(1, last), dice.randint(1, min(last - 1, 5))):
            delta[state, move] = dice.randrange(max(state - 3, 0), min(state + 9, states - end))
        if state + 1 < states - end:  # every state is reached, and leads on
            delta[state, 1 + state % (last - 1)] = state + 1
    accepting = np.zeros(states + 1, np.bool_)
    accepting[dice.sample(range(states - end), max(1, states // 4))] = True
    accepting[states - 1 - end] = True
    if end:
        accepting[states - 1] = True
        delta[np.flatnonzero(accepting), classes - 1] = states - 1
    class_of = draw.integers(1, classes, ids).astype(np.int32)
    class_of[draw.integers(1, ids, ids // 3)] = 1 + dice.randrange(classes - 1)
    class_of[draw.permutation(np.arange(1, ids))[: classes - 1]] = np.arange(1, classes)
    class_of[0] = 0
    return finished(f"random-{seed}-{states}-{end}", delta, class_of, 0, accepting)
