"""The canvas as text: what the answer looks like while it is being filled in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

from rich.cells import cell_len
from rich.text import Text

from dllmserve.outputs import CanvasStep

#: what decoders put where bytes do not form a character
BROKEN = "\ufffd"
_TAB = 4


class State(Enum):
    """State of a slot; the value is its style."""

    COMMITTED = ""
    FRESH = "bold green"
    PROPOSED = "dim cyan"
    ACTIVE = "dim"
    MASKED = "dim bright_black"


@dataclass(frozen=True)
class Piece:
    """Text of neighbouring slots in the same state."""

    text: str
    state: State


@dataclass(frozen=True)
class Marks:
    """Placeholders of masked slots, inside and outside the active block."""

    active: str = "░"
    masked: str = "·"


ASCII_MARKS = Marks(active="_", masked=".")


class CanvasText:
    """Turns the steps of one answer into pieces of text.

    Ids are decoded in runs, never one by one: a character may be spread over several
    byte-level tokens.

    Args:
        decode: ids to text, without special tokens.
        end_ids: ids that end the answer; nothing behind a committed one is shown.
        marks: placeholders of masked slots.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        end_ids: Collection[int] = (),
        marks: Marks | None = None,
    ) -> None:
        self._decode = decode
        self._end_ids = frozenset(end_ids)
        self._marks = marks or Marks()
        self._known: list[bool] = []
        # the committed start of the answer never changes, so its text is kept
        self._settled = 0
        self._settled_text = ""

    def pieces(self, step: CanvasStep) -> list[Piece]:
        """The answer after a step; tokens committed since the last one are FRESH."""
        states = self._states(step)
        self._known = step.committed
        self._settle(step, states)
        found = [Piece(self._settled_text, State.COMMITTED)]
        place = self._settled
        for hole, slots in groupby(states[place:], key=lambda s: s in (State.ACTIVE, State.MASKED)):
            run = list(slots)
            if hole:
                found += self._holes(run)
            else:
                ids = [t for t in step.token_ids[place : place + len(run)] if t is not None]
                found += self._texts(ids, run)
            place += len(run)
        return [piece for piece in found if piece.text]

    def _states(self, step: CanvasStep) -> list[State]:
        """State of every slot up to the first committed end id."""
        states: list[State] = []
        start, end = step.block
        for place, (token, committed) in enumerate(
            zip(step.token_ids, step.committed, strict=True)
        ):
            if committed:
                old = place < len(self._known) and self._known[place]
                states.append(State.COMMITTED if old else State.FRESH)
                if token in self._end_ids:
                    break
            elif token is not None:
                states.append(State.PROPOSED)
            else:
                states.append(State.ACTIVE if start <= place < end else State.MASKED)
        return states

    def _settle(self, step: CanvasStep, states: list[State]) -> None:
        """Grow the settled text by whole blocks that can no longer change."""
        start = step.block[0]
        if start <= self._settled or start > len(states):
            return
        if any(s is not State.COMMITTED for s in states[:start]):
            return
        text = self._decode([t for t in step.token_ids[:start] if t is not None])
        if not text.endswith(BROKEN):  # a character that ends in the next block
            self._settled, self._settled_text = start, text

    def _holes(self, run: list[State]) -> Iterator[Piece]:
        for state, slots in groupby(run):
            mark = self._marks.active if state is State.ACTIVE else self._marks.masked
            yield Piece(mark * len(list(slots)), state)

    def _texts(self, ids: list[int], run: list[State]) -> Iterator[Piece]:
        """Texts of known slots. A character belongs to the slot that completes it."""
        before, stop = "", 0
        for state, slots in groupby(run):
            start, stop = stop, stop + len(list(slots))
            text = self._decode(ids[:stop])
            if stop < len(ids):
                text = text.rstrip(BROKEN)
            if text.startswith(before):
                yield Piece(text[len(before) :], state)
            else:  # a decoder that rewrites what it said before
                yield Piece(self._decode(ids[start:stop]), state)
            before = text


def visible(text: str) -> str:
    r"""A text that cannot move the cursor or restyle the terminal.

    Example:
        >>> visible("a\x1b[2Jb\r\n")
        'a�[2Jb�\n'
    """
    return "".join(
        c if c == "\n" or c.isprintable() else " " * _TAB if c == "\t" else BROKEN for c in text
    )


def fold(pieces: Sequence[Piece], width: int) -> tuple[list[Text], int]:
    """Lay pieces out as terminal lines, broken where the terminal itself would.

    Returns:
        The lines, and the index of the line where the work is going on: the first one
        with a slot that is not committed, or the last line.
    """
    lines = [_line()]
    used, focus = 0, -1
    for piece in pieces:
        chunk: list[str] = []
        for char in visible(piece.text):
            size = cell_len(char)
            if char == "\n" or used + size > width:
                lines[-1].append("".join(chunk), piece.state.value)
                lines.append(_line())
                chunk, used = [], 0
            if char != "\n":
                chunk.append(char)
                used += size
        lines[-1].append("".join(chunk), piece.state.value)
        if focus < 0 and piece.state is not State.COMMITTED:
            focus = len(lines) - 1
    return lines, focus if focus >= 0 else len(lines) - 1


def crop(lines: list[Text], focus: int, height: int) -> list[Text]:
    """At most ``height`` lines around the focus; what is left out is counted.

    Example:
        >>> [str(line) for line in crop([Text(c) for c in "abcdefgh"], 4, 4)]
        ['(4 lines above)', 'e', 'f', '(2 lines below)']
    """
    if len(lines) <= height:
        return lines
    if height < 3:  # no room for the counts
        return lines[focus : focus + max(height, 1)]
    start = min(max(focus - height // 2 + 1, 0), len(lines) - height)
    shown = lines[start : start + height]
    above, below = start, len(lines) - start - height
    if above:
        shown[0] = _line(f"({above + 1} lines above)")
    if below:
        shown[-1] = _line(f"({below + 1} lines below)")
    return shown


def _line(note: str = "") -> Text:
    """One line of the terminal: wrapping it again would make it two."""
    return Text(note, "dim" if note else "", no_wrap=True, overflow="ellipsis")
