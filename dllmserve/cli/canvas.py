"""The canvas as text: what the answer looks like while it is being filled in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
    """State of a slot; the value is its style. What is not committed is masked."""

    COMMITTED = ""
    FRESH = "bold green"
    SURE = "bright_cyan"
    LIKELY = "cyan"
    UNSURE = "dim cyan"
    WAITING = "dim bright_black"


#: least confidence of a proposal to look so
_SURE, _LIKELY = 0.9, 0.5


@dataclass(frozen=True)
class Piece:
    """Text of neighbouring slots in the same state."""

    text: str
    state: State


#: what masked slots look like, by how sure the model is of what it proposes for them; the last is
#: for slots for which it proposes nothing yet: those behind the active block
Marks = Mapping[State, str]
_MASKED = (State.SURE, State.LIKELY, State.UNSURE, State.WAITING)
MARKS: Marks = dict(zip(_MASKED, "▓▒░·", strict=True))
ASCII_MARKS: Marks = dict(zip(_MASKED, "%:_.", strict=True))
_KNOWN = (State.COMMITTED, State.FRESH)


class CanvasText:
    """Turns the steps of one answer into pieces of text.

    A masked slot is drawn as wide as the text that is proposed for it, in marks that get denser
    as the model gets surer: so words do not move when they are written.

    Ids are decoded in runs, never one by one: a character may be spread over several byte-level
    tokens.

    Args:
        decode: ids to text, without special tokens.
        end_ids: ids that end the answer; nothing behind a committed one is shown.
        marks: placeholders of masked slots.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        end_ids: Collection[int] = (),
        marks: Marks = MARKS,
    ) -> None:
        self._decode = decode
        self._end_ids = frozenset(end_ids)
        self._marks = marks
        self._known: list[bool] = []
        self._blank: dict[int, bool] = {}
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
        slots = list(zip(step.token_ids[place:], states[place:], strict=False))
        for hole, group in groupby(slots, key=lambda slot: self._is_hole(*slot)):
            ids, run = zip(*group, strict=True)
            if hole:
                found += (Piece(self._marks[state], state) for state in run)
            else:
                found += self._texts(ids, run)
        return [piece for piece in found if piece.text]

    def _states(self, step: CanvasStep) -> list[State]:
        """State of every slot up to the first committed end id."""
        states: list[State] = []
        (start, end), edited = step.block, {*step.edited}
        for place, (token, sure) in enumerate(zip(step.token_ids, step.confidence, strict=True)):
            if step.committed[place]:
                old = place < len(self._known) and self._known[place] and place not in edited
                states.append(State.COMMITTED if old else State.FRESH)
                if token in self._end_ids:
                    break
            elif token is None and not start <= place < end:
                states.append(State.WAITING)
            elif sure is None or sure < _LIKELY:
                states.append(State.UNSURE)
            else:
                states.append(State.SURE if sure >= _SURE else State.LIKELY)
        return states

    def _is_hole(self, token: int | None, state: State) -> bool:
        """Whether a masked slot has no proposal, or one without text, as an end id."""
        if state in _KNOWN:
            return False
        if token is not None and token not in self._blank:
            self._blank[token] = not self._decode([token])
        return token is None or self._blank[token]

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

    def _texts(self, ids: Sequence[int | None], run: Sequence[State]) -> Iterator[Piece]:
        """Texts of known slots. A character belongs to the slot that completes it."""
        known = [token for token in ids if token is not None]
        before, stop = "", 0
        for state, slots in groupby(run):
            start, stop = stop, stop + len(list(slots))
            text = self._decode(known[:stop])
            if stop < len(known):
                text = text.rstrip(BROKEN)
            if text.startswith(before):
                yield self._piece(text[len(before) :], state)
            else:  # a decoder that rewrites what it said before
                yield self._piece(self._decode(known[start:stop]), state)
            before = text

    def _piece(self, text: str, state: State) -> Piece:
        """A text, or marks in its place while it is not decided."""
        if state in _KNOWN:
            return Piece(text, state)
        mark = self._marks[state]
        shaded = (c if c.isspace() else mark * cell_len(c) for c in visible(text))
        return Piece("".join(shaded), state)


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
