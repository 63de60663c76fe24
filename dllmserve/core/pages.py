"""PageAllocator: which pages of the K,V store are free, who holds the others, what is in them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

#: Page 0 is never handed out: padding writes go there.
TRASH_PAGE = 0


class PageAllocator:
    """Hands out page numbers ``1 .. num_pages``; a page is free when nobody holds it any more.

    A page may have a name that says what it holds (see :class:`dllmserve.core.prefix.PageNames`).
    One with a name keeps its content while it is free, so that :meth:`find` leads to it, until its
    place is needed: the one that was let go longest ago goes first.

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
        #: nobody holds them, and nothing is in them
        self._free: deque[int] = deque(range(1, num_pages + 1))
        #: nobody holds them, and they have a name; the one let go longest ago first
        self._idle: dict[int, None] = {}
        self._holders: Counter[int] = Counter()
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be reserved now."""
        return len(self._free) + len(self._idle)

    def reserve(self, count: int) -> list[int]:
        """Take ``count`` pages. Raises ValueError if fewer are free: check first."""
        if count > self.num_free:
            raise ValueError(f"{count} pages asked for, {self.num_free} free")
        pages = [self._free.popleft() if self._free else self._oldest() for _ in range(count)]
        self._holders.update(pages)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Hold pages with content. Raises ValueError on one that is free and has no name."""
        for page in pages:
            if page in self._idle:
                del self._idle[page]
            elif page not in self._holders:
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
                if page in self._names:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def name(self, page: int, name: bytes) -> None:
        """Say what a page holds; the first page of a name stays the one that is found."""
        if page not in self._names and name not in self._named:
            self._names[page], self._named[name] = name, page

    def find(self, name: bytes) -> int | None:
        """The page that holds this, or None."""
        return self._named.get(name)

    def forget(self, pages: Iterable[int] | None = None) -> None:
        """Take the names of pages (None: of all) away, when what they hold is in doubt."""
        for page in [*self._names] if pages is None else pages:
            if page in self._names:
                del self._named[self._names.pop(page)]
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)

    def holders(self, page: int) -> int:
        """How many hold the page."""
        return self._holders[page]

    def check_integrity(self) -> None:
        """Raise ValueError unless every page is either free or held, once, and names add up."""
        free = [*self._free, *self._idle]
        if len(free) + len(self._holders) != self.num_pages:
            raise ValueError(
                f"{len(free)} free + {len(self._holders)} held != {self.num_pages} pages"
            )
        if len(set(free)) != len(free) or self._holders.keys() & set(free):
            raise ValueError("a page is free twice, or free and held")
        if {name: page for page, name in self._names.items()} != self._named:
            raise ValueError("a page has two names, or a name two pages")
        if not self._idle.keys() <= self._names.keys() or self._names.keys() & set(self._free):
            raise ValueError("a page without a name is kept, or one with a name is not")

    def _oldest(self) -> int:
        """The page that was let go longest ago, without its name."""
        page = next(iter(self._idle))
        del self._idle[page], self._named[self._names.pop(page)]
        return page
