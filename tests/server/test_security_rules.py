"""Nothing that comes from outside is unpickled, evaluated or handed to a shell."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "dllmserve"
FILES = sorted(PACKAGE.rglob("*.py"))

#: modules that turn bytes into objects of any kind, or run them
MODULES = {
    *("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"),
    *("copyreg", "xmlrpc", "jsonpickle"),
}
#: calls with the same effect, by the end of their dotted name
CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("torch.load", "torch.save", "torch.package", "np.load", "numpy.load", "pandas.read_pickle"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"),
    *("os.system", "os.popen", "subprocess.getoutput"),
    *("multiprocessing.Queue", "multiprocessing.Pipe", "multiprocessing.Pool"),
    *("multiprocessing.Manager", "multiprocessing.SimpleQueue"),
}


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of an attribute or a name, else ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def findings(source: str) -> Iterator[str]:
    """What is not allowed in a source text.

    A connection of multiprocessing may send and receive bytes, but no objects, which it pickles.
    """
    connects = "multiprocessing.connection" in source
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (name for name in names if name.split(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in CALLS:
                yield name
            if connects and isinstance(node.func, ast.Attribute) and node.func.attr == "recv":
                yield "Connection.recv"
            if any(k.arg == "shell" or k.arg == "allow_pickle" for k in node.keywords):
                yield f"{name}(shell or allow_pickle)"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    assert list(findings(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from dill import loads",
        "import torch\ntorch.load(path)",
        "eval(text)",
        "import yaml\nyaml.load(text)",
        "subprocess.run(command, shell=True)",
        "np.load(file, allow_pickle=True)",
        "from multiprocessing.connection import Client\nClient(path).recv()",
        "queue = multiprocessing.Queue()",
    ],
)
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert list(findings(source))


def test_harmless_code_is_let_through() -> None:
    source = "import yaml\nyaml.safe_load(t)\nmodel.eval()\nre.compile(t)\nmsgspec.json.decode(t)"
    assert list(findings(source)) == []
