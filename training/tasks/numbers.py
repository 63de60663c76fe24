"""Step-by-step arithmetic and word problems."""

from __future__ import annotations

import random

from training.tasks.base import Item
from training.tasks.vocab import NAMES, THINGS


def _digits(n: int, width: int) -> list[int]:
    """Return the decimal digits of ``n``, lowest first, padded with zeros."""
    return [n // 10**k % 10 for k in range(width)]


def add_steps(a: int, b: int) -> list[str]:
    """Add column by column; each step is ``digit+digit+carry=sum``."""
    width, carry, steps = max(len(str(a)), len(str(b))), 0, []
    for x, y in zip(_digits(a, width), _digits(b, width), strict=True):
        total = x + y + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return steps


def sub_steps(a: int, b: int) -> list[str]:
    """Subtract column by column; a borrow shows as ``+10`` in the step that borrows."""
    borrow, steps = 0, []
    width = len(str(a))
    for x, y in zip(_digits(a, width), _digits(b, width), strict=True):
        short = x - y - borrow < 0
        steps.append(f"{x}{'+10' if short else ''}-{y}-{borrow}={x - y - borrow + 10 * short}")
        borrow = int(short)
    return steps


def mul_steps(a: int, b: int) -> list[str]:
    """Multiply by one digit, column by column; each step is ``digit*digit+carry=product``."""
    carry, steps = 0, []
    for x in _digits(a, len(str(a))):
        total = x * b + carry
        steps.append(f"{x}*{b}+{carry}={total}")
        carry = total // 10
    return steps


def arith(rng: random.Random, level: int) -> Item:
    """``Compute 347 + 586 step by step.``"""
    kind = rng.choice("++--*")
    width = rng.choice((2, 3, 3, 4))
    a = rng.randrange(10 ** (width - 1), 10**width)
    if kind == "*":
        b = rng.randrange(2, 10)
        steps, result = mul_steps(a, b), a * b
    else:
        width = rng.choice((2, width, width))
        b = rng.randrange(10 ** (width - 1), 10**width)
        if b > a:
            a, b = b, a
        steps, result = (add_steps(a, b), a + b) if kind == "+" else (sub_steps(a, b), a - b)
    prompt = f"Compute {a} {kind} {b} step by step."
    return Item("arith", prompt, "; ".join(steps) + f"\n#### {result}", f"{a}{kind}{b}")


def _change(
    rng: random.Random, who: str, other: str, things: str, now: int
) -> tuple[str, list[str], int]:
    """Return one event of a word problem, its equations and the new count."""
    options = ["more"] if now < 12 else ["more", "less", "less"]
    if now <= 60:
        options.append("boxes")
    kind = rng.choice(options)
    if kind == "boxes":
        boxes, each = rng.randrange(2, 7), rng.randrange(2, 7)
        text = rng.choice(
            (
                f"{who} buys {boxes} boxes with {each} {things} each.",
                f"{other} brings {who} {boxes} bags of {each} {things}.",
            )
        )
        return (
            text,
            [f"{boxes}*{each}={boxes * each}", f"{now}+{boxes * each}={now + boxes * each}"],
            now + boxes * each,
        )
    if kind == "more" and now < 90:
        k = rng.randrange(2, 100 - now)
        text = rng.choice(
            (
                f"{other} gives {who} {k} {things}.",
                f"{who} buys {k} more {things}.",
                f"{who} finds {k} {things}.",
                f"Then {who} gets {k} {things} from {other}.",
            )
        )
        return text, [f"{now}+{k}={now + k}"], now + k
    k = rng.randrange(2, now)
    text = rng.choice(
        (
            f"{who} gives {other} {k} {things}.",
            f"{who} loses {k} {things}.",
            f"{who} sells {k} of the {things}.",
            f"{who} gives away {k} {things}.",
        )
    )
    return text, [f"{now}-{k}={now - k}"], now - k


def word(rng: random.Random, level: int) -> Item:
    """A small story about counts, two or three steps."""
    who, other = rng.sample(NAMES, 2)
    things, others = rng.sample(THINGS, 2)
    if rng.random() < 0.25:
        return _compare(rng, who, other, things)
    now = rng.randrange(5, 80)
    sentences = [f"{who} has {now} {things}."]
    steps: list[str] = []
    goal = rng.choice((2, 2, 3))
    while len(steps) < goal:
        text, equations, now = _change(rng, who, other, things, now)
        sentences.append(text)
        steps += equations
    if rng.random() < 0.15:
        sentences.insert(
            rng.randrange(1, len(sentences) + 1), f"{other} has {rng.randrange(2, 90)} {others}."
        )
    sentences.append(f"How many {things} does {who} have now?")
    return Item("word", " ".join(sentences), "; ".join(steps) + f"\n#### {now}", "; ".join(steps))


def _compare(rng: random.Random, who: str, other: str, things: str) -> Item:
    """Two people, one defined by the other, and their total."""
    first = rng.randrange(5, 50)
    kind = rng.randrange(3)
    if kind == 0:
        k = rng.randrange(2, 40)
        second, text, step = (
            first + k,
            f"{other} has {k} more {things} than {who}.",
            f"{first}+{k}={first + k}",
        )
    elif kind == 1:
        k = rng.randrange(2, first)
        second, text, step = (
            first - k,
            f"{other} has {k} fewer {things} than {who}.",
            f"{first}-{k}={first - k}",
        )
    else:
        first, k = rng.randrange(3, 20), rng.randrange(2, 5)
        second, step = first * k, f"{first}*{k}={first * k}"
        text = f"{other} has {k} times as many {things} as {who}."
    total = f"{first}+{second}={first + second}"
    prompt = f"{who} has {first} {things}. {text} How many {things} do they have together?"
    return Item("word", prompt, f"{step}; {total}\n#### {first + second}", f"{step}; {total}")
