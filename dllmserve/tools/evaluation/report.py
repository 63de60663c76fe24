"""The report of an evaluation: header and tables for people, one record for machines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table

from dllmserve._checks import user_path
from dllmserve.errors import ConfigError
from dllmserve.tools.evaluation.figures import Difference, Figures, Measured, SettingResult
from dllmserve.tools.evaluation.items import Item
from dllmserve.tools.text import counted, header, known, rate_text, table

if TYPE_CHECKING:  # loads torch
    from dllmserve.llm import LLM

#: version of the record's layout, raised when a key changes its meaning or goes away
SCHEMA = 1
BENCHMARK = "eval"
#: keys of the record that are not of the evaluation itself
_ENVIRONMENT = ("versions", "device", "dtype", "model", "options", "header")
#: with so many settings or fewer, the table of the tasks has intervals
_WITH_INTERVALS = 4
#: share of answers without an end that is worth a note
_MANY_CUT = 0.05


@dataclass(frozen=True)
class EvalReport:
    """Everything that ``dllmserve eval`` has to say.

    Attributes:
        environment: what the figures depend on, as :func:`environment_of` finds it.
        data: where the items come from and how they are asked and judged.
        items: their ids, in order.
        baseline: name of the setting that the others are compared with.
        settings: the results.
        interrupted: settings that were asked for are missing.
        left_out: settings of a suite that mean nothing on this model, and why.
    """

    environment: Mapping[str, Any]
    data: Mapping[str, Any]
    items: Sequence[str]
    baseline: str
    settings: Sequence[SettingResult]
    interrupted: bool = False
    left_out: Sequence[str] = ()

    def header(self) -> str:
        """What was measured, on what."""
        lines = {**self.environment["header"], "items": self._items_text()}
        if len(self.settings) == 1:
            lines["setting"] = self.settings[0].name
        return header(lines, filter(None, ["; ".join(self.notes())]))

    def table(self) -> RenderableType:
        """One setting: a row per task. Several: a row per setting, and one per task below."""
        if len(self.settings) == 1:
            return _one_setting(self.settings[0])
        tables: list[RenderableType] = [_settings(self.settings, self.baseline)]
        if len(self.settings[0].tasks) > 1:
            tables += ["", _tasks(self.settings)]
        return Group(*tables)

    def title(self) -> str:
        """What was measured, for a picture."""
        model, name = self.environment["model"]["name"], self.environment["device"]["name"]
        first = f"eval: {model}, {self.environment['dtype']}, {name}"
        return f"{first}\n{self._items_text().partition(';')[0]}"

    def notes(self) -> list[str]:
        """What a reader of the figures should know."""
        notes = ["interrupted: settings are missing"] if self.interrupted else []
        notes += self.left_out
        worst = max(self.settings, key=lambda s: s.overall.cut / s.overall.items)
        cut, count = worst.overall.cut, worst.overall.items
        if cut > _MANY_CUT * count:
            notes.append(
                f"{cut} of {count} answers of {worst.name!r} filled gen_length without an end: "
                "a longer one may score better"
            )
        return notes

    def record(self) -> dict[str, Any]:
        """The JSON record; docs/evaluation.md describes it."""
        return {
            "benchmark": BENCHMARK,
            "schema": SCHEMA,
            **self.environment,
            "data": dict(self.data),
            "baseline": self.baseline,
            "settings": [asdict(setting) for setting in self.settings],
            "items": list(self.items),
            "notes": self.notes(),
            "interrupted": self.interrupted,
            "left_out": list(self.left_out),
        }

    def _items_text(self) -> str:
        data = self.data
        asked = "raw prompts" if data["raw"] else "chat template"
        limit = "" if data["limit"] is None else f", {data['limit']} a task"
        tasks = counted(len(data["tasks"]), "task")
        return (
            f"{counted(len(self.items), 'item')} in {tasks}{limit}, {data['source']}; {asked}, "
            f"judged by {data['match']}"
        )


def environment_of(llm: LLM) -> dict[str, Any]:
    """What figures depend on besides items and settings, as ``dllmserve bench`` records it."""
    from dllmserve.tools.environment import environment, header_lines

    return {**environment(llm.config, llm.plan), "header": header_lines(llm.config, llm.plan)}


def data_of(
    source: str, items: Sequence[Item], match: str, limit: int | None, raw: bool
) -> dict[str, Any]:
    """The record's part about the items."""
    tasks = dict(Counter(item.task for item in items))
    return {"source": source, "match": match, "limit": limit, "raw": raw, "tasks": tasks}


