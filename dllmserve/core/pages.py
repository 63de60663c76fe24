"""PageAllocator: which pages of the K,V store are free, and how many hold each of the others."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

#: Page 0 is never handed out: padding writes go there.
TRASH_PAGE = 0


class PageAllocator:
    """Hands out page numbers ``1 .. num_pages``; a page is free when nobody holds it any more.

    Example:
        >>> pages = PageAllocator(4)
        >>> taken = pages.reserve(3)
        >>> pages.share(taken[:1])
        >>> pages.free(taken)
        >>> pages.num_free
        3
        >>> pages.free(taken[:1])
        >>> pages.check_integrity()
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free: deque[int] = deque(range(1, num_pages + 1))
        self._holders: Counter[int] = Counter()

    @property
    def num_free(self) -> int:
        """Pages that can be reserved now."""
        return len(self._free)

    def reserve(self, count: int) -> list[int]:
        """Take ``count`` pages. Raises ValueError if fewer are free: check first."""
        if count > len(self._free):
            raise ValueError(f"{count} pages asked for, {len(self._free)} free")
        pages = [self._free.popleft() for _ in range(count)]
        self._holders.update(pages)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Hold pages that somebody holds already. Raises ValueError if nobody does."""
        for page in pages:
            if page not in self._holders:
                raise ValueError(f"page {page} is shared but was not in use")
            self._holders[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Let pages go. Raises ValueError on a page that nobody holds."""
        for page in pages:
            if page not in self._holders:
                raise ValueError(f"page {page} is freed but was not in use")
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                self._free.append(page)

    def sole(self, pages: Iterable[int]) -> int:
        """How many of these pages would be free if one of their holders let them go."""
        return sum(self._holders[page] == 1 for page in pages)

    def check_integrity(self) -> None:
        """Raise ValueError unless every page is either free or held, once."""
        if len(self._free) + len(self._holders) != self.num_pages:
            raise ValueError(
                f"{len(self._free)} free + {len(self._holders)} held != {self.num_pages} pages"
            )
        if len(set(self._free)) != len(self._free) or self._holders.keys() & set(self._free):
            raise ValueError("a page is free twice, or free and held")
