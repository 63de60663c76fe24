"""List operations and text edits."""

from __future__ import annotations

import random

from training.tasks.base import Item
from training.tasks.vocab import CITIES, COLORS, JOBS, NAMES, OBJECTS, WORDS


def _sort_numbers(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(1, 100), rng.randrange(3, 9))
    down = rng.random() < 0.3
    prompt = "Sort the numbers from high to low: " if down else "Sort the numbers: "
    return prompt + " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers, reverse=down)))


def _sort_words(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randrange(3, 8))
    return "Sort the words: " + " ".join(words), " ".join(sorted(words))


def _reverse(rng: random.Random) -> tuple[str, str]:
    pool = rng.choice((WORDS, NAMES, CITIES, OBJECTS))
    words = rng.sample(pool, rng.randrange(3, 9))
    return "Reverse the list: " + " ".join(words), " ".join(reversed(words))


def _extreme(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(1, 1000), rng.randrange(3, 8))
    if rng.random() < 0.5:
        return "Largest number: " + " ".join(map(str, numbers)), str(max(numbers))
    return "Smallest number: " + " ".join(map(str, numbers)), str(min(numbers))


def _unique(rng: random.Random) -> tuple[str, str]:
    pool = rng.sample(rng.choice((WORDS, COLORS, OBJECTS)), rng.randrange(3, 7))
    words = [*pool, *rng.choices(pool, k=rng.randrange(1, 4))]
    rng.shuffle(words)
    return "Remove repeated words: " + " ".join(words), " ".join(dict.fromkeys(words))


def _count(rng: random.Random) -> tuple[str, str]:
    pool = rng.sample(rng.choice((COLORS, OBJECTS, WORDS)), 3)
    target = pool[0]
    words = [*[target] * rng.randrange(1, 6), *rng.choices(pool[1:], k=rng.randrange(2, 6))]
    rng.shuffle(words)
    hits = words.count(target)
    return f"How many times does {target} occur: " + " ".join(words), str(hits)


def listop(rng: random.Random, level: int) -> Item:
    """Sort, reverse, find an extreme, remove repeats or count."""
    maker = rng.choice(
        (_sort_numbers, _sort_numbers, _sort_words, _reverse, _reverse, _extreme, _unique, _count)
    )
    prompt, answer = maker(rng)
    return Item("listop", prompt, answer, prompt)


def _sentence(rng: random.Random, low: int, high: int) -> list[str]:
    """Return random words, numbers among them."""
    pool = rng.choice((WORDS, WORDS, JOBS, OBJECTS, NAMES))
    words = rng.choices(pool, k=rng.randrange(low, high))
    if rng.random() < 0.3:
        words[rng.randrange(len(words))] = str(rng.randrange(10, 1000))
    return words


def _replace(rng: random.Random) -> tuple[str, str]:
    words = _sentence(rng, 4, 11)
    old, new = rng.choice(words), rng.choice(WORDS)
    if rng.random() < 0.3:
        words[rng.randrange(len(words))] = old
    return f"Replace {old} with {new}: " + " ".join(words), " ".join(
        new if w == old else w for w in words
    )


def _capitals(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randrange(2, 6))
    return "Write in capitals: " + " ".join(words), " ".join(words).upper()


def _spell(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randrange(2, 4))
    return "Spell: " + " ".join(words), ", ".join(" ".join(word) for word in words)


def _repeat(rng: random.Random) -> tuple[str, str]:
    phrase, times = " ".join(rng.sample(WORDS, rng.randrange(1, 4))), rng.randrange(2, 7)
    return f"Repeat {times} times: {phrase}", ", ".join([phrase] * times)


def _copy(rng: random.Random) -> tuple[str, str]:
    text = " ".join(_sentence(rng, 4, 16))
    return f"Copy: {text}", text


def _gap(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randrange(5, 12))
    start = rng.randrange(1, len(words) - 2)
    stop = start + rng.choice((1, 1, 2))
    shown = [*words[:start], "____", *words[stop:]]
    return f"Original: {' '.join(words)}\nFill the gap: {' '.join(shown)}", " ".join(
        words[start:stop]
    )


def edit(rng: random.Random, level: int) -> Item:
    """Replace, capitals, spell, repeat, copy, or fill a gap."""
    maker = rng.choice((_replace, _replace, _capitals, _spell, _repeat, _copy, _copy, _gap))
    prompt, answer = maker(rng)
    return Item("edit", prompt, answer, prompt)