def read_report(path: str | Path) -> EvalReport:
    """The report that ``dllmserve eval --json FILE`` has written.

    Raises:
        ConfigError: the file holds something else.
        OSError: it cannot be read.
    """
    text = user_path(path).read_bytes()
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("benchmark") != BENCHMARK:
        raise ConfigError(f"{path} holds no evaluation: give a file of dllmserve eval --json")
    if record.get("schema") != SCHEMA:
        raise ConfigError(
            f"{path} has schema {record.get('schema')!r}, and this version reads {SCHEMA}: "
            "run the evaluation again"
        )
    try:
        environment = {key: record[key] for key in _ENVIRONMENT}
        report = msgspec.convert({**record, "environment": environment}, EvalReport)
    except (KeyError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path} is incomplete: {error}") from error
    if not report.settings:
        raise ConfigError(f"{path} holds no settings")
    return report


def points(share: float) -> str:
    """A share in percent, without the sign of it.

    Example:
        >>> points(0.995), points(1.0)
        ('99.5', '100.0')
    """
    return f"{100 * share:.1f}"


def _one_setting(result: SettingResult) -> Table:
    tasks = dict(result.tasks)
    if len(tasks) > 1:
        tasks["all"] = result.overall
    rows = [
        [
            ("task", task),
            ("items", str(figures.items)),
            *_quality(figures),
            *_cost(figures),
            ("tokens/s", rate_text(result.tokens_per_second) if number == len(tasks) else ""),
        ]
        for number, (task, figures) in enumerate(tasks.items(), 1)
    ]
    return table(rows, left="task", total=True)


def _settings(results: Sequence[SettingResult], baseline: str) -> Table:
    rows = []
    for number, result in enumerate(results, 1):
        figures = result.overall
        forwards, per_forward = _cost(figures)
        gap = known(figures.difference, _points_from)
        rows.append(
            [
                ("", str(number)),
                ("setting", result.name),
                *_quality(figures),
                ("points from\nbaseline", "the baseline" if result.name == baseline else gap),
                ("same\ntext, %", known(figures.same_text, points)),
                forwards,
                ("% of\nbaseline", known(figures.forwards_ratio, lambda r: f"{100 * r:.3g}")),
                per_forward,
                ("tokens/s", rate_text(result.tokens_per_second)),
            ]
        )
    return table(rows, left="setting")


def _points_from(gap: Difference) -> str:
    value, low, high = (f"{100 * share:+.1f}" for share in (gap.value, gap.low, gap.high))
    return f"{value} ({low}, {high})"


def _tasks(results: Sequence[SettingResult]) -> Table:
    """Accuracy by task; a column per setting, by its number."""
    rows = []
    for task, first in results[0].tasks.items():
        row = [("accuracy, %", task), ("items", str(first.items))]
        for number, result in enumerate(results, 1):
            (_, accuracy), (_, interval) = _quality(result.tasks[task])
            wide = f" ({interval})" if len(results) <= _WITH_INTERVALS else ""
            row.append((str(number), accuracy + wide))
        rows.append(row)
    return table(rows, left="accuracy, %")


def _quality(figures: Figures) -> list[tuple[str, str]]:
    interval = f"{points(figures.low)}-{points(figures.high)}"
    return [("accuracy,\n%", points(figures.accuracy)), ("95 %\ninterval", interval)]


def _cost(figures: Figures) -> list[tuple[str, str]]:
    forwards = f"{figures.forwards:.{1 if figures.forwards >= 10 else 2}f}"
    tokens = f"{figures.tokens_per_forward:.2f}"
    return [("forwards/\nanswer", forwards), ("tokens/\nforward", tokens)]


def answers_of(measured: Sequence[Measured]) -> Iterator[dict[str, Any]]:
    """One record per setting and item, for ``--answers``."""
    for one in measured:
        for outcome in one.outcomes:
            item = outcome.item
            yield {
                "setting": one.setting.name,
                "id": item.id,
                "task": item.task,
                "prompt": item.prompt,
                "answer": list(item.answers),
                "text": outcome.text,
                "right": outcome.right,
                "finish_reason": outcome.finish_reason,
                **outcome.usage,
            }
