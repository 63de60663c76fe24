"""Showing answers to a person: the live canvas, headings and summaries."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from dllmserve.cli.canvas import ASCII_MARKS, MARKS, CanvasText, Marks, Piece, crop, fold, visible
from dllmserve.errors import EngineError
from dllmserve.outputs import CanvasStep, RequestOutput
from dllmserve.tools.text import counted

#: redraws a second; more would only flicker
_FRAMES = 24
#: lines that a heading may take
_HEADING_LINES = 8
#: below the canvas: the status, and the line that the cursor rests on
_OWN_LINES = 2
#: The cursor rests behind the status. A terminal that writes ^C there must not begin a new line,
#: as what is drawn over would be one line too low.
_CTRL_C = 3


class CanvasView:
    """What rich draws: the canvas, cropped to the terminal, above a status line."""

    def __init__(self, pieces: list[Piece], status: Sequence[str], joint: str = " · ") -> None:
        self._pieces = pieces
        self._status = status
        self._joint = joint

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw at the terminal's present size."""
        lines, focus = fold(self._pieces, options.max_width)
        yield from crop(lines, focus, max(console.size.height - _OWN_LINES, 1))
        room = max(options.max_width - _CTRL_C, 1)
        status = Text(join(self._status, self._joint, room)[0], "dim", no_wrap=True)
        status.truncate(room, overflow="ellipsis")
        yield status


def join(parts: Sequence[str], joint: str, width: int) -> list[str]:
    """Parts in lines that are no wider than they must be: none is broken.

    Example:
        >>> join(["20 tokens", "32 forwards", "1.20 s"], " | ", 24)
        ['20 tokens | 32 forwards', '1.20 s']
    """
    lines = [parts[0]]
    for part in parts[1:]:
        longer = lines[-1] + joint + part
        if cell_len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


class Screen:
    """Writes to a terminal.

    Args:
        console: of the terminal.
        clock: seconds, for the rates.
        label: what else is said of every answer.
    """

    def __init__(
        self,
        console: Console,
        clock: Callable[[], float] = time.perf_counter,
        label: str = "",
    ) -> None:
        self._console = console
        self._label = label
        self._clock = clock
        self._ascii = console.options.ascii_only
        self._joint = " | " if self._ascii else " · "

    @property
    def marks(self) -> Marks:
        """Placeholders that the terminal's encoding has."""
        return ASCII_MARKS if self._ascii else MARKS

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
                    status = self.status(step, count, now - begin)
                    view = CanvasView(canvas.pieces(step), status, self._joint)
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
        # the terminal wraps it, so that copied text has no line breaks of ours
        self._console.print(Text(visible(output.text)), soft_wrap=True)
        for line in join(self.summary(output, seconds), self._joint, self._console.width):
            self.note(line)

    def summary(self, output: RequestOutput, seconds: float | None) -> list[str]:
        """What is said of a finished answer."""
        parts = [
            counted(output.completion_tokens, "token"),
            counted(output.forward_passes, "forward"),
        ]
        if seconds is not None:
            rate = output.completion_tokens / max(seconds, 1e-9)
            parts += [f"{seconds:.2f} s", f"{rate:.1f} tokens/s"]
        return [*parts, output.finish_reason, *filter(None, [self._label])]

    def blank(self) -> None:
        """Show an empty line."""
        self._console.print()

    def note(self, text: str) -> None:
        """Show a line of small print."""
        self._console.print(Text(text, "dim"))

    def status(self, step: CanvasStep, count: int, seconds: float) -> list[str]:
        """The line below the canvas; a narrow terminal shows the first parts of it."""
        committed, total = sum(step.committed), len(step.committed)
        start, end = step.block
        return [
            f"step {count}",
            f"{committed}/{total} committed",
            counted(step.forward_passes, "forward"),
            f"{committed / max(seconds, 1e-9):.1f} tokens/s",
            f"block {start}-{end}",
            *filter(None, [self._label]),
        ]
