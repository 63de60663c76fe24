"""Canvas: what a request is given, what it is to fill, and in which blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

#: positions ``[start, end)``
Range = tuple[int, int]


@dataclass(frozen=True)
class Canvas:
    """Given tokens with holes in them, and the blocks that are filled one after another.

    ::

        position  0 1 2 3 4 5 6 7 8 9
        ids       a b _ _ c _ _ _ d e     _ any id
        holes         [2,4) [5,8)
        blocks    [0,4)   [4,8)           cut every 4 positions from 0 on

    Attributes:
        ids: tokens of positions 0, 1, .. up to the last given one; what they are in holes does
            not matter.
        holes: ranges of positions to fill, ascending, none empty, no two adjacent.
        blocks: ranges in the order in which they are filled, ascending; each has a position to
            fill, and each position to fill is in one.
        window: 0 where every position sees every other one; else positions see those of their own
            window of so many positions, cut from 0 on, and of earlier ones (1: causal attention).
        asked: positions of the answer that are wanted, from ``start`` on; None: all.
        frame: 0, or the length of frames, cut from ``start`` on: a frame is filled as a whole that
            sees itself and what is kept before it, and what is kept of it sees by ``window``.
        quota_len: a schedule's quotas are those of a block of so many positions; 0: of its masks.
        shift: 1 where the first position of a frame or window is decided by the forward that
            stores what stands before.

    Example:
        >>> answer_canvas([5, 6, 7], 20, 8).blocks
        ((3, 11), (11, 19), (19, 23))
    """

    ids: Sequence[int]
    holes: tuple[Range, ...]
    blocks: tuple[Range, ...]
    window: int = 0
    asked: int | None = None
    frame: int = 0
    quota_len: int = 0
    shift: int = 0

    def __len__(self) -> int:
        """Positions."""
        return max(len(self.ids), self.end)

    @property
    def start(self) -> int:
        """First position to fill: the answer starts there."""
        return self.holes[0][0]

    @property
    def end(self) -> int:
        """Position behind the last to fill."""
        return self.holes[-1][1]

    @property
    def answer_len(self) -> int:
        """Positions from ``start`` on that are wanted, given ones between holes included."""
        return self.end - self.start if self.asked is None else self.asked

    @property
    def given(self) -> int:
        """Number of tokens that are given."""
        return len(self) - sum(end - start for start, end in self.holes)

    @property
    def masks(self) -> tuple[int, ...]:
        """Positions to fill in each block."""
        return tuple(masks_in(self.holes, block) for block in self.blocks)

    @property
    def unit(self) -> int:
        """Positions that a forward of a block computes: a frame or a window; 0: the canvas."""
        return self.frame or self.window

    @property
    def origin(self) -> int:
        """Position from which frames or windows are cut."""
        return self.start if self.frame else 0

    def around(self, position: int) -> Range:
        """The frame or window of a position; the canvas may end inside the last one."""
        origin, unit = self.origin, self.unit
        low = origin + (position - origin) // unit * unit
        return low, min(low + unit, len(self))

    def filled(self, length: int) -> int:
        """Positions to fill among the first ``length`` of the answer; the others are given."""
        return masks_in(self.holes, (self.start, self.start + length))


def masks_in(holes: Iterable[Range], block: Range) -> int:
    """Positions of holes in a block."""
    low, high = block
    return sum(max(min(end, high) - max(start, low), 0) for start, end in holes)


def answer_canvas(prompt: Sequence[int], gen_length: int, block_length: int) -> Canvas:
    """A prompt and an answer behind it, whose blocks start at the prompt's end (LLaDA, Dream)."""
    start, end = len(prompt), len(prompt) + gen_length
    blocks = tuple((low, min(low + block_length, end)) for low in range(start, end, block_length))
    return Canvas(prompt, ((start, end),), blocks)


