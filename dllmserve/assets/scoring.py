"""Exact scorers for the held-out tasks of the embedded model.

Pure standard library and free of side effects, so that the training code and the package judge an
answer alike.
"""

from __future__ import annotations

import json
import re

__all__ = ["TASKS", "score"]

TASKS: tuple[str, ...] = ("arith", "word", "listop", "sudoku", "needle", "story", "json", "edit")

_FINAL = re.compile(r"#### (-?\d+)")


def _final_number(text: str) -> str | None:
    """Return the number after the last ``####`` mark, or None when there is none."""
    found = _FINAL.findall(text)
    return found[-1] if found else None


def _rows(text: str) -> list[str]:
    """Return the non-empty lines of a grid, without spaces around them."""
    return [line.strip() for line in text.strip().split("\n") if line.strip()]


def _sudoku_ok(prompt: str, output: str) -> bool:
    """Whether ``output`` is a full, valid 4x4 grid that keeps the givens of ``prompt``."""
    givens = _rows(prompt)[1:]
    rows = _rows(output)
    if len(rows) != 4 or any(sorted(row) != list("1234") for row in rows):
        return False
    for given, row in zip(givens, rows, strict=False):
        if any(g != "0" and g != r for g, r in zip(given, row, strict=False)):
            return False
    columns = ["".join(row[c] for row in rows) for c in range(4)]
    boxes = [rows[r][c : c + 2] + rows[r + 1][c : c + 2] for r in (0, 2) for c in (0, 2)]
    return all(sorted(part) == list("1234") for part in columns + boxes)


def _json_ok(answer: str, output: str) -> bool:
    """Whether ``output`` parses to the same object as ``answer``."""
    try:
        return bool(json.loads(output) == json.loads(answer))
    except ValueError:
        return False


def score(task: str, prompt: str, answer: str, output: str) -> bool:
    """Judge one generated answer.

    Args:
        task: One of ``TASKS``; a suffix after ``-`` (as in ``needle-16``) names a difficulty and is
            ignored.
        prompt: The user's message.
        answer: The reference answer.
        output: The generated text, cut at the end of the turn.

    Returns:
        True when the output is right: the final number (``arith``, ``word``), any completion that
        obeys the rules (``sudoku``), the same object (``json``), the same text otherwise.
    """
    kind = task.split("-", 1)[0]
    if kind in ("arith", "word"):
        return _final_number(output) == _final_number(answer)
    if kind == "sudoku":
        return _sudoku_ok(prompt, output)
    if kind == "json":
        return _json_ok(answer, output)
    return output.strip() == answer.strip()
