"""The documentation is right: its code runs, its links lead somewhere, its tables are complete."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest

from dllmserve import SamplingParams, SparseConfig
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
    """One namespace per page; errors show the line of the page.

    Blocks that change the package, see :func:`change`, change a copy of it. All of them are made
    before the rest of such a page runs, with the copy, in a process of its own.
    """
    script: list[str] = []
    changes: list[tuple[Mapping[str, str], str]] = []
    for info, line, code in blocks(page):
        language, *given = shlex.split(info) or [""]
        if info == "python":
            # blank lines in front give tracebacks the page's own line numbers
            script += [""] * (line - 1 - len(script)) + code.splitlines()
        elif language == "python" and given != ["no-run"]:
            changes.append((dict(word.split("=", 1) for word in given), code))
        else:
            assert info in ("", "python no-run", "bash", "json", "mermaid", "text"), info
    if not changes:
        monkeypatch.chdir(tmp_path)
        exec(compile("\n".join(script), str(page), "exec"), {"__name__": "page"})
        return
    shutil.copytree(ROOT / "dllmserve", tmp_path / "dllmserve")
    for where, code in changes:
        change(tmp_path, where, code)
    work = tmp_path / "work"
    work.mkdir()
    (work / page.name).write_text("\n".join(script), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, page.name],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr


def change(root: Path, where: Mapping[str, str], code: str) -> None:
    """Do to a copy of the package what a block says.

    ``python file=PATH`` is a new file; ``python catalog=TABLE`` goes to the end of a table of
    dllmserve/catalog.py; ``python edit=PATH before=LINE`` goes before the one line that begins so,
    and ``python edit=PATH instead=LINE`` replaces it. Blank lines around that line stay.
    """
    if "file" in where:
        path = root / where["file"]
        assert not path.exists(), path
        path.write_text(code + "\n", encoding="utf-8")
    elif "catalog" in where:
        path = root / "dllmserve" / "catalog.py"
        head, table, rest = path.read_text(encoding="utf-8").partition(
            f"\n{where['catalog']} = Catalog("
        )
        entries, end, tail = rest.partition("\n    },\n)")
        assert table and end, where
        path.write_text(
            f"{head}{table}{entries}\n{indent(code, ' ' * 8)}{end}{tail}", encoding="utf-8"
        )
    else:
        path = root / where["edit"]
        lines = path.read_text(encoding="utf-8").splitlines()
        begin = where.get("before") or where["instead"]
        (index,) = [i for i, line in enumerate(lines) if line.strip().startswith(begin)]
        old = lines[index]
        new = indent(code, old[: len(old) - len(old.lstrip())]).splitlines()
        if "before" in where:
            new += [old] if lines[index - 1] else ["", old]
        lines[index : index + 1] = new
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


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


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("architecture*.md")), ids=ids)
def test_files_that_the_architecture_names_exist(page: Path) -> None:
    for name in re.findall(r"`([\w/]+\.py)`", page.read_text(encoding="utf-8")):
        found = (ROOT / name).is_file() or (ROOT / "dllmserve" / name).is_file()
        assert found, f"{page.name} names {name}"


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
