"""docs/security.md names, for each promise, tests that hold it; here it is held to that."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_PAGE = (_ROOT / "docs" / "security.md").read_text(encoding="utf-8")
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def _rows(heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without its head."""
    part = _PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


_HELD = _rows("What holds each promise")


@pytest.mark.parametrize("heading", ["Threat model", "Limits"])
def test_every_line_has_tests(heading: str) -> None:
    promised = {row[0] for row in _rows(heading)}
    assert len(promised) > 4
    assert promised <= {line for line, _, _ in _HELD}


def test_the_tests_are_there() -> None:
    found: dict[str, set[str]] = {}
    for line, promise, tests in _HELD:
        named = _TEST.findall(tests)
        assert named and len(named) == tests.count("`") // 2, (line, promise)
        for path, name in named:
            if path not in found:
                tree = ast.parse((_ROOT / path).read_text(encoding="utf-8"))
                found[path] = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
            assert name in found[path], f"{path} has no {name}"
