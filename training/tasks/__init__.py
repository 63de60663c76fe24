"""Task generators: each draws a prompt with an answer that can be scored exactly."""

from __future__ import annotations

from training.tasks.base import Item, Maker, draw, held, score
from training.tasks.chat import chat
from training.tasks.facts import json, needle, needle_eval, number_eval, story
from training.tasks.grid import sudoku
from training.tasks.lists import edit, listop
from training.tasks.numbers import arith, word

MAKERS: dict[str, Maker] = {
    "arith": arith,
    "word": word,
    "listop": listop,
    "sudoku": sudoku,
    "needle": needle,
    "story": story,
    "json": json,
    "edit": edit,
    "chat": chat,
}
EVAL_LEVELS: tuple[int, ...] = (4, 8, 16, 32, 64, 96)

__all__ = [
    "EVAL_LEVELS",
    "MAKERS",
    "Item",
    "Maker",
    "draw",
    "held",
    "needle_eval",
    "number_eval",
    "score",
]
