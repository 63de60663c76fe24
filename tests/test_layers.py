"""Who may import whom, how large files get, and other rules that hold for all of the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dllmserve"
FILES = sorted(PACKAGE.rglob("*.py"))

#: layers from low to high, by the first part of a module's name inside the package;
#: a module imports its own layer and lower ones
LAYERS = (
    (
        "errors",
        "foreign",
        "catalog",
        "_checks",
        "_each",
        "_combinations",
        "_lengths",
        "_environment",
        "_needs",
        "_plugins",
        "_settings",
        "_stepwise",
        "_system",
        "_values",
        "config",
        "cores",
        "holes",
        "knobs",
        "messages",
        "presets",
        "sampling_params",
        "sparse",
        "outputs",
        "assets",
    ),
    ("constraints",),
    ("core",),
    ("device", "parallel"),
    ("cache", "decoding"),
    ("kernels",),
    ("layers",),
    ("models",),
    ("attention",),
    ("runtime",),
    ("process",),
    ("engine",),
    ("decisions",),
    ("llm", "async_engine", "async_llm"),
    ("tools",),
    ("bench", "evaluation", "lm_eval"),
    ("server",),
    ("cli",),
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
#: layers that must work without torch
HOST_ONLY = {*LAYERS[0], "core", "cache"}
#: the package's front door may name anything, lazily or for type checkers
FRONT_DOOR = ("__init__", "__main__")


def part_of(path: Path) -> str:
    """First part of a file's module name inside the package."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every import, those inside functions and TYPE_CHECKING included."""
    package = ("dllmserve", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) + "." if node.level else ""
            module = base + (node.module or "")
            if module == "dllmserve":  # from dllmserve import x
                yield from ((node.lineno, f"dllmserve.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def test_every_file_has_a_layer() -> None:
    assert {part_of(path) for path in FILES} <= {*RANK, *FRONT_DOOR}


#: names that the front door hands out
EXPORTS = {"LLM": "llm", "SamplingParams": "sampling_params", "SparseConfig": "sparse"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_layer_imports_a_higher_one(path: Path) -> None:
    own = part_of(path)
    if own in FRONT_DOOR:
        return
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] != "dllmserve" or len(parts) < 2 or parts[1].startswith("__version"):
            continue
        target = EXPORTS.get(parts[1], parts[1])
        assert RANK.get(target, len(LAYERS)) <= RANK[own], f"{path}:{line} imports {name}"


def graph() -> dict[str, set[str]]:
    """Which of the package's files each of them imports, by module name."""
    names = {path: module_name(path) for path in FILES}
    known, edges = set(names.values()), {}
    for path, name in names.items():
        found = {module for _, module in imported_files(path)}
        edges[name] = {module for module in found if module in known} - {name}
    return edges


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imported_files(path: Path) -> Iterator[tuple[int, str]]:
    """As :func:`imports`, and for ``from package import x`` also ``package.x``, were it a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
    yield from imports(path)


def in_circles(edges: dict[str, set[str]]) -> set[str]:
    """What is left when all is taken away that imports, or is imported by, nothing that is left."""
    left = set(edges)
    while True:
        imported = {target for name in left for target in edges[name] & left}
        stays = {name for name in left & imported if edges[name] & left}
        if stays == left:
            return left
        left = stays


def test_no_circles_of_imports() -> None:
    """Between files, however they import each other: in functions and for types alone as well."""
    edges = graph()
    assert len(edges["dllmserve.llm"]) > 5
    front = {name for name in edges if name.rpartition(".")[2] in ("dllmserve", "__main__")}
    inside = {name: found - front for name, found in edges.items() if name not in front}
    assert in_circles(inside) == set()


def test_circles_are_really_found() -> None:
    edges = {"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": {"e"}, "e": set(), "f": {"a"}}
    assert in_circles(edges) == {"b", "c"}
    edges["c"] = {"e"}
    assert in_circles(edges) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_host_layers_import_no_torch(path: Path) -> None:
    if part_of(path) in HOST_ONLY:
        heavy = {"torch", "numpy", "safetensors", "transformers"}
        assert not heavy & {name.split(".")[0] for _, name in imports(path)}


def test_decoding_knows_no_requests() -> None:
    """Rules and statistics are functions of tensors alone."""
    for path in sorted((PACKAGE / "decoding").glob("*.py")):
        own = {name for _, name in imports(path) if name.startswith("dllmserve.")}
        own -= {"dllmserve.sampling_params"}  # the order of the numbers that they read
        # which part of a row of logits they are given
        own -= {"dllmserve.parallel.group", "dllmserve.parallel.vocab"}
        assert all(name.startswith("dllmserve.decoding") for name in own), path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_print_no_global_no_swallowed_errors(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Global), f"{path}:{node.lineno} uses global"  # type: ignore[attr-defined]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "breakpoint", "exit"), f"{path}:{node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno} catches everything"
            silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            assert not silent, f"{path}:{node.lineno} swallows an error"


def test_sizes() -> None:
    command = [sys.executable, str(ROOT / "tools" / "check_sizes.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_sizes_are_really_checked(tmp_path: Path) -> None:
    """A copy of the tool, beside files that are too long, says so."""
    (tmp_path / "tools").mkdir()
    tool = tmp_path / "tools" / "check_sizes.py"
    tool.write_text((ROOT / "tools" / "check_sizes.py").read_text())
    (tmp_path / "long_file.py").write_text("x = 1\n" * 501)
    (tmp_path / "long_function.py").write_text("def f():\n" + "    x = 1\n" * 60)
    (tmp_path / "fine.py").write_text("def f():\n" + "    x = 1\n" * 59)
    command = [sys.executable, str(tool)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "long_file.py: 501 lines, at most 500",
        "long_function.py:1: f has 61 lines, at most 60",
    ]
