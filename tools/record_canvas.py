"""Record docs/images/canvas.svg: the command line answering prompts, as an animated SVG.

The frames are those of a real run, drawn by the code that draws the terminal; only their
times are held between bounds that an eye can follow. Run it again when the embedded model or
the canvas changes::

    python tools/record_canvas.py
"""

from __future__ import annotations

import argparse
import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from rich.cells import cell_len
from rich.color import Color
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from dllmserve.cli.canvas import CanvasText
from dllmserve.cli.generate import DEFAULT_QUALITY
from dllmserve.cli.options import sampling_params
from dllmserve.cli.prompts import DEMO_PROMPTS
from dllmserve.cli.screen import CanvasView, Screen, join

if TYPE_CHECKING:
    from dllmserve import LLM

OUTPUT = Path(__file__).parents[1] / "docs" / "images" / "canvas.svg"

# sizes in pixels, times in seconds
COLUMNS = 78
CHAR, LINE, EDGE, BAR = 8.4, 20.0, 16.0, 34.0
FIRST_PAUSE, LAST_PAUSE, SHORTEST, LONGEST = 0.9, 2.6, 0.06, 0.15
BACKGROUND, BAR_COLOR, FOREGROUND = "#0d1117", "#21262d", "#e6edf3"
PALETTE = {
    "green": "#56d364",
    "cyan": "#39a0b5",
    "bright_cyan": "#76e3ea",
    "blue": "#79c0ff",
    "bright_black": "#8b949e",
}
#: what is recorded: a prompt, and a quality where it is not the default. One token a step shows
#: how a canvas is filled; the default needs a forward or two for what this model is sure of.
SCENES = ((DEMO_PROMPTS[1], "exact"), (DEMO_PROMPTS[1], None), (DEMO_PROMPTS[2], None))

Line = tuple[Segment, ...]


@dataclass(frozen=True)
class Frame:
    """What the terminal shows, and for how long."""

    lines: tuple[Line, ...]
    seconds: float


