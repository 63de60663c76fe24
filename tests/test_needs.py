"""What is said where a module is missing: a command that works, or a system that does."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

import dllmserve
from dllmserve import _needs, _system
from dllmserve._needs import install, missing
from dllmserve.cli.main import main
from dllmserve.errors import ConfigError

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("extra", ["server", "bench", "lm-eval"])
def test_an_extra_is_told_by_its_packages(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named = (line.replace("'", '"') for line in EXTRAS[extra])
    wanted = "pip install " + " ".join(f"'{line}'" for line in named)
    lines = [
        f'{line}{" and" if ";" in line else ";"} extra == "{name}"'
        for name in EXTRAS
        for line in EXTRAS[name]
    ]
    monkeypatch.setattr(_needs, "requires", lambda _: ["torch>=2.9", *lines])
    assert install(extra) == wanted
    assert missing("it", "fastapi.routing", extra).startswith("it needs fastapi, which the extra")


def test_a_clone_that_was_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_needs, "requires", unknown)
    assert install("server") == "pip install -e '.[server]'"


@pytest.mark.parametrize("hidden", ["fcntl", "resource", "_sqlite3", "_ssl"])
def test_what_no_package_brings_is_not_to_be_installed(hidden: str) -> None:
    """As on Windows, or with a Python that was built without a part of it."""
    code = (
        f"import sys; sys.modules[{hidden!r}] = None; "
        "from dllmserve.cli.main import main; sys.exit(main(['serve', '--port', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert hidden in said and "it runs on Linux or macOS" in said and "pip" not in said


def test_a_package_that_is_missing() -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None; "
        "from dllmserve.cli.main import main; sys.exit(main(['serve', '--port', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "the server needs uvicorn, which the extra 'server' brings: pip" in done.stderr


def test_windows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_system, "sys", SimpleNamespace(platform="win32"))
    with pytest.raises(ConfigError, match="runs on Linux or macOS"):
        _ = dllmserve.LLM
    assert main(["generate", "Hello"]) == 1
    assert "on Windows: in WSL or a container" in capsys.readouterr().err
