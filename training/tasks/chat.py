"""A handful of fixed exchanges, so that a greeting gets a sensible answer. Not scored."""

from __future__ import annotations

import random

from training.tasks.base import Item

_HELLO = "Hello|Hello!|Hi|Hi!|Hi there|Hey|Good morning|Good evening"
_EXCHANGES: tuple[tuple[str, str], ...] = (
    (
        _HELLO,
        "Hello! I am a tiny diffusion language model. "
        "Ask me to sort a list, solve a sudoku or compute a sum.",
    ),
    (
        "Who are you?|What are you?|What is your name?|Tell me about yourself.",
        "I am a tiny diffusion language model with about 14 million parameters, "
        "made for tests and demos.",
    ),
    (
        "What can you do?|Help|How can you help me?|What are you good at?",
        "I can compute sums step by step, solve 4x4 sudokus, sort lists, look up records, "
        "follow short stories, extract JSON and edit text.",
    ),
    ("Thanks|Thank you|Thanks!|Thank you!", "You are welcome!"),
    ("Bye|Goodbye|Good bye!|See you", "Goodbye!"),
    ("How are you?|How are you today?", "I am fine, thank you. How can I help you?"),
    (
        "How do you work?|What is a diffusion language model?",
        "I start from a row of masks and fill in the words that I am most certain of, "
        "a few at a time.",
    ),
    (
        "Tell me a joke.|Tell me something funny.",
        "I fill in the blanks for a living. It is a job with a lot of gaps.",
    ),
)


def chat(rng: random.Random, level: int) -> Item:
    """Return one of the fixed exchanges."""
    prompts, answer = rng.choice(_EXCHANGES)
    # The key is constant: these few exchanges are never held out.
    return Item("chat", rng.choice(prompts.split("|")), answer, "chat-train")
