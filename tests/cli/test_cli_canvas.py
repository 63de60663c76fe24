"""The canvas: steps to pieces of text, pieces to terminal lines."""

from __future__ import annotations

import io
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
) -> CanvasStep:
    """A step; ``committed`` has an "x" for every committed slot."""
    ids: list[int | None] = list(text)
    return CanvasStep(
        token_ids=ids,
        committed=[c == "x" for c in committed],
        confidence=[None] * len(ids),
        block=block or (0, len(ids)),
        forward_passes=forwards,
        output=output,
    )


def pieces(canvas: CanvasText, *args: object, **kwargs: object) -> list[tuple[str, State]]:
    return [(p.text, p.state) for p in canvas.pieces(step(*args, **kwargs))]  # type: ignore[arg-type]


def test_states_of_slots() -> None:
    canvas = CanvasText(decode, {EOS})
    canvas.pieces(step([72, None, None, None, None], "x...."))
    found = pieces(canvas, [72, 105, 33, None, None], "xx...", (0, 4))
    assert found == [
        ("H", State.COMMITTED),
        ("i", State.FRESH),
        ("!", State.PROPOSED),
        ("░", State.ACTIVE),
        ("·", State.MASKED),
    ]


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
    assert "".join(t for t, _ in found) == "€!"
    assert ("€!", State.PROPOSED) in found


def test_provisional_end_is_invisible() -> None:
    canvas = CanvasText(decode, {EOS})
    assert pieces(canvas, [72, 105, EOS, EOS, EOS], ".....") == [("Hi", State.PROPOSED)]


def test_nothing_is_shown_after_a_committed_end() -> None:
    canvas = CanvasText(decode, {EOS})
    assert pieces(canvas, [72, EOS, 88, None], "xx..") == [("H", State.FRESH)]


def test_with_ignored_end_the_rest_is_shown() -> None:
    canvas = CanvasText(decode, ())
    assert pieces(canvas, [72, EOS, 88], "xx.") == [("H", State.FRESH), ("X", State.PROPOSED)]


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
    assert "".join(t for t, _ in found) == "abcdef░░"
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
    assert pieces(canvas, [None, None], "..", (0, 1)) == [
        ("_", State.ACTIVE),
        (".", State.MASKED),
    ]


def test_visible_disarms_control_characters() -> None:
    shown = visible("a\x1b[31mb\x07\x9b\tc\n")
    assert "\x1b" not in shown and "\x07" not in shown and "\x9b" not in shown
    assert shown.endswith("    c\n")


def test_fold_keeps_the_grid() -> None:
    lines, _ = fold([Piece("1234\n34", State.COMMITTED), Piece("12\n21", State.PROPOSED)], 80)
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
    found = [Piece("word " * 300, State.COMMITTED), Piece("·" * 500, State.MASKED)]
    for width, height in ((80, 24), (20, 8), (9, 4), (40, 2)):
        console = Console(
            file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None
        )
        lines = console.render_lines(CanvasView(found, "step 1 · " * 10), pad=False)
        assert len(lines) <= max(height - 1, 2)


def _console(**options: object) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(
        file=file, force_terminal=True, width=60, height=20, **{"_environ": {}, **options}
    ), file  # type: ignore[arg-type]


OUTPUT = RequestOutput("Hi", [72, 105, EOS], "stop", 4, 3, 2)


def _steps() -> Iterator[CanvasStep]:
    yield step([72, 111, None], "x..", (0, 2), 1)
    yield step([72, 105, EOS], "xxx", (0, 3), 2, OUTPUT)


def test_provisional_is_dim_and_committed_is_solid() -> None:
    console, file = _console(color_system="standard")
    clock = iter(float(n) for n in range(100))
    output = Screen(console, lambda: next(clock)).live(_steps(), CanvasText(decode, {EOS}))
    assert output is OUTPUT
    written = file.getvalue()
    assert "\x1b[1;32mH\x1b[0m\x1b[2;36mo\x1b[0m" in written  # just decided, then a proposal
    assert "H\x1b[1;32mi\x1b[0m" in written  # decided before, without any style
    assert "1/3 committed" in written and "3/3 committed" in written
    assert written.rstrip().endswith("3 tokens · 2 forwards · 3.00 s · 1.0 tokens/s · stop\x1b[0m")


def test_no_color_still_dims() -> None:
    console, file = _console(color_system="standard", no_color=True)
    clock = iter(float(n) for n in range(100))
    Screen(console, lambda: next(clock)).live(_steps(), CanvasText(decode, {EOS}))
    written = file.getvalue()
    assert "\x1b[2mo\x1b[0m" in written
    assert "36m" not in written and "32m" not in written


def test_fast_steps_are_not_all_drawn() -> None:
    console, file = _console(color_system=None)
    ticks = iter(n / 1000 for n in range(1000))

    def many() -> Iterator[CanvasStep]:
        for n in range(100):
            yield step([72, 111, None], "x..", (0, 2), n)
        yield step([72, 105, EOS], "xxx", (0, 3), 101, OUTPUT)

    Screen(console, lambda: next(ticks)).live(many(), CanvasText(decode, {EOS}))
    assert file.getvalue().count("forwards · 1/3") < 10
    assert "3/3 committed" in file.getvalue()


def test_an_interrupted_canvas_stays_on_screen() -> None:
    console, file = _console(color_system=None)

    def broken() -> Iterator[CanvasStep]:
        yield step([72, 111, None], "x..", (0, 2), 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Screen(console).live(broken(), CanvasText(decode, {EOS}))
    written = file.getvalue()
    assert written.count("Ho") >= 1
    assert written.rstrip().endswith("\x1b[?25h")  # the cursor is back
