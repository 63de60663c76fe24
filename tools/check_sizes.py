"""Files stay under 500 lines and functions under 60; exit code 1 names what does not.

python tools/check_sizes.py
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAX_FILE = 500
MAX_FUNCTION = 60


def sources() -> list[Path]:
    """Python files that git knows or would add; without git, all of the project's own."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        found = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        found = [p for p in ROOT.rglob("*.py") if not p.relative_to(ROOT).parts[0].startswith(".")]
    return sorted(p for p in found if p.is_file())


def too_long(path: Path) -> Iterator[str]:
    """One line of text per violation."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT)
    lines = len(text.splitlines())
    if lines > MAX_FILE:
        yield f"{name}: {lines} lines, at most {MAX_FILE}"
    for node in ast.walk(ast.parse(text, str(path))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION:
                place = f"{name}:{node.lineno}"
                yield f"{place}: {node.name} has {length} lines, at most {MAX_FUNCTION}"


def main() -> int:
    """Check every source file."""
    wrong = [line for path in sources() for line in too_long(path)]
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
