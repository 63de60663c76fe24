"""Reports: tables, the record and what is drawn from it."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dllmserve.errors import ConfigError
from dllmserve.tools.evaluation.figures import Measured, Outcome, summarise
from dllmserve.tools.evaluation.items import Item
from dllmserve.tools.evaluation.plot import frontier, plot_report
from dllmserve.tools.evaluation.report import EvalReport, data_of, read_report
from dllmserve.tools.evaluation.settings import Setting, make_setting, suite

ENVIRONMENT = {
    "versions": {"dllmserve": "0"},
    "device": {"name": "a machine"},
    "dtype": "float32",
    "model": {"name": "some-model"},
    "options": {},
    "header": {"model": "some-model (Kind)", "device": "a machine, float32"},
}


def measured(setting: Setting, rights: str, forwards: int) -> Measured:
    """One outcome per character: right if it is "1", without an end if it is "c"."""
    outcomes = [
        Outcome(
            item=Item(
                str(n), f"task-{n % 2}", ({"role": "user", "content": "?"},), ("1",), "exact"
            ),
            text=mark,
            right=mark == "1",
            finish_reason="length" if mark == "c" else "stop",
            usage={"prompt_tokens": 5, "completion_tokens": 32, "forward_passes": forwards},
        )
        for n, mark in enumerate(rights)
    ]
    return Measured(setting, outcomes, 1.5)


def report(found: Sequence[Measured], **more: Any) -> EvalReport:
    items = [outcome.item for outcome in found[0].outcomes]
    return EvalReport(
        environment=ENVIRONMENT,
        data=data_of("some.jsonl", items, "exact", None, raw=False),
        items=[item.id for item in items],
        baseline=found[0].setting.name,
        settings=summarise(found, found[0].setting.name),
        **more,
    )


def several() -> EvalReport:
    fast = make_setting("fast", {"unmask": "threshold", "cache": "dual"})
    worse = make_setting("[bold]worse", {"tokens_per_step": 8})
    return report(
        [
            measured(Setting("careful"), "1111111111", 32),
            measured(fast, "1111111110", 4),
            measured(worse, "1100000000", 8),
        ]
    )


def shown(found: EvalReport) -> list[str]:
    console = Console(file=io.StringIO(), width=200)
    console.print(found.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [line.rstrip() for line in text.splitlines()]


def test_table_of_several_settings() -> None:
    lines = shown(several())
    careful, fast, worse = (
        line.split() for line in lines if line.split()[:1] in (["1"], ["2"], ["3"])
    )
    assert careful[:6] == ["1", "careful", "100.0", "72.2-100.0", "the", "baseline"]
    assert fast[:4] == ["2", "fast", "90.0", "59.6-98.2"]
    assert "-10.0 (-30.9, +14.3)" in " ".join(fast) and "12.5" in fast and "8.00" in fast
    assert worse[1] == "[bold]worse"
    tasks = [line for line in lines if line.startswith("task-")]
    assert tasks[0].split() == [
        "task-0",
        "5",
        "100.0",
        "(56.6-100.0)",
        "100.0",
        "(56.6-100.0)",
        "20.0",
        "(3.6-62.4)",
    ]


def test_table_of_one_setting() -> None:
    lines = shown(report([measured(Setting("careful"), "1110", 32)]))
    assert lines[3].split()[:3] == ["task-0", "2", "100.0"]
    assert lines[-1].split() == ["all", "4", "75.0", "30.1-95.4", "32.0", "1.00", "85.3"]


def test_header_and_notes() -> None:
    found = report([measured(Setting("careful"), "11c0", 32)], interrupted=True)
    text = " ".join(found.header().split())
    assert "4 items in 2 tasks, some.jsonl; chat template, judged by exact" in text
    assert "setting careful" in text
    assert "interrupted: settings are missing" in text
    assert "1 of 4 answers of 'careful' filled gen_length without an end" in text
    assert several().notes() == []


def test_round_trip(tmp_path: Path) -> None:
    found, path = several(), tmp_path / "eval.json"
    path.write_text(json.dumps(found.record()))
    again = read_report(path)
    assert again == read_report(path) and again.record() == json.loads(json.dumps(found.record()))
    assert shown(again) == shown(found) and again.header() == found.header()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("text", "is not JSON"),
        ({"benchmark": "serve"}, "holds no evaluation: give a file of dllmserve eval --json"),
        ({"schema": 99}, "has schema 99, and this version reads 1"),
        ({"settings": []}, "holds no settings"),
        ({"settings": [{"name": "a"}]}, "is incomplete: Object missing required field `given`"),
        ({"items": ...}, "is incomplete: Object missing required field `items`"),
    ],
    ids=str,
)
def test_records_that_cannot_be_read(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "eval.json"
    record = several().record()
    if isinstance(change, dict):
        record = {k: v for k, v in {**record, **change}.items() if v is not ...}
        path.write_text(json.dumps(record))
    else:
        path.write_text(change)
    with pytest.raises(ConfigError, match=message):
        read_report(path)


def test_frontier() -> None:
    names = [result.name for result in frontier(several().settings)]
    assert names == ["fast", "careful"]
    equal = [measured(Setting(name), "11", n) for name, n in (("a", 8), ("b", 4), ("c", 4))]
    assert [r.name for r in frontier(report(equal).settings)] == ["b"]


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_picture(tmp_path: Path, suffix: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"picture{suffix}"
    plot_report(several(), path)
    data = path.read_bytes()
    assert data.startswith(magic) and len(data) > 8000


def test_picture_of_points_that_coincide(tmp_path: Path) -> None:
    """No name is lost, and no two names cover each other."""
    pytest.importorskip("matplotlib")
    settings = suite("frontier")
    found = report([measured(s, "1" * 20, 30 if n < 4 else 2) for n, s in enumerate(settings)])
    path = tmp_path / "picture.svg"
    plot_report(found, path)
    text = path.read_text()
    assert all(f"<!-- {setting.name} -->" in text for setting in settings)


def test_picture_of_a_single_point(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    plot_report(report([measured(Setting("careful"), "0000", 1)]), path)
    assert path.stat().st_size > 8000
