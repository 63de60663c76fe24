"""Plain text as it is decided: what a pipe gets while an answer is being filled in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from dllmserve.cli.canvas import BROKEN
from dllmserve.outputs import CanvasStep


def plain_pieces(
    steps: Iterable[CanvasStep], decode: Callable[[list[int]], str], stops: Sequence[str] = ()
) -> Iterator[str]:
    """Pieces of an answer's text; joined, they are exactly the finished text.

    A piece holds only what can no longer change: tokens that are committed without a gap
    from the left, without an unfinished character and without what may turn out to be the
    beginning of a stop string.
    """
    shown = ""
    held_back = max((len(stop) for stop in stops), default=1) - 1
    for step in steps:
        if step.output is not None:
            yield step.output.text[len(shown) :]
            return
        gap = step.committed.index(False) if False in step.committed else len(step.committed)
        text = decode([t for t in step.token_ids[:gap] if t is not None])
        text = text.rstrip(BROKEN)
        text = text[: max(len(text) - held_back, 0)]
        if len(text) > len(shown) and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
