"""The documentation is right: its code runs, its links lead somewhere, its tables are complete."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dllmserve import SamplingParams, SparseConfig, catalog
from dllmserve.config import EngineConfig
from dllmserve.errors import DllmServeError

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^```(.*)$")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[tuple[str, int, str]]:
    """Info string, line of the first code line (1-based) and code of each fenced block."""
    opened: tuple[str, int] | None = None
    code: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = FENCE.match(line)
        if fence is None:
            code.append(line)
        elif opened is None:
            opened, code = (fence.group(1).strip(), number + 1), []
        else:
            yield (*opened, "\n".join(code))
            opened = None
    assert opened is None, f"{page.name} line {opened[1]}: the block is never closed"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One namespace per page; errors show the page and the line.

    ``python file=PATH`` is the content of a new module, ``python catalog=TABLE`` a line of
    dllmserve/catalog.py; both are in force for the rest of the page.
    """
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for info, line, code in blocks(page):
        language, _, rest = info.partition(" ")
        what, _, value = rest.partition("=")
        if info == "python":
            # blank lines in front give tracebacks the page's own line numbers
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
        elif language == "python" and what == "file":
            module = ModuleType(value.removesuffix(".py").replace("/", "."))
            monkeypatch.setitem(sys.modules, module.__name__, module)
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), module.__dict__)
        elif language == "python" and what == "catalog":
            for name, entry in eval("{" + code + "}", vars(catalog)).items():
                monkeypatch.setitem(getattr(catalog, value).own, name, entry)
        else:
            assert info in ("", "python no-run", "bash", "json", "mermaid", "text"), info


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """What a reader of the rendered page can jump to."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


#: a line that has pip fetch this package by its name, which no index knows
BY_NAME = re.compile(r"pip install\b[^\n`]*?[ '\"]dllmserve(?![\w.-])")


def test_no_line_installs_the_package_by_a_name_that_is_not_published() -> None:
    assert BY_NAME.search("pip install -q 'dllmserve[server]'")
    assert BY_NAME.search("pip install dllmserve")
    assert not BY_NAME.search("pip install dllmserve-0.1.0-py3-none-any.whl")
    assert not BY_NAME.search("`pip install -e '.[server]'` and `dllmserve serve`")
    kinds = {".py", ".md", ".sh", ".yaml", ".toml", ".service", ""}
    folders = ("dllmserve", "docs", "examples", "deploy", "benchmarks", "tools", "training")
    files = [*PAGES, ROOT / "Makefile", *(p for f in folders for p in (ROOT / f).rglob("*"))]
    for file in files:
        if file.is_file() and file.suffix in kinds and "__pycache__" not in file.parts:
            found = BY_NAME.search(file.read_text(encoding="utf-8"))
            assert found is None, f"{ids(file)}: {found and found[0]}"


@pytest.mark.parametrize("owner", [SamplingParams, SparseConfig, EngineConfig])
def test_every_field_has_a_row_with_its_default(owner: type[Any]) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    section = page.split(f"## {owner.__name__}\n", 1)[1].split("\n## ", 1)[0]
    for field in fields(owner):
        assert field.default is not MISSING
        default = str(field.default) if isinstance(field.default, float) else repr(field.default)
        row = f"| `{field.name}` | `{default.replace(chr(39), chr(34))}` |"
        assert row in section, f"docs/api.md, {owner.__name__}: no row starts with {row}"


def test_every_error_is_listed() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    todo = [DllmServeError]
    while todo:
        error = todo.pop()
        todo += error.__subclasses__()
        if error.__module__ != DllmServeError.__module__:
            continue  # of one layer, which does not let it out
        assert f"`{error.__name__}`" in page and f"`{error.code}`" in page, error.__name__


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=ids)
def test_examples_run(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