class Recorder:
    """Runs prompts and collects the frames.

    Args:
        llm: the model.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        # high enough for every answer, so that nothing is cropped
        self._console = Console(
            file=io.StringIO(), force_terminal=True, width=COLUMNS, height=100, _environ={}
        )

    def scene(self, prompt: str, quality: str | None) -> list[Frame]:
        """The frames of one prompt: the command, the canvas, the answer."""
        assert self._llm.tokenizer is not None
        chosen = quality or DEFAULT_QUALITY
        screen = Screen(self._console, label=f"quality {chosen}")
        option = "" if quality is None else f"--quality {quality} "
        heading = self._lines(f'$ dllmserve generate {option}"{prompt}"')
        ids = self._llm.chat_ids([{"role": "user", "content": prompt}])
        canvas = CanvasText(self._llm.tokenizer.decode, self._llm.spec.eos_ids)
        frames = [Frame(tuple(heading), FIRST_PAUSE)]
        begin = last = time.perf_counter()
        params = sampling_params({"quality": chosen})
        for count, step in enumerate(self._llm.stream(ids, params), 1):
            now = time.perf_counter()
            view = CanvasView(canvas.pieces(step), screen.status(step, count, now - begin))
            drawn = self._console.render_lines(view, pad=False)
            lines = (*heading, *(tuple(line) for line in drawn))
            frames.append(Frame(lines, min(max(now - last, SHORTEST), LONGEST)))
            last = now
            output = step.output
        if output is None:
            raise RuntimeError("the engine ended the request without an answer")
        text = [line for part in output.text.split("\n") for line in self._lines(part, "")]
        summary = join(screen.summary(output, last - begin), " · ", COLUMNS)
        below = [line for part in summary for line in self._lines(part, "dim")]
        return [*frames, Frame((*heading, *text, *below), LAST_PAUSE)]

    def _lines(self, text: str, style: str = "bold blue") -> list[Line]:
        drawn = self._console.render_lines(Text(text, style), pad=False)
        return [tuple(line) for line in drawn]


def svg(frames: list[Frame], title: str) -> str:
    """The frames as an SVG that plays in a loop, also inside an <img>.

    Every line is written once for each span of time in which it stays the same. Viewers
    without animation show the last frame.
    """
    total = sum(frame.seconds for frame in frames)
    rows = max(len(frame.lines) for frame in frames)
    width = COLUMNS * CHAR + 2 * EDGE
    height = BAR + rows * LINE + 2 * EDGE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img">',
        f"<title>{escape(title)}</title>",
        "<style>text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,"
        "'DejaVu Sans Mono','Liberation Mono',monospace;white-space:pre}</style>",
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="{BACKGROUND}"/>',
        f'<path d="M0 8a8 8 0 0 1 8-8h{width - 16:g}a8 8 0 0 1 8 8v{BAR - 8:g}H0z" '
        f'fill="{BAR_COLOR}"/>',
    ]
    for place, color in enumerate(("#ff5f57", "#febc2e", "#28c840")):
        parts.append(f'<circle cx="{20 + 20 * place}" cy="{BAR / 2:g}" r="6" fill="{color}"/>')
    parts.append(
        f'<text x="{width / 2:g}" y="{BAR / 2 + 5:g}" text-anchor="middle" '
        f'fill="#8b949e">{escape(title)}</text>'
    )
    for row in range(rows):
        baseline = BAR + EDGE + row * LINE + 14
        for line, start, end in _spans(frames, row):
            parts.append(_timed(_text(line, baseline), start, end, total))
    return "\n".join([*parts, "</svg>", ""])


def _spans(frames: list[Frame], row: int) -> list[tuple[Line, float, float]]:
    """When a row shows what: (line, from, to), neighbouring equal frames joined."""
    found: list[tuple[Line, float, float]] = []
    now = 0.0
    for frame in frames:
        line = frame.lines[row] if row < len(frame.lines) else ()
        if found and found[-1][0] == line and found[-1][2] == now:
            found[-1] = (line, found[-1][1], now + frame.seconds)
        else:
            found.append((line, now, now + frame.seconds))
        now += frame.seconds
    return [span for span in found if any(s.text.strip() for s in span[0])]


def _timed(content: str, start: float, end: float, total: float) -> str:
    """Content that is visible from start to end of every round."""
    first, last = start / total, end / total
    at_end = last > 1 - 1e-9
    if first == 0 and at_end:
        return content
    values, times = ["hidden"], ["0"]
    if first == 0:
        values = ["visible"]
    else:
        values.append("visible")
        times.append(f"{first:.5f}")
    if not at_end:
        values.append("hidden")
        times.append(f"{last:.5f}")
    still = "visible" if at_end else "hidden"
    return (
        f'<g visibility="{still}">{content}<animate attributeName="visibility" '
        f'values="{";".join(values)}" keyTimes="{";".join(times)}" dur="{total:.2f}s" '
        'calcMode="discrete" repeatCount="indefinite"/></g>'
    )


def _text(line: Line, baseline: float) -> str:
    """One line; every run of a style gets its place, whatever font the viewer has."""
    column, parts = 0, []
    for segment in line:
        size = cell_len(segment.text)
        if segment.text.strip():
            text = escape(segment.text)
            x, length = EDGE + column * CHAR, size * CHAR
            parts.append(
                f'<tspan x="{x:.1f}" textLength="{length:.1f}" lengthAdjust="spacingAndGlyphs"'
                f"{_style(segment.style)}>{text}</tspan>"
            )
        column += size
    return (
        f'<text y="{baseline:g}" fill="{FOREGROUND}" xml:space="preserve">{"".join(parts)}</text>'
    )


def _style(style: Style | None) -> str:
    if style is None:
        return ""
    found = ""
    if isinstance(style.color, Color):
        found += f' fill="{PALETTE.get(style.color.name, FOREGROUND)}"'
    if style.dim:
        found += ' fill-opacity="0.6"'
    if style.bold:
        found += ' font-weight="bold"'
    return found


def main() -> None:
    """Record and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("prompts", nargs="*", help="recorded as the default decodes them")
    args = parser.parse_args()

    from dllmserve import LLM

    llm = LLM(args.model, load_format=args.load_format)
    recorder = Recorder(llm)
    scenes = [(prompt, None) for prompt in args.prompts] or SCENES
    recorder.scene(*scenes[0])  # the first run pays for what later ones do not
    frames = [frame for scene in scenes for frame in recorder.scene(*scene)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(svg(frames, "dllmserve generate"), encoding="utf-8")
    size = args.output.stat().st_size
    seconds = sum(frame.seconds for frame in frames)
    print(f"{args.output}: {len(frames)} frames, {seconds:.1f} s, {size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
