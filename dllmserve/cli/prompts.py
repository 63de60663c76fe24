"""Where prompts come from: arguments, a file, standard input, or the demo."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TextIO

from dllmserve._checks import user_path
from dllmserve._values import SparseConfig
from dllmserve.errors import PromptError
from dllmserve.sampling_params import SamplingParams

#: What the embedded model was made for.
DEMO_PROMPTS = (
    "Solve this 4x4 sudoku:\n1200\n0001\n2014\n0102",
    "Olga has 21 pears. Olga gives Anna 15 pears. Olga finds 57 pears. Then Olga gets 5 pears "
    "from Anna. How many pears does Olga have now?",
    "Extract name, color, city as JSON: Please meet Nora Fox. The front door is green. "
    "The home is in Lisbon.",
)
STDIN = "-"
#: what a line may not set
_SETTINGS = {f.name for kind in (SamplingParams, SparseConfig) for f in fields(kind)}
#: but what ``--json`` writes of an answer
_OF_ANSWERS = {"steps", "logprobs"}


def read_prompts(arguments: Sequence[str], file: str | None, demo: bool) -> list[str]:
    """The prompts of one call, checked to be text.

    Without any source, a piped standard input is one prompt, line breaks included; at a
    terminal the demo runs.

    Raises:
        PromptError: there is no prompt, or one is empty or not UTF-8.
    """
    found = list(DEMO_PROMPTS) if demo else []
    found += arguments
    if file is not None:
        found += _file_prompts(file)
    elif not found and sys.stdin is not None and not sys.stdin.isatty():
        found.append(_stdin_prompt())
    elif not found:
        found += DEMO_PROMPTS
    for number, prompt in enumerate(found, 1):
        _check(prompt, f"prompt {number}" if len(found) > 1 else "the prompt")
    return found


def _stdin_prompt() -> str:
    text = _read(sys.stdin, "standard input").strip("\r\n")
    if not text:
        raise PromptError(
            "no prompt: standard input is empty; give a PROMPT, --file FILE, or --demo"
        )
    return text


def _file_prompts(file: str) -> list[str]:
    """One prompt per non-empty line; in a .jsonl file each line is JSON."""
    if file == STDIN:
        text, name = _read(sys.stdin, "standard input"), "standard input"
    else:
        name = file
        with user_path(file).open(encoding="utf-8") as handle:
            text = _read(handle, file)
    # not splitlines(): a prompt may hold form feeds and Unicode line separators
    lines = [(n, line.rstrip("\r")) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise PromptError(f"{name} holds no prompt")
    if file.endswith(".jsonl"):
        return [_json_prompt(line, f"{file}:{number}") for number, line in lines]
    return [line for _, line in lines]


def _read(stream: TextIO, name: str) -> str:
    try:
        # some editors begin a file with a byte order mark, which is not part of its text
        return stream.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise PromptError(f"{name} is not UTF-8 text: {error.reason}") from error


def _json_prompt(line: str, place: str) -> str:
    """A JSON string, or the "prompt" of an object (as written by --json)."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"{place} is not JSON: {error.msg}") from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    settings = _SETTINGS & set(value) if isinstance(value, dict) else set[str]()
    if isinstance(value, dict) and "token_ids" in value:
        settings -= _OF_ANSWERS
    if settings:
        raise PromptError(
            f"{place} sets {', '.join(sorted(settings))}, which is not read from here: all prompts "
            "of a call are decoded alike, so give it as an option"
        )
    if not isinstance(prompt, str):
        raise PromptError(f'{place} must be a JSON string or an object with a text "prompt"')
    return prompt


def _check(prompt: str, name: str) -> None:
    if not prompt.strip():
        raise PromptError(f"{name} is empty")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        # bytes that are no text arrive as lone surrogates
        raise PromptError(f"{name} is not UTF-8 text") from error
