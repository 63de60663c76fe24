"""Answers: from probabilities to the shape of OpenAI's ``/v1/decisions``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dllmserve.decisions.questions import Question


@dataclass(frozen=True)
class Cost:
    """What readings cost.

    Attributes:
        input_tokens: tokens given in all canvases together.
        cached_tokens: of these, tokens whose K and V were found, from canvases before.
        output_tokens: slots that were read.
        forward_passes: in which the canvases took part.
    """

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    forward_passes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.forward_passes + other.forward_passes,
        )


def confidence(chances: Sequence[float]) -> float:
    """How far the best option stands out: 1 if it is certain, 0 if all are alike.

    Example:
        >>> confidence([0.75, 0.25]), confidence([1.0])
        (0.5, 1.0)
    """
    count = len(chances)
    if count == 1:
        return 1.0
    return min(max((count * max(chances) - 1) / (count - 1), 0.0), 1.0)


def best(chances: Sequence[float]) -> int:
    """Index of the most probable option; the first of several."""
    return max(range(len(chances)), key=chances.__getitem__)


def score(chances: Sequence[float]) -> float:
    """Mean level, counted from 0."""
    return math.fsum(level * chance for level, chance in enumerate(chances))


def answer(question: Question, chances: Sequence[float]) -> dict[str, Any]:
    """One answer."""
    made: dict[str, Any] = {"type": question.kind, "name": question.name}
    if question.kind == "predicate":
        return made | {"probability": chances[0]}
    pairs = list(zip(question.options, chances, strict=True))
    if question.kind == "choice":
        made |= {"choice": question.options[best(chances)].value}
        listed = [{"value": option.value, "probability": chance} for option, chance in pairs]
    else:
        made |= {"score": score(chances)}
        listed = [
            {"label": option.value, "probability": chance, "value": level}
            for level, (option, chance) in enumerate(pairs)
        ]
    return made | {"confidence": confidence(chances), "probabilities": listed}


def decision(
    model: str, questions: Sequence[Question], chances: Sequence[Sequence[float]], cost: Cost
) -> dict[str, Any]:
    """The whole reply."""
    return {
        "model": model,
        "answers": [answer(*pair) for pair in zip(questions, chances, strict=True)],
        "usage": {
            "input_tokens": cost.input_tokens,
            "input_tokens_details": {
                "cached_tokens": cost.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": cost.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": cost.input_tokens + cost.output_tokens,
        },
    }