def template_canvas(ids: Sequence[int], holes: Sequence[Range], block_length: int) -> Canvas:
    """A row with holes in it, whose blocks are cut every ``block_length`` positions from 0 on.

    Blocks without a hole are left out: there is nothing to do. A hole that straddles a border is
    filled in two blocks.

    Raises:
        ValueError: no hole, or holes that are empty, or out of order, or adjacent.

    Example:
        >>> template_canvas([8, 9, 0, 0, 9, 9, 9, 9, 0, 8], [(2, 4), (8, 9)], 4).blocks
        ((0, 4), (8, 10))
    """
    edges = [edge for hole in holes for edge in hole]
    if not edges or edges[0] < 0 or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"holes must be ascending, not empty, and apart: {list(holes)}")
    total = max(len(ids), edges[-1])
    cut = [(low, min(low + block_length, total)) for low in range(0, total, block_length)]
    return Canvas(ids, tuple(holes), tuple(block for block in cut if masks_in(holes, block)))


def window_canvas(
    prompt: Sequence[int],
    gen_length: int,
    window: int,
    shift: int,
    sub_block: int | None = None,
    *,
    short: bool = False,
) -> Canvas:
    """A prompt and an answer behind it, for block-causal (or, with a window of 1, causal) models.

    See :func:`window_template`.

    Example:
        >>> window_canvas([5, 6, 7], 6, 4, 0).blocks
        ((0, 4), (4, 8), (8, 12))
        >>> window_canvas([5, 6, 7], 6, 4, 1, 2).blocks
        ((2, 4), (4, 5), (5, 6), (6, 8), (8, 9), (9, 10), (10, 12))
    """
    hole = (len(prompt), len(prompt) + gen_length)
    return window_template(prompt, [hole], window, shift, sub_block, short=short)


def window_template(
    ids: Sequence[int],
    holes: Sequence[Range],
    window: int,
    shift: int,
    sub_block: int | None = None,
    *,
    short: bool = False,
) -> Canvas:
    """A row with holes in it, for block-causal (or, with a window of 1, causal) models.

    A hole at its end goes on to the end of its last window, since what is filled there takes part
    in it, unless its last block may be ``short``; quotas are then those of a block's masks. A model
    whose logits are read one position earlier (``shift``) decides the first position of a window
    when it stores the window before: that position is a block of its own. ``sub_block`` cuts
    windows into smaller blocks, each filled before the next.

    Example:
        >>> window_template([5, 0, 7, 8], [(1, 2), (4, 6)], 4, 0).blocks
        ((0, 4), (4, 8))
    """
    (start, _), (low, asked) = holes[0], holes[-1]
    end = total = max(len(ids), asked)
    if asked == total and not short:
        end = -(-total // window) * window
        holes = [*holes[:-1], (low, end)]
    edges = {end} | set(range(start // window * window, end + 1, sub_block or window))
    edges |= set(range(start // window * window, end + 1, window))
    if shift:
        edges |= {low + 1 for low in range(-(-start // window) * window, end, window)}
    blocks = tuple(cut for cut in pairwise(sorted(edges)) if masks_in(holes, cut))
    return Canvas(
        ids,
        tuple(holes),
        blocks,
        window,
        asked - start,
        quota_len=0 if short else window,
        shift=shift,
    )


def framed_canvas(
    prompt: Sequence[int], gen_length: int, frame: int, *, whole: bool = False
) -> Canvas:
    """A prompt and an answer behind it, for models that keep causal K,V and fill whole blocks.

    The forward that stores what stands before a frame decides the frame's first position, which is
    a block of its own, and the last frame ends with the answer; or a frame is one ``whole`` block,
    and the last one goes on to its end.

    Example:
        >>> framed_canvas([5, 6, 7], 6, 4).blocks
        ((3, 4), (4, 7), (7, 8), (8, 9))
        >>> framed_canvas([5, 6, 7], 6, 4, whole=True).blocks
        ((3, 7), (7, 11))
    """
    start = len(prompt)
    end = start + (-(-gen_length // frame) * frame if whole else gen_length)
    lows = range(start, end, frame)
    edges = {*lows, end} | (set() if whole else {low + 1 for low in lows})
    return Canvas(
        prompt,
        ((start, end),),
        tuple(pairwise(sorted(edges))),
        window=1,
        asked=gen_length,
        frame=frame,
        shift=int(not whole),
    )
