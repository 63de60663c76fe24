"""PageNames: what full pages hold, as a chain of hashes, so that equal beginnings are found.

Of block-causal and autoregressive models alone: their K and V depend on what stands before, and on
the own window. With full attention they depend on the whole canvas.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256


class PageNames:
    """Names of the pages of one row, in order, as far as its tokens are known.

    K and V of a page follow from all tokens that its last position sees, so a name is a hash of
    them::

        position  0 1 2 3 4 5 6 7 8 9 ..
        pages     |   0   |   1   |         of 4
        windows   |     0     |     1       of 6
        name 0    ------------              of its place, and tokens 0 .. 5
        name 1    ------------------------  of name 0, its place, and tokens 6 .. 11

    SHA-256 is used because whoever could make two prompts of equal names would be shown another's
    answer.

    Args:
        page_size: positions of a page.
        window: see :class:`dllmserve.core.canvas.Canvas`.
        salt: rows with another one have no name in common.

    Example:
        >>> names = PageNames(4, 6, "")
        >>> names.learn(range(11))
        >>> len(names)
        1
    """

    def __init__(self, page_size: int, window: int, salt: str) -> None:
        self._page_size, self._window = page_size, window
        self._names: list[bytes] = []
        self._tokens = 0
        self._hash = sha256(f"{page_size} {window} {salt}\n".encode())

    def learn(self, ids: Sequence[int]) -> None:
        """Name the pages that follow from the row's first tokens, all that are known of it."""
        while (seen := self._sight(len(self._names))) <= len(ids):
            # several pages may see the same tokens
            self._hash.update(array("q", [len(self._names), *ids[self._tokens : seen]]).tobytes())
            self._tokens = seen
            self._names.append(self._hash.digest())

    def __len__(self) -> int:
        """Pages with a name."""
        return len(self._names)

    def __getitem__(self, page: int) -> bytes:
        """Name of a page, 32 bytes."""
        return self._names[page]

    def _sight(self, page: int) -> int:
        """Tokens that a page's last position sees."""
        return -(-(page + 1) * self._page_size // self._window) * self._window


@dataclass
class Prefix:
    """What a request may share of its pages.

    Attributes:
        names: of its pages, as far as its tokens are known.
        end: number of pages that it may take from others; it computes the rest itself, at least
            what its first token is read at.
        named: pages of its own that others can find.
        cached: given tokens whose K and V it did not have to compute.
    """

    names: PageNames
    end: int
    named: int = 0
    cached: int = 0
