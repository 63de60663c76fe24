"""Items: the held-out set, files of JSON lines, and errors that name the line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dllmserve.errors import ConfigError
from dllmserve.tools.evaluation.items import Item, held_out, read_items, select


def write(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_read(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    path = write(
        tmp_path / "sums.v2.jsonl",
        {"prompt": "1 + 1?", "answer": "2"},
        "",
        {"messages": talk, "answer": ["4", "four"], "task": "talk", "gen_length": 8, "id": "x"},
        {"prompt": "line\u2028separator", "answer": "3", "id": 7, "meta": {"any": "thing"}},
    )
    first, second, third = read_items(path, "exact")
    assert first == Item("1", "sums", ({"role": "user", "content": "1 + 1?"},), ("2",), "exact")
    assert second.messages == tuple(talk) and second.prompt == "2 + 2?"
    assert (second.answers, second.task, second.gen_length) == (("4", "four"), "talk", 8)
    assert second.is_right(" four ") and not second.is_right("five")
    assert (third.id, third.prompt) == ("7", "line\u2028separator")


def test_read_packed(tmp_path: Path) -> None:
    path = tmp_path / "packed.jsonl.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"prompt": "a", "answer": "b"}\n'))
    (item,) = read_items(path)
    assert item.task == "packed"


BAD_LINES: list[tuple[Any, str, str]] = [
    ("{", "exact", "not JSON: Expecting property name"),
    ("[1]", "exact", r"must be a JSON object, got \[1\]"),
    ({"prompt": "a"}, "exact", 'has no "answer"'),
    ({"answer": "a"}, "exact", 'needs "prompt" or "messages", has neither'),
    ({"prompt": "a", "messages": [], "answer": "a"}, "exact", "has both"),
    ({"prompt": " ", "answer": "a"}, "exact", '"prompt" must be a text that is not empty'),
    ({"prompt": 3, "answer": "a"}, "exact", '"prompt" must be a text that is not empty, got 3'),
    ({"prompt": "a", "answer": 3}, "exact", '"answer" must be a text or a list of texts, got 3'),
    ({"prompt": "a", "answer": []}, "exact", '"answer" must be a text or a list of texts, got'),
    ({"prompt": "a", "answer": ["b", 3]}, "exact", "a list of texts, got 3"),
    ({"prompt": "a", "answer": ""}, "exact", "an answer is empty"),
    ({"prompt": "a", "answer": "b"}, "number", "needs an answer with a number, got 'b'"),
    ({"prompt": "a", "answer": "b", "gen_length": 0}, "exact", r"gen_length must be .* got 0"),
    ({"prompt": "a", "answer": "b", "gen_length": "8"}, "exact", "gen_length must be an integer"),
    (
        {"prompt": "a", "answer": "b", "gen_lenght": 8},
        "exact",
        "unknown field 'gen_lenght'; did you mean 'gen_length'",
    ),
    ({"prompt": "a", "answer": "b", "level": 8}, "exact", "'level'; others go into meta; the fie"),
    ({"prompt": "a", "answer": "b", "task": 1}, "exact", '"task" must be a text'),
    ({"prompt": "a", "answer": "b", "id": True}, "exact", '"id" must be a text'),
    ({"prompt": "a", "answer": "b", "id": "1"}, "exact", "id '1' is that of line 1 too"),
    ({"messages": "hi", "answer": "b"}, "exact", '"messages" must be a list of messages'),
    ({"messages": [{"role": "user"}], "answer": "b"}, "exact", 'a message needs a "role" and'),
]


@pytest.mark.parametrize(("line", "match", "message"), BAD_LINES, ids=lambda v: str(v)[:40])
def test_bad_lines(tmp_path: Path, line: Any, match: str, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", {"prompt": "fine", "answer": "2"}, line)
    with pytest.raises(ConfigError, match=rf"bad\.jsonl:2: .*{message}"):
        read_items(path, match)


def test_conversations_need_the_template(tmp_path: Path) -> None:
    talk = {"messages": [{"role": "user", "content": "a"}], "answer": "b"}
    path = write(tmp_path / "talk.jsonl", talk)
    assert len(read_items(path)) == 1
    with pytest.raises(
        ConfigError, match=r'talk\.jsonl:1: "messages" need the chat template: drop'
    ):
        read_items(path, raw=True)


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no items"):
        read_items(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
        read_items(tmp_path / "bytes.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 50)[:20])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_items(tmp_path / "cut.jsonl.gz")
    with pytest.raises(OSError, match="No such file"):
        read_items(tmp_path / "missing.jsonl")
    with pytest.raises(ConfigError, match="match must be one of 'exact', 'contains'"):
        read_items(tmp_path / "empty.jsonl", "fuzzy")


def test_select() -> None:
    items = held_out()
    assert len(select(items)) == 2800
    few = select(items, ["word", "needle"], 3)
    tasks = dict.fromkeys(item.task for item in few)
    assert "word" in tasks and len(tasks) == 8 and len(few) == 24
    assert [item.id for item in select(items, ["needle-4"], 2)] == ["needle-4/1", "needle-4/2"]


@pytest.mark.parametrize(
    ("tasks", "limit", "message"),
    [
        (["wrod"], None, "there is no task 'wrod'; did you mean 'word'\\? the tasks are arith, w"),
        (["word", "qqqq"], None, "there is no task 'qqqq'; the tasks are arith"),
        ([], 0, "limit must be an integer >= 1, got 0"),
    ],
)
def test_select_what_is_not_there(tasks: list[str], limit: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(held_out(), tasks, limit)
