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

    Example:
        >>> answer_canvas([5, 6, 7], 20, 8).blocks
        ((3, 11), (11, 19), (19, 23))
    """

    ids: Sequence[int]
    holes: tuple[Range, ...]
    blocks: tuple[Range, ...]

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
    def given(self) -> int:
        """Number of tokens that are given."""
        return len(self) - sum(end - start for start, end in self.holes)

    @property
    def masks(self) -> tuple[int, ...]:
        """Positions to fill in each block."""
        return tuple(masks_in(self.holes, block) for block in self.blocks)

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
