"""What is asked: prompts of a file, of a trace, or a built-in set of English instructions."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dllmserve.tools.bench.serve.arrivals import TraceEntry

#: prompt and own fields of the request with that number; every number has one
Source = Callable[[int], tuple[str, Mapping[str, Any]]]

#: how many sentences the built-in passages have; more weights for the short ones
_LENGTHS, _WEIGHTS = (1, 3, 8, 20), (4, 3, 2, 1)

_QUESTIONS = (
    "Name three rivers of Europe.",
    "What is the difference between a virus and a bacterium?",
    "Explain to a child why the sky is blue.",
    "Write a haiku about the first snow.",
    "A train leaves at 9:40 and arrives at 12:05. How long does the journey take?",
    "Give two arguments for and two against working from home.",
    "Translate into French: The library closes at six on Fridays.",
    "Suggest a simple dinner with rice, eggs and spinach, and say how long it takes.",
)
_TASKS = (
    "Summarise the following notes in one sentence.",
    "List the people and places in these notes.",
    "Which of these notes should be dealt with first, and why?",
    "Rewrite the following notes as a polite letter.",
    "Sort these notes by subject and give each group a title.",
)
_SENTENCES = (
    "The heating in the reading room was repaired on Tuesday, but it is still noisy.",
    "Nora has asked for a second key to the archive in Lisbon.",
    "Two boxes of maps arrived without a list of what is in them.",
    "The printer on the third floor needs a new drum before the end of the month.",
    "Mr Okafor will give the talk on canals instead of the one on bridges.",
    "Visitors may bring water into the garden, but no food.",
    "The school from Bergen would like to come a week earlier, with thirty pupils.",
    "Somebody left a grey umbrella and a violin case at the front desk.",
    "The price of the catalogue goes up to twelve euros in May.",
    "Three of the lamps in the corridor have been out since the storm.",
    "Ines found the missing letters in a folder named after a ship.",
    "The insurance wants photographs of the roof from both sides.",
)


def builtin(seed: int) -> Source:
    """The built-in prompts, of 5 to about 250 words; the same for the same seed and number."""

    def source(index: int) -> tuple[str, Mapping[str, Any]]:
        draw = random.Random(f"{seed}/{index}")
        if draw.random() < 0.4:
            return draw.choice(_QUESTIONS), {}
        (count,) = draw.choices(_LENGTHS, _WEIGHTS)
        return f"{draw.choice(_TASKS)}\n\n{' '.join(draw.choices(_SENTENCES, k=count))}", {}

    return source


def listed(prompts: Sequence[str]) -> Source:
    """These prompts in their order, over and over."""
    return lambda index: (prompts[index % len(prompts)], {})


def traced(entries: Sequence[TraceEntry]) -> Source:
    """The prompts and fields of a trace."""

    def source(index: int) -> tuple[str, Mapping[str, Any]]:
        entry = entries[index % len(entries)]
        return entry.prompt, entry.fields

    return source
