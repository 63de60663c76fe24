"""``dllmserve convert``."""

from __future__ import annotations

from pathlib import Path

import pytest

from dllmserve.cli.main import main

pytest.importorskip("gguf", reason="needs the extra gguf")

from tests.gguf_files import write


def test_a_file_is_converted_and_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.gguf", "Q8_0")
    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / "a.gguf"), str(out), "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert "LlamaForCausalLM in float32" in said
    assert f"dllmserve generate --model {out} Hello" in said
    assert main(["info", "-m", str(out), "--device", "cpu"]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.gguf", architecture="gemma")
    assert main(["convert", str(tmp_path / "a.gguf"), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "'gemma'" in said and said.count("\n") == 1
