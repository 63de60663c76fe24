"""What the processes that we start find in their environment."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dllmserve import _environment
from dllmserve._environment import (
    SECRETS,
    child_environment,
    forget_secrets,
)
from dllmserve.config import CODE_VARIABLE, remote_code_forbidden
from dllmserve.errors import ConfigError
from dllmserve.process import worker

PACKAGE = Path(__file__).parents[2] / "dllmserve"
#: what starts a process, by the end of its name
STARTS = ("Popen", "run", "call", "check_call", "check_output", "create_subprocess_exec")
OTHERS = ("posix_spawn", "posix_spawnp", "execv", "execve", "execvp", "execvpe", "spawnv", "fork")


def starts(source: str) -> list[ast.Call]:
    """Calls that start a process."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            module = ast.unparse(node.func.value)
            if "subprocess" in module + node.func.attr and node.func.attr in STARTS:
                found.append(node)
            if module in ("os", "pty") and node.func.attr in OTHERS:
                found.append(node)
            if module.startswith("multiprocessing") and node.func.attr in ("Process", "Pool"):
                found.append(node)
    return found


def test_every_process_gets_an_environment_without_secrets() -> None:
    count = 0
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for call in starts(source):
            count += 1
            given = [ast.unparse(k.value) for k in call.keywords if k.arg == "env"]
            assert given and "child_environment(" in source, (path, call.lineno)
            assert given[0] == "environment" or given[0].startswith("child_environment("), given
        assert "{**os.environ" not in source.replace(" ", ""), path
    assert count == 2
    assert len(starts("import os, subprocess\nsubprocess.run(x)\nos.fork()")) == 2


def test_secrets_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "alice=0123456789abcdef")
    monkeypatch.setenv("DLLMSERVE_PORT", "9000")
    found = child_environment({"A": "1"}, {"A": "2"})
    assert not set(SECRETS) & set(found)
    assert (found["A"], found["DLLMSERVE_PORT"]) == ("2", "9000")
    assert set(SECRETS) <= set(os.environ)


FORGET = """
import os
from dllmserve._environment import forget_secrets
forget_secrets()
assert "DLLMSERVE_API_KEYS" not in os.environ and os.environ["KEPT"] == "yes"
print(open("/proc/self/environ").read().replace(chr(0), " "))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_secrets_are_forgotten() -> None:
    """Also in what the system shows of the environment that the process was started with."""
    given = {**os.environ, "DLLMSERVE_API_KEYS": "alice=SECRET-0123456789", "KEPT": "yes"}
    command = [sys.executable, "-c", FORGET]
    shown = subprocess.run(command, env=given, capture_output=True, text=True, check=True).stdout
    assert "KEPT=yes" in shown and "SECRET" not in shown


def test_nothing_to_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_environment.sys, "platform", "darwin")
    monkeypatch.setenv("DLLMSERVE_API_KEY", "0123456789abcdef")
    forget_secrets()
    assert not set(SECRETS) & set(os.environ)


def test_the_switch_for_code_of_checkpoints() -> None:
    name = CODE_VARIABLE
    assert [remote_code_forbidden({name: text}) for text in ("0", "False", "off", "no")] == [
        True
    ] * 4
    assert not any(remote_code_forbidden({name: text}) for text in ("1", "TRUE", "on", "yes"))
    assert not remote_code_forbidden({})
    for wrong in ("", "2", "never"):
        with pytest.raises(ConfigError, match=f"{name} must be true or false, got '{wrong}'"):
            remote_code_forbidden({name: wrong})


def test_workers_find_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a source tree; where it is installed, nothing comes before the standard library."""
    monkeypatch.setenv("PYTHONPATH", "/given")
    assert worker._source() == {"PYTHONPATH": f"{PACKAGE.parent}{os.pathsep}/given"}
    monkeypatch.setattr(worker, "__file__", "/lib/site-packages/dllmserve/process/worker.py")
    assert worker._source() == {}
