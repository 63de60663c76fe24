"""Line: requests that wait, first come first served, and that may leave from any place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Line(Generic[T]):
    """A queue in which every operation takes the same time, however long it is.

    Example:
        >>> line = Line()
        >>> for name in "abc":
        ...     line.append(name)
        >>> line.discard("b")
        >>> line.put_back(["x"])
        >>> line.popleft(), list(line)
        ('x', ['a', 'c'])
    """

    def __init__(self) -> None:
        self._items: OrderedDict[T, None] = OrderedDict()

    def append(self, item: T) -> None:
        """Join at the end."""
        self._items[item] = None

    def popleft(self) -> T:
        """Take the first one out. Raises KeyError if there is none."""
        return self._items.popitem(last=False)[0]

    def put_back(self, items: Iterable[T]) -> None:
        """Put items before all others, in their order."""
        for item in reversed(list(items)):
            self._items[item] = None
            self._items.move_to_end(item, last=False)

    def discard(self, item: T) -> None:
        """Leave, if it is there."""
        self._items.pop(item, None)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)
