"""Holdings: how much of a store each owner takes, so that the owner with most is limited first."""

from __future__ import annotations

from typing import Literal

#: an owner, as UTF-8
Owner = bytes
#: what is limited
What = Literal["results", "bytes", "tombstones"]
_ALL: tuple[What, ...] = ("results", "bytes", "tombstones")


class Holdings:
    """Counts for each owner, and their sums. Owners who hold nothing take no memory.

    Example:
        >>> held = Holdings()
        >>> held.add(b"ann", results=1, bytes=10)
        >>> held.add(b"bob", results=1, bytes=20)
        >>> held.total("bytes"), held.most("bytes"), held.most("results")
        (30, [b'bob'], [b'ann', b'bob'])
    """

    def __init__(self) -> None:
        self._held: dict[What, dict[Owner, int]] = {what: {} for what in _ALL}
        self._totals: dict[What, int] = dict.fromkeys(_ALL, 0)

    def add(self, owner: Owner, *, results: int = 0, bytes: int = 0, tombstones: int = 0) -> None:
        """Add to what an owner holds; negative numbers take away."""
        for what, more in zip(_ALL, (results, bytes, tombstones), strict=True):
            held = self._held[what]
            self._totals[what] += more
            held[owner] = held.get(owner, 0) + more
            if not held[owner]:
                del held[owner]

    def total(self, what: What) -> int:
        """What all owners hold together."""
        return self._totals[what]

    def most(self, what: What) -> list[Owner]:
        """The owners who hold most: nearly always one, and none if nobody holds anything.

        The time it takes grows with the number of owners.
        """
        held = self._held[what]
        most = max(held.values(), default=0)
        return [owner for owner, count in held.items() if count == most]

    def copy(self) -> Holdings:
        """An independent copy."""
        made = Holdings()
        made._held = {what: dict(held) for what, held in self._held.items()}
        made._totals = dict(self._totals)
        return made
