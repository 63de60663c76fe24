"""``python -m dllmserve`` is the same as ``dllmserve``, exit code included."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["serve", "nowhere"], 1)])
def test_the_exit_code_is_that_of_the_command(arguments: list[str], code: int) -> None:
    command = [sys.executable, "-m", "dllmserve", *arguments]
    if arguments[0] == "serve":
        command += ["--port", "0", "--job-store", "memory"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == code, ended.stderr
    assert ("error: " in ended.stderr) == (code != 0)
