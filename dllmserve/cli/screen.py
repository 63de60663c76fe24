"""Showing answers to a person: the live canvas, headings and summaries."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from dllmserve.cli.canvas import ASCII_MARKS, CanvasText, Marks, Piece, crop, fold, visible
from dllmserve.errors import EngineError
from dllmserve.outputs import CanvasStep, RequestOutput

#: redraws a second; more would only flicker
_FRAMES = 24
#: lines that a heading may take
_HEADING_LINES = 8
#: below the canvas: the status, and the line that the cursor rests on
_OWN_LINES = 2


class CanvasView:
    """What rich draws: the canvas, cropped to the terminal, above a status line."""

    def __init__(self, pieces: list[Piece], status: str) -> None:
        self._pieces = pieces
        self._status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw at the terminal's present size."""
        lines, focus = fold(self._pieces, options.max_width)
        yield from crop(lines, focus, max(console.size.height - _OWN_LINES, 1))
        yield Text(self._status, "dim", no_wrap=True, overflow="ellipsis")


class Screen:
    """Writes to a terminal.

    Args:
        console: of the terminal.
        clock: seconds, for the rates.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.perf_counter) -> None:
        self._console = console
        self._clock = clock
        self._ascii = console.options.ascii_only
        self._joint = " | " if self._ascii else " · "

    @property
    def marks(self) -> Marks:
        """Placeholders that the terminal's encoding has."""
        return ASCII_MARKS if self._ascii else Marks()

    def heading(self, prompt: str) -> None:
        """Show a prompt above its answer."""
        lines = visible(prompt).split("\n")
        if len(lines) > _HEADING_LINES:
            left = len(lines) - _HEADING_LINES + 1
            lines = [*lines[: _HEADING_LINES - 1], f"({left} more lines)"]
        for line in lines:
            self._console.print(Text(f"> {line}", "bold blue"))

    def live(self, steps: Iterable[CanvasStep], canvas: CanvasText) -> RequestOutput:
        """Show an answer while it is being filled in, and return it."""
        begin = self._clock()
        drawn = float("-inf")
        count = 0
        output: RequestOutput | None = None
        # drawn by hand, one frame after the other: no thread, no half-drawn canvas
        with Live(
            console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop"
        ) as live:
            try:
                for count, step in enumerate(steps, 1):
                    output = step.output
                    now = self._clock()
                    if now - drawn < 1 / _FRAMES and output is None:
                        continue
                    drawn = now
                    view = CanvasView(canvas.pieces(step), self.status(step, count, now - begin))
                    live.update(view, refresh=True)
            except BaseException:
                live.transient = False  # leave what was there, for the person who stopped it
                raise
        if output is None:
            raise EngineError("the engine ended a request without an answer")
        self.answer(output, self._clock() - begin)
        return output

    def answer(self, output: RequestOutput, seconds: float | None) -> None:
        """Show a finished answer and its summary. No rate without the seconds."""
        self._line(visible(output.text))
        parts = [f"{output.completion_tokens} tokens", f"{output.forward_passes} forwards"]
        if seconds is not None:
            rate = output.completion_tokens / max(seconds, 1e-9)
            parts += [f"{seconds:.2f} s", f"{rate:.1f} tokens/s"]
        self._line(self._joint.join([*parts, output.finish_reason]), "dim")

    def blank(self) -> None:
        """Show an empty line."""
        self._console.print()

    def note(self, text: str) -> None:
        """Show a line of small print."""
        self._line(text, "dim")

    def _line(self, text: str, style: str = "") -> None:
        # the terminal wraps, so that copied text has no line breaks of ours
        self._console.print(Text(text, style), soft_wrap=True)

    def status(self, step: CanvasStep, count: int, seconds: float) -> str:
        """The line below the canvas."""
        committed, total = sum(step.committed), len(step.committed)
        start, end = step.block
        parts = [
            f"step {count}",
            f"{step.forward_passes} forwards",
            f"{committed}/{total} committed",
            f"block {start}-{end}",
            f"{committed / max(seconds, 1e-9):.1f} tokens/s",
        ]
        return self._joint.join(parts)
