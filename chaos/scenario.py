"""Scenario: one kind of fault, what counts as passed, and what was measured."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.answers import Known
from chaos.model import Kind
from chaos.server import Server

#: failures of one kind that are named one by one; the rest are counted
MAX_NAMED = 5


class Report:
    """What a scenario measured and what it found wrong.

    Attributes:
        measured: figures by name, for the table.
        wrong: sentences; empty if the scenario passed.

    Example:
        >>> report = Report()
        >>> report.expect(1 + 1 == 3, "sums are wrong")
        False
        >>> report.wrong
        ['sums are wrong']
    """

    def __init__(self) -> None:
        self.measured: dict[str, Any] = {}
        self.wrong: list[str] = []

    def expect(self, good: bool, otherwise: str) -> bool:
        """Note a failure unless ``good``; returns ``good``."""
        if not good:
            self.wrong.append(otherwise)
        return good

    def expect_none(self, what: str, found: list[str]) -> None:
        """Note failures of one kind: the first few in words, all of them as a count."""
        self.measured[what] = len(found)
        self.wrong += [f"{what}: {text}" for text in found[:MAX_NAMED]]
        if len(found) > MAX_NAMED:
            self.wrong.append(f"{what}: {len(found) - MAX_NAMED} more")


@dataclass
class Ground:
    """Where scenarios run.

    Attributes:
        folder: for everything that they write.
        kind: of the model.
        model: a tiny random checkpoint with a tokenizer and a chat template.
        known: the model's own answers, to compare with.
    """

    folder: Path
    kind: Kind
    model: Path
    known: Known

    @classmethod
    def make(cls, folder: Path, kind: Kind) -> Ground:
        """Write the model."""
        model = kind.write(folder / "model")
        return cls(folder, kind, model, Known(model, kind))

    def server(self, folder: Path, *options: str, **how: Any) -> Server:
        """A server of the model; see :class:`chaos.server.Server`."""
        return Server(folder, self.model, *options, *self.kind.options, **how)

    def note_preempted(
        self, report: Report, metrics: Mapping[str, float], *, must: bool = False
    ) -> None:
        """Say how often requests have lost their pages; if they ``must``, it has to have been."""
        if self.kind.grows:
            count = int(metrics["num_preemptions_total"])
            report.measured["preempted"] = count
            report.expect(count > 0 or not must, "no request has lost its pages")

    def place(self, name: str) -> Path:
        """A new folder."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))


Run = Callable[..., Awaitable[None]]


@dataclass(frozen=True)
class Scenario:
    """One kind of fault.

    Attributes:
        name: on the command line.
        does: what is done to the server.
        passes: what it has to stand.
        run: ``await run(ground, report, **size)``.
        full: arguments of a whole run.
        quick: arguments of a short one; None leaves the scenario out of short runs.
        limit_s: seconds after which it counts as hanging.
    """

    name: str
    does: str
    passes: str
    run: Run
    full: Mapping[str, Any] = field(default_factory=dict)
    quick: Mapping[str, Any] | None = None
    limit_s: float = 300.0

    async def play(self, ground: Ground, *, quick: bool) -> Report:
        """Run it. Whatever it raises is a failure, too."""
        report = Report()
        size = self.quick if quick and self.quick is not None else self.full
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.limit_s):
                await self.run(ground, report, **size)
        except TimeoutError as error:
            limit = f"it was not through after {self.limit_s:g} s"
            report.wrong.append(limit if not str(error) else str(error))
        except Exception as error:
            report.wrong.append(f"{type(error).__name__}: {error}")
        report.measured["seconds"] = round(time.monotonic() - began, 1)
        return report
