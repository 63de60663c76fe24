"""``dllmserve generate`` in a pipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from dllmserve import LLM, SamplingParams
from dllmserve.cli.main import main
from dllmserve.cli.prompts import DEMO_PROMPTS

Run = Callable[..., CompletedProcess[str]]
SHORT = ("--gen-length", "8", "--block-length", "4")


@pytest.fixture(scope="module")
def answer(checkpoint: Path) -> Callable[[str], dict[str, Any]]:
    """What the library answers with the same settings, through the chat template."""
    llm = LLM(str(checkpoint))
    params = SamplingParams(temperature=0.0, gen_length=8, block_length=4, quality="balanced")

    def ask(prompt: str) -> dict[str, Any]:
        return llm.chat([{"role": "user", "content": prompt}], params, use_tqdm=False)[0]

    return ask


def _main(capfd: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    code = main([str(a) for a in args])
    out, err = capfd.readouterr()
    return code, out, err


def test_only_the_answer_is_printed(
    run: Run, checkpoint: Path, answer: Callable[[str], dict[str, Any]]
) -> None:
    result = run("generate", "--model", checkpoint, *SHORT, "Hello")
    assert result.returncode == 0
    assert result.stdout == answer("Hello")["text"] + "\n"
    assert result.stderr == ""


def test_prompt_from_stdin(
    run: Run, checkpoint: Path, answer: Callable[[str], dict[str, Any]]
) -> None:
    result = run("generate", "--model", checkpoint, *SHORT, stdin="two\nlines é\n")
    assert result.stdout == answer("two\nlines é")["text"] + "\n"


@pytest.mark.parametrize("extra", [(), ("another",)], ids=["live", "batch"])
def test_the_demo_says_what_it_asks(run: Run, checkpoint: Path, extra: tuple[str, ...]) -> None:
    result = run("generate", "-m", checkpoint, *SHORT, "--ignore-eos", "--demo", *extra)
    asked = [*DEMO_PROMPTS, *extra]
    blocks = ["> " + "\n> ".join(prompt.split("\n")) + "\n" for prompt in asked]
    places = [result.stdout.find(block) for block in blocks]
    assert places == sorted(places) and places[0] == 0
    assert result.stderr == ""


def test_quality(capfd: pytest.CaptureFixture[str]) -> None:
    def forwards(*args: str) -> int:
        code, out, _ = _main(capfd, "generate", "--json", "Sort the numbers: 9 41 7", *args)
        assert code == 0
        line = json.loads(out)
        assert line["text"] == "7 9 41"
        count: int = line["usage"]["forward_passes"]
        return count

    assert forwards() < 4
    assert forwards("--quality", "exact") == 32
    assert forwards("--steps", "16") == 8


def test_json_schema(
    capfd: pytest.CaptureFixture[str],
    checkpoint: Path,
    answer: Callable[[str], dict[str, Any]],
) -> None:
    asked = ("one", "zwei ü", "3\n4")
    code, out, err = _main(capfd, "generate", "--model", checkpoint, *SHORT, "--json", *asked)
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [line["prompt"] for line in lines] == ["one", "zwei ü", "3\n4"]
    for line in lines:
        answered = ["text", "token_ids", "finish_reason", "usage", "steps"]
        assert list(line) == ["prompt", *answered, "seconds"]
        counts = {"prompt_tokens", "completion_tokens", "forward_passes", "cached_tokens", "edits"}
        assert set(line["usage"]) == counts
        assert line["seconds"] > 0
        wanted = answer(line["prompt"])
        assert {k: line[k] for k in wanted} == wanted


def test_many_prompts_from_a_file(
    run: Run, checkpoint: Path, tmp_path: Path, answer: Callable[[str], dict[str, Any]]
) -> None:
    prompts = [f"prompt {n}" for n in range(6)]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    result = run("generate", "-m", checkpoint, *SHORT, "--file", tmp_path / "p.txt", "--json")
    texts = [json.loads(line)["text"] for line in result.stdout.splitlines()]
    assert texts == [answer(p)["text"] for p in prompts]
    assert result.stderr == ""


def test_json_of_one_run_is_input_of_the_next(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    how = ("generate", "-m", checkpoint, *SHORT, "--json", "--logprobs", "2")
    _, first, _ = _main(capfd, *how, "a\nb", "c")
    (tmp_path / "again.jsonl").write_text(first)
    _, again, _ = _main(capfd, *how, "-f", tmp_path / "again.jsonl")
    drop = [{**json.loads(x), "seconds": 0} for x in first.splitlines()]
    assert len(drop) == 2
    assert drop == [{**json.loads(x), "seconds": 0} for x in again.splitlines()]


def test_chat_and_raw(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, raw_checkpoint: Path
) -> None:
    def prompt_tokens(*args: str | Path) -> int:
        code, out, _ = _main(capfd, "generate", *SHORT, "--json", "Hello", *args)
        assert code == 0
        tokens: int = json.loads(out)["usage"]["prompt_tokens"]
        return tokens

    framed = len("<user>Hello<assistant>")
    assert prompt_tokens("-m", checkpoint) == framed
    assert prompt_tokens("-m", checkpoint, "--chat") == framed
    assert prompt_tokens("-m", checkpoint, "--raw") == len("Hello")
    assert prompt_tokens("-m", raw_checkpoint) == len("Hello")
    code, _, err = _main(capfd, "generate", "-m", raw_checkpoint, "--chat", "Hello")
    assert (code, err.count("\n")) == (1, 1)
    assert "chat template" in err


def test_options_change_the_answer(capfd: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    def ids(*args: str) -> list[int]:
        code, out, _ = _main(capfd, "generate", "-m", checkpoint, "--json", "Hi", *args)
        assert code == 0
        found: list[int] = json.loads(out)["token_ids"]
        return found

    hot = ("--gen-length", "12", "--temperature", "2", "--ignore-eos")
    assert ids(*hot, "--seed", "1") == ids(*hot, "--seed", "1")
    assert ids(*hot, "--seed", "1") != ids(*hot, "--seed", "2")
    assert len(ids(*hot)) == 12
    assert len(ids("--gen-length", "8", "--sparse", "--ignore-eos")) == 8


def test_stop_strings(capfd: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    args = ("generate", "-m", checkpoint, "--json", "Hi", "--gen-length", "16", "--ignore-eos")
    text = json.loads(_main(capfd, *args)[1])["text"]
    stop = text[2]
    line = json.loads(_main(capfd, *args, "--stop", stop, "--stop", "never there")[1])
    assert line["finish_reason"] == "stop"
    assert line["text"] == text[: text.find(stop)]


def test_ascii_output(run: Run, checkpoint: Path) -> None:
    plain = run("generate", "-m", checkpoint, *SHORT, "Hi", PYTHONIOENCODING="ascii")
    assert plain.returncode == 0 and plain.stdout.isascii()
    line = run("generate", "-m", checkpoint, *SHORT, "Hé", "--json", PYTHONIOENCODING="ascii")
    assert line.stdout.isascii()
    assert json.loads(line.stdout)["prompt"] == "Hé"
