"""Items: questions with their answers, from the embedded model's held-out set or a file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dllmserve.assets
from dllmserve._checks import check_choice, check_int
from dllmserve._values import MAX_GEN_LENGTH
from dllmserve.errors import ConfigError, DllmServeError
from dllmserve.tools.evaluation.judge import MATCHES, SCORER, check_answer, judge
from dllmserve.tools.text import read_lines

HELD_OUT = Path(dllmserve.assets.__file__).parent / "tiny" / "heldout.jsonl.gz"
#: of a line of a data file
FIELDS = ("prompt", "messages", "answer", "task", "gen_length", "id", "meta")


@dataclass(frozen=True)
class Item:
    """A question and what answers it.

    Attributes:
        id: unique among the items of a run.
        task: figures are given for each task.
        messages: the conversation up to the answer; a plain prompt is one user message.
        answers: accepted answers.
        match: how a text is held against them, see :mod:`dllmserve.tools.evaluation.judge`.
        gen_length: length of the generated answer in tokens; None leaves it to the setting.
    """

    id: str
    task: str
    messages: tuple[Mapping[str, str], ...]
    answers: tuple[str, ...]
    match: str
    gen_length: int | None = None

    @property
    def prompt(self) -> str:
        """The last message."""
        return self.messages[-1]["content"]

    def is_right(self, text: str) -> bool:
        """Whether a generated text answers the question."""
        return judge(self.match, self.task, self.prompt, self.answers, text)


def held_out() -> list[Item]:
    """The embedded model's held-out items: 200 for each of 14 tasks, judged by exact scorers.

    Example:
        >>> held_out()[0].prompt
        'Compute 423 - 182 step by step.'
    """
    return _read(HELD_OUT, SCORER, raw=False)


def read_items(path: str | Path, match: str = "exact", *, raw: bool = False) -> list[Item]:
    """Items of a file of JSON lines; ``.gz`` is unpacked.

    A line has ``prompt`` (a text) or ``messages`` (a conversation), and ``answer`` (a text or
    a list of accepted texts). It may have ``task`` (default: the file's name), ``gen_length``,
    ``id`` (default: the line's number) and ``meta``, which nothing reads.

    Args:
        path: the file.
        match: how answers are judged: "exact", "contains", "number" or "json".
        raw: the prompts will be sent without a chat template, so ``messages`` are refused.

    Raises:
        ConfigError: a line is wrong; the message names file, line and what is wrong.
        OSError: the file cannot be read.
    """
    check_choice(ConfigError, "match", match, MATCHES)
    return _read(path, match, raw)


def _read(path: str | Path, match: str, raw: bool) -> list[Item]:
    task = Path(path).name.partition(".")[0] or Path(path).name
    found: dict[str, int] = {}
    items = []
    for number, line in read_lines(path):
        try:
            item = _item(line, match, raw, default_id=str(number), default_task=task)
            if item.id in found:
                raise ConfigError(f"id {item.id!r} is that of line {found[item.id]} too")
        except DllmServeError as error:
            raise ConfigError(f"{path}:{number}: {error}") from error
        found[item.id] = number
        items.append(item)
    if not items:
        raise ConfigError(f"{path} holds no items: give one JSON object a line")
    return items


def select(
    items: Sequence[Item], tasks: Sequence[str] = (), limit: int | None = None
) -> list[Item]:
    """The items of some tasks, at most ``limit`` of each, in their order.

    Args:
        items: to choose from.
        tasks: names of tasks; the part before a hyphen stands for all of them, such as
            "needle" for "needle-4" and "needle-8". Empty for all.
        limit: items of a task; None for all.

    Raises:
        ConfigError: there is no such task, or the limit is below 1.
    """
    if limit is not None:
        check_int(ConfigError, "limit", limit, 1)
    known = dict.fromkeys(item.task for item in items)
    for name in tasks:
        _check_task(name, known)
    counts = dict.fromkeys(known, 0)
    chosen = []
    for item in items:
        if tasks and not any(_is_of(item.task, name) for name in tasks):
            continue
        if limit is None or counts[item.task] < limit:
            chosen.append(item)
            counts[item.task] += 1
    return chosen


def _is_of(task: str, name: str) -> bool:
    return name in (task, task.partition("-")[0])


def _check_task(name: str, known: Mapping[str, Any]) -> None:
    if any(_is_of(task, name) for task in known):
        return
    hint = _nearest(name, known)
    raise ConfigError(f"there is no task {name!r}; {hint}the tasks are {', '.join(known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}? " if near else ""


def _item(line: str, match: str, raw: bool, *, default_id: str, default_task: str) -> Item:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"must be a JSON object, got {_kind(value)}")
    for name in value:
        if name not in FIELDS:
            hint = _nearest(name, FIELDS) or "others go into meta; "
            raise ConfigError(f"unknown field {name!r}; {hint}the fields are {', '.join(FIELDS)}")
    answers = _answers(value)
    for answer in answers:
        check_answer(match, answer)
    gen_length = value.get("gen_length")
    if gen_length is not None:
        check_int(ConfigError, "gen_length", gen_length, 1, MAX_GEN_LENGTH)
    return Item(
        id=_text(value, "id", default_id, numbers=True),
        task=_text(value, "task", default_task),
        messages=_messages(value, raw),
        answers=answers,
        match=match,
        gen_length=gen_length,
    )


def _messages(value: Mapping[str, Any], raw: bool) -> tuple[Mapping[str, str], ...]:
    if ("prompt" in value) == ("messages" in value):
        has = "both" if "prompt" in value else "neither"
        raise ConfigError(f'needs "prompt" or "messages", has {has}')
    if "prompt" in value:
        return _user(_text(value, "prompt", ""))
    if raw:
        raise ConfigError('"messages" need the chat template: drop --raw, or give a "prompt"')
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f'"messages" must be a list of messages, got {_kind(messages)}')
    for message in messages:
        parts = [message.get(k) for k in ("role", "content")] if isinstance(message, dict) else []
        if len(parts) < 2 or not all(isinstance(part, str) for part in parts):
            raise ConfigError(f'a message needs a "role" and a text "content", got {message!r}')
    return tuple(messages)


def _user(prompt: str) -> tuple[Mapping[str, str], ...]:
    return ({"role": "user", "content": prompt},)


def _answers(value: Mapping[str, Any]) -> tuple[str, ...]:
    if "answer" not in value:
        raise ConfigError('has no "answer"')
    given = value["answer"]
    answers = given if isinstance(given, list) else [given]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        wrong = next((a for a in answers if not isinstance(a, str)), given)
        raise ConfigError(f'"answer" must be a text or a list of texts, got {_kind(wrong)}')
    return tuple(answers)


def _text(value: Mapping[str, Any], name: str, default: str, *, numbers: bool = False) -> str:
    found = value.get(name, default)
    if numbers and isinstance(found, int) and not isinstance(found, bool):
        return str(found)
    if not isinstance(found, str) or not found.strip():
        raise ConfigError(f'"{name}" must be a text that is not empty, got {_kind(found)}')
    return found


def _kind(value: Any) -> str:
    """A JSON value for an error, short."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
