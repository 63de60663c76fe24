"""Where prompts come from."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from dllmserve.cli.prompts import DEMO_PROMPTS, read_prompts
from dllmserve.errors import PromptError


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _stdin(monkeypatch: pytest.MonkeyPatch, text: str, *, terminal: bool = False) -> None:
    monkeypatch.setattr(sys, "stdin", _Terminal(text) if terminal else io.StringIO(text))


def test_arguments() -> None:
    assert read_prompts(["a", "b c"], None, False) == ["a", "b c"]


def test_piped_text_is_one_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    _stdin(monkeypatch, "Solve this:\n12\n21\n")
    assert read_prompts([], None, False) == ["Solve this:\n12\n21"]


def test_arguments_leave_stdin_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _stdin(monkeypatch, "unread")
    assert read_prompts(["a"], None, False) == ["a"]
    assert sys.stdin.read() == "unread"


def test_terminal_gets_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    _stdin(monkeypatch, "", terminal=True)
    assert read_prompts([], None, False) == list(DEMO_PROMPTS)


def test_demo_option(monkeypatch: pytest.MonkeyPatch) -> None:
    _stdin(monkeypatch, "")
    assert read_prompts([], None, True) == list(DEMO_PROMPTS)
    assert read_prompts(["mine"], None, True) == [*DEMO_PROMPTS, "mine"]


def test_file_has_a_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("one\r\n\n  two ü\n\n".encode())
    assert read_prompts(["zero"], str(path), False) == ["zero", "one", "  two ü"]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_byte_order_mark_is_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    lines = ['"The people"', '"The \ufeff president"'] if name == "p.jsonl" else ["The people", "x"]
    (tmp_path / name).write_text("\r\n".join(lines), encoding="utf-8-sig")
    found = read_prompts([], str(tmp_path / name), False)
    assert found[0] == "The people"
    assert found[1] == ("The \ufeff president" if name == "p.jsonl" else "x")
    _stdin(monkeypatch, "\ufeffThe people\n")
    assert read_prompts([], None, False) == ["The people"]
    _stdin(monkeypatch, "\ufeffThe people\n")
    assert read_prompts([], "-", False) == ["The people"]


def test_file_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    _stdin(monkeypatch, "a\nb\n")
    assert read_prompts([], "-", False) == ["a", "b"]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps("two\nlines") + "\n" + json.dumps({"prompt": "b", "text": "x"}))
    assert read_prompts([], str(path), False) == ["two\nlines", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", ":1 is not JSON"),
        ('"a"\n{"text": "x"}', ":2 must be a JSON string"),
        ("7", ":1 must"),
        ('{"prompt": "a", "max_tokens": 3}', ":1 sets max_tokens, which is not read from here"),
    ],
)
def test_bad_json_lines(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(PromptError, match=message):
        read_prompts([], str(path), False)


def test_empty_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _stdin(monkeypatch, "\n")
    with pytest.raises(PromptError, match="standard input is empty; give a PROMPT"):
        read_prompts([], None, False)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(PromptError, match="holds no prompt"):
        read_prompts([], str(tmp_path / "empty.txt"), False)
    with pytest.raises(PromptError, match="prompt 2 is empty"):
        read_prompts(["a", " "], None, False)
    with pytest.raises(PromptError, match="the prompt is empty"):
        read_prompts([""], None, False)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(PromptError, match="is not UTF-8"):
        read_prompts([], str(tmp_path / "latin.txt"), False)
    with pytest.raises(PromptError, match="is not UTF-8"):
        read_prompts(["caf\udce9"], None, False)
