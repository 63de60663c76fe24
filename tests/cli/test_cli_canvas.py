"""The canvas: steps to pieces of text, pieces to terminal lines."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence

import pytest
from rich.console import Console
from rich.text import Text

from dllmserve.cli.canvas import ASCII_MARKS, CanvasText, Piece, State, crop, fold, visible
from dllmserve.cli.screen import CanvasView, Screen
from dllmserve.outputs import CanvasStep, RequestOutput

EOS = 300


def decode(ids: Sequence[int]) -> str:
    """A byte-level tokenizer: one id per byte; the end id is special."""
    return bytes(i for i in ids if i < 256).decode(errors="replace")


def step(
    text: Sequence[int | None] | bytes,
    committed: str,
    block: tuple[int, int] | None = None,
    forwards: int = 1,
    output: RequestOutput | None = None,
    sure: Sequence[float | None] | None = None,
) -> CanvasStep:
    """A step; ``committed`` has an "x" for every committed slot."""
    ids: list[int | None] = list(text)
    return CanvasStep(
        token_ids=ids,
        committed=[c == "x" for c in committed],
        confidence=list(sure or [None] * len(ids)),
        block=block or (0, len(ids)),
        forward_passes=forwards,
        output=output,
    )


def pieces(canvas: CanvasText, *args: object, **kwargs: object) -> list[tuple[str, State]]:
    return [(p.text, p.state) for p in canvas.pieces(step(*args, **kwargs))]  # type: ignore[arg-type]


def test_states_of_slots() -> None:
    canvas = CanvasText(decode, {EOS})
    canvas.pieces(step([72, None, None, None, None, None, None], "x......"))
    sure = [None, None, 0.95, 0.6, 0.3, None, None]
    found = pieces(canvas, [72, 105, *b"abc", None, None], "xx.....", (0, 6), sure=sure)
    assert found == [
        ("H", State.COMMITTED),
        ("i", State.FRESH),
        ("▓", State.SURE),
        ("▒", State.LIKELY),
        ("░", State.UNSURE),
        ("░", State.UNSURE),  # nothing is proposed yet, though the block is active
        ("·", State.WAITING),
    ]


def test_a_mask_is_as_wide_as_what_is_proposed() -> None:
    canvas = CanvasText(decode)
    text = "漢 a\n\tb".encode()
    found = pieces(canvas, text, "." * len(text), sure=[0.9] * len(text))
    # lines and words stay where they are when they are written; a tab is four columns
    assert found == [("▓▓ ▓\n    ▓", State.SURE)]


def test_fresh_tokens_become_committed() -> None:
    canvas = CanvasText(decode)
    assert pieces(canvas, b"ab", "xx") == [("ab", State.FRESH)]
    assert pieces(canvas, b"ab", "xx") == [("ab", State.COMMITTED)]


def test_a_character_over_several_tokens_is_whole() -> None:
    canvas = CanvasText(decode)
    euro = "€".encode()  # three bytes, three tokens
    canvas.pieces(step([euro[0], None, None, None], "x..."))
    found = pieces(canvas, [*euro, 33], "x...")
    # it belongs to the token that completes it, and is never shown as broken bytes
    assert found == [("░░", State.UNSURE)]
    found = pieces(canvas, [*euro, 33], "xxx.")
    assert found == [("€", State.FRESH), ("░", State.UNSURE)]


def test_masks_stay_until_the_end_is_committed() -> None:
    canvas = CanvasText(decode, {EOS})
    sure = [0.9, 0.9, 0.9, 0.9, 0.2]
    found = pieces(canvas, [72, 105, EOS, EOS, EOS], "x....", sure=sure)
    assert found == [
        ("H", State.FRESH),
        ("▓", State.SURE),
        *[("▓", State.SURE)] * 2,
        ("░", State.UNSURE),
    ]
    found = pieces(canvas, [72, 105, EOS, EOS, EOS], "x.x..", sure=sure)
    assert found == [("H", State.COMMITTED), ("▓", State.SURE)]


def test_nothing_is_shown_after_a_committed_end() -> None:
    canvas = CanvasText(decode, {EOS})
    assert pieces(canvas, [72, EOS, 88, None], "xx..") == [("H", State.FRESH)]


def test_with_ignored_end_the_rest_is_shown() -> None:
    canvas = CanvasText(decode, ())
    assert pieces(canvas, [72, EOS, 88], "xx.") == [("H", State.FRESH), ("░", State.UNSURE)]


def test_settled_blocks_are_decoded_once() -> None:
    lengths: list[int] = []

    def counting(ids: Sequence[int]) -> str:
        lengths.append(len(ids))
        return decode(ids)

    canvas = CanvasText(counting)
    text = b"abcdefgh"
    canvas.pieces(step([*text[:4], None, None, None, None], "xxxx....", (0, 4)))
    canvas.pieces(step([*text[:5], None, None, None], "xxxx....", (4, 8)))
    lengths.clear()
    found = pieces(canvas, [*text[:6], None, None], "xxxxx...", (4, 8))
    assert "".join(t for t, _ in found) == "abcde░░░"
    assert max(lengths) <= 2


def test_a_block_that_ends_inside_a_character() -> None:
    canvas = CanvasText(decode)
    euro = "€".encode()
    first = step([97, *euro[:2], None, None], "xxx..", (0, 3))
    canvas.pieces(first)
    canvas.pieces(step([97, *euro, None], "xxx..", (3, 5)))
    found = pieces(canvas, [97, *euro, 98], "xxxxx", (3, 5))
    assert "".join(t for t, _ in found) == "a€b"


def test_ascii_marks() -> None:
    canvas = CanvasText(decode, marks=ASCII_MARKS)
    found = pieces(canvas, [97, 97, 97, None], "....", (0, 3), sure=[0.9, 0.5, 0.4, None])
    assert [text for text, _ in found] == ["%", ":", "_", "."]


def test_visible_disarms_control_characters() -> None:
    shown = visible("a\x1b[31mb\x07\x9b\tc\n")
    assert "\x1b" not in shown and "\x07" not in shown and "\x9b" not in shown
    assert shown.endswith("    c\n")


def test_fold_keeps_the_grid() -> None:
    lines, _ = fold([Piece("1234\n34", State.COMMITTED), Piece("12\n21", State.SURE)], 80)
    assert [str(line) for line in lines] == ["1234", "3412", "21"]


@pytest.mark.parametrize("width", [4, 5, 9])
def test_fold_never_exceeds_the_width(width: int) -> None:
    lines, _ = fold([Piece("ab漢字cd ef漢\n\nxyz", State.COMMITTED)], width)
    assert all(line.cell_len <= width for line in lines)
    assert "".join(map(str, lines)) == "ab漢字cd ef漢xyz"


def test_crop_keeps_the_focus() -> None:
    lines = [Text(str(n)) for n in range(100)]
    for focus in (0, 1, 50, 98, 99):
        shown = [str(line) for line in crop(list(lines), focus, 10)]
        assert len(shown) == 10
        assert str(focus) in shown or focus in (0, 99)


def test_long_canvas_fits_any_terminal() -> None:
    found = [Piece("word " * 300, State.COMMITTED), Piece("·" * 500, State.WAITING)]
    for width, height in ((80, 24), (20, 8), (9, 4), (40, 2)):
        console = Console(
            file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None
        )
        lines = console.render_lines(CanvasView(found, ["step 1"] * 10), pad=False)
        assert len(lines) <= max(height - 1, 2)


def _console(**options: object) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    given = {"width": 60, "height": 20, "_environ": {}, **options}
    return Console(file=file, force_terminal=True, **given), file  # type: ignore[arg-type]


OUTPUT = RequestOutput("Hi", [72, 105, EOS], "stop", 4, 3, 2)


def _steps() -> Iterator[CanvasStep]:
    yield step([72, 111, None], "x..", (0, 2), 1, sure=[None, 0.99, None])
    yield step([72, 105, EOS], "xxx", (0, 3), 2, OUTPUT)


def _numbers() -> Iterator[float]:
    return (float(n) for n in range(100))


def test_masks_are_shaded_and_committed_is_plain() -> None:
    console, file = _console(color_system="standard", width=100)
    screen = Screen(console, _numbers().__next__, "quality balanced")
    assert screen.live(_steps(), CanvasText(decode, {EOS})) is OUTPUT
    written = file.getvalue()
    assert "\x1b[1;32mH\x1b[0m\x1b[96m▓\x1b[0m" in written  # just decided, then a mask
    assert "H\x1b[1;32mi\x1b[0m" in written  # decided before, without any style
    assert "1/3 committed" in written and "3/3 committed" in written
    summary = "3 tokens · 2 forwards · 3.00 s · 1.0 tokens/s · stop · quality balanced\x1b[0m"
    assert written.rstrip().endswith(summary)


def test_no_color_tells_masks_apart() -> None:
    console, file = _console(color_system="standard", no_color=True)
    Screen(console, _numbers().__next__).live(_steps(), CanvasText(decode, {EOS}))
    written = file.getvalue()
    assert "\x1b[1mH\x1b[0m▓" in written
    assert "36m" not in written and "32m" not in written and "96m" not in written


@pytest.mark.parametrize("width", [8, 20, 40, 60, 200])
def test_small_print_is_never_broken(width: int) -> None:
    console, file = _console(color_system=None, width=width)
    screen = Screen(console, _numbers().__next__, "quality balanced")
    parts = [*screen.status(next(_steps()), 1, 1.0), *screen.summary(OUTPUT, 3.0)]
    screen.live(_steps(), CanvasText(decode, {EOS}))
    written = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    lines = [line.rstrip() for line in re.split("[\r\n]+", written)]
    status = [line for line in lines if line.startswith("step")]
    # a terminal that writes ^C behind the status must not have to begin a new line for it
    assert status and max(map(len, status)) <= max(width - 3, 1)
    if width >= 20:  # the longest part fits
        summary = lines[len(lines) - lines[::-1].index("Hi") :]
        assert {part for line in summary if line for part in line.split(" · ")} <= set(parts)
        assert max(map(len, summary)) <= width


def test_fast_steps_are_not_all_drawn() -> None:
    console, file = _console(color_system=None)
    ticks = iter(n / 1000 for n in range(1000))

    def many() -> Iterator[CanvasStep]:
        for n in range(100):
            yield step([72, 111, None], "x..", (0, 2), n)
        yield step([72, 105, EOS], "xxx", (0, 3), 101, OUTPUT)

    Screen(console, lambda: next(ticks)).live(many(), CanvasText(decode, {EOS}))
    assert 0 < file.getvalue().count(" · 1/3 committed") < 10
    assert "3/3 committed" in file.getvalue()


def test_an_interrupted_canvas_stays_on_screen() -> None:
    console, file = _console(color_system=None)

    def broken() -> Iterator[CanvasStep]:
        yield step([72, 111, None], "x..", (0, 2), 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Screen(console).live(broken(), CanvasText(decode, {EOS}))
    written = file.getvalue()
    assert written.count("H░") >= 1
    assert written.rstrip().endswith("\x1b[?25h")  # the cursor is back
