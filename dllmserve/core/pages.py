"""PageAllocator: which pages of the K,V store are free."""

from __future__ import annotations

from collections import deque

#: Page 0 is never handed out: padding writes go there.
TRASH_PAGE = 0


class PageAllocator:
    """Hands out page numbers ``1 .. num_pages``.

    Example:
        >>> pages = PageAllocator(4)
        >>> taken = pages.reserve(3)
        >>> pages.num_free
        1
        >>> pages.free(taken)
        >>> pages.check_integrity()
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free: deque[int] = deque(range(1, num_pages + 1))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        """Pages that can be reserved now."""
        return len(self._free)

    def reserve(self, count: int) -> list[int]:
        """Take ``count`` pages. Raises ValueError if fewer are free: check first."""
        if count > len(self._free):
            raise ValueError(f"{count} pages asked for, {len(self._free)} free")
        pages = [self._free.popleft() for _ in range(count)]
        self._used.update(pages)
        return pages

    def free(self, pages: list[int]) -> None:
        """Give pages back. Raises ValueError on a page that was not taken."""
        for page in pages:
            if page not in self._used:
                raise ValueError(f"page {page} is freed but was not in use")
            self._used.remove(page)
            self._free.append(page)

    def check_integrity(self) -> None:
        """Raise ValueError unless every page is either free or used, once."""
        if len(self._free) + len(self._used) != self.num_pages:
            raise ValueError(
                f"{len(self._free)} free + {len(self._used)} used != {self.num_pages} pages"
            )
        if len(set(self._free)) != len(self._free) or self._used.intersection(self._free):
            raise ValueError("a page is free twice, or free and used")
