"""FairQueue: requests that wait, by owner, and whose turn it is.

The turn is that of the owner who has been served least, in tokens that forward passes computed
for it: a "virtual token counter" (Sheng et al., Fairness in Serving Large Language Models, OSDI
2024). So owners with long requests and owners with short ones get the same work, not the same
number of requests. Tokens are counted when they are computed, so nothing has to be guessed of
answers that end early.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from dllmserve.core.line import Line
from dllmserve.core.plan import StepEntry
from dllmserve.core.request import Request

#: Where several owners share something, one may hold this many times of what is free of it. So
#: the first takes three quarters, and there is room for the next one: the dynamic threshold of
#: switches that share a buffer (Choudhury and Hahne, 1998).
TIMES_FREE = 3
#: More than this many times the tokens that make a step fast enough make it no faster.
TIMES_CHEAP = 16
#: Steps for which an owner counts as there after its last one.
STAYS = 256


def within_share(held: int, more: int, free: int) -> bool:
    """Whether an owner who holds so much may take more, if several share it.

    Args:
        held: what the owner has.
        more: what it asks for.
        free: what nobody has.

    Example:
        >>> within_share(held=5, more=1, free=3), within_share(held=6, more=1, free=2)
        (True, False)
    """
    return not (held and more) or held + more <= TIMES_FREE * (free - more)


@dataclass(eq=False)
class Share:
    """What one owner has of an engine.

    Attributes:
        line: requests that wait, in the order in which they came.
        running: requests that run.
        held: rows, pages and kept distributions of those.
        served: tokens that were computed for it, or for others before it came.
        asked, seen: tokens that it had for a step when it last had any, and which step that was.
        debt: tokens that it had too many of in that step.
    """

    line: Line[Request] = field(default_factory=Line)
    running: int = 0
    held: tuple[int, ...] = (0, 0, 0)
    served: int = 0
    asked: int = 0
    seen: int = 0
    debt: int = 0

    @property
    def active(self) -> bool:
        """Whether the owner has any request here."""
        return bool(self.running or self.line)


class FairQueue:
    """Requests that wait. With one owner, a queue: first come, first served.

    Who comes, or comes back, starts from what the last one whose turn it was had been served by
    then: idle times save up nothing, what an owner took while it was alone is not held against
    it, and one that asks for one thing after the other keeps what it is behind. When nobody is
    here, all is forgotten.

    Example:
        >>> queue = FairQueue()
        >>> len(queue), list(queue)
        (0, [])
    """

    def __init__(self) -> None:
        self._shares: dict[str, Share] = {}
        #: what the last one whose turn it was had been served before
        self._level = 0
        self._step = 0
        #: tokens for each owner of a rationed step, and the owners who asked for some
        self._part = 0
        self._asked: tuple[str, ...] = ()

    def append(self, request: Request) -> None:
        """Join, as the last of its owner's."""
        share = self._shares.setdefault(request.owner, Share())
        if not share.active:
            share.served = max(share.served, self._level)
        share.line.append(request)

    def pop(self, without: Container[str] = ()) -> Request | None:
        """Take out the first request of the owner whose turn it is; None if there is none.

        Args:
            without: owners who are passed over.
        """
        shares = [
            (share.served, share.held, index, share)
            for index, (owner, share) in enumerate(self._shares.items())
            if share.line and owner not in without
        ]
        return min(shares)[-1].line.popleft() if shares else None

    def put_back(self, requests: Iterable[Request]) -> None:
        """Put requests before all others of their owners, in their order."""
        for request in reversed(list(requests)):
            self._shares[request.owner].line.put_back([request])

    def discard(self, request: Request) -> None:
        """Leave, if it is there."""
        if request.owner in self._shares:
            self._shares[request.owner].line.discard(request)
            self._forget()

    def start(self, request: Request, needs: tuple[int, ...]) -> None:
        """A request that was taken out runs and holds what it needs.

        That alone counts as a forward of its canvas: filling its rows takes about as long, and
        whoever is admitted in one step takes turns.
        """
        share = self._shares[request.owner]
        self._level = max(self._level, share.served)
        share.running += 1
        share.held = tuple(a + b for a, b in zip(share.held, needs, strict=True))
        share.served += request.canvas_len * request.rows_needed

    def end(self, request: Request, needs: tuple[int, ...]) -> None:
        """It has ended and holds nothing any more."""
        share = self._shares[request.owner]
        share.running -= 1
        share.held = tuple(a - b for a, b in zip(share.held, needs, strict=True))
        self._forget()

    def held(self, owner: str) -> tuple[int, ...]:
        """Rows, pages and kept distributions of an owner's running requests."""
        return self._shares[owner].held

    def ration(
        self, ready: list[tuple[Request, StepEntry]], cheap: int
    ) -> list[tuple[Request, StepEntry]]:
        """Leave out of a step what would make it long for those who have little in it.

        Nobody gets more tokens than who has least, so the step has about as many as there are
        owners times the smallest demand. But one who asks for very little does not
        make steps so short that the others are much slower for it. That goes on for a while after
        somebody has got an answer: the next request may be on its way, and would have to wait for
        the end of a long step. For the same reason the steps of one with a name that is alone are
        not longer than is good for something.
        An entry is taken whole; :meth:`settle` takes what is too much of it off the next steps.

        Args:
            ready: what may be in the step, those who waited longest in front.
            cheap: tokens with which a step still computes half as many a second as it can.

        Returns:
            What may be in the step, in the same order; of one without a name everything.
        """
        self._step += 1
        asked: Counter[str] = Counter()
        for request, entry in ready:
            asked[request.owner] += entry.tokens
        for owner, tokens in asked.items():
            self._shares[owner].asked, self._shares[owner].seen = tokens, self._step
        present = [s for s in self._shares.values() if s.seen and self._step - s.seen <= STAYS]
        if len(present) > 1:
            most = max(min(s.asked for s in present), cheap // (len(present) - 1))
        elif cheap and ready and ready[0][0].owner:
            most = TIMES_CHEAP * cheap
        else:
            return ready
        self._part, self._asked = most, tuple(asked)
        left = {owner: most - self._shares[owner].debt for owner in asked}
        kept = []
        for request, entry in ready:
            if left[request.owner] > 0:
                left[request.owner] -= entry.tokens
                kept.append((request, entry))
        return kept or ready[:1]

    def settle(self, picked: Iterable[tuple[Request, StepEntry]]) -> None:
        """Note what is computed for whom.

        What an owner has too much of in a step that was rationed is taken off its next ones.

        Args:
            picked: what is in the step; other limits may have left out more than :meth:`ration`.
        """
        tokens: Counter[str] = Counter()
        for request, entry in picked:
            tokens[request.owner] += entry.tokens
        for owner, computed in tokens.items():
            self._shares[owner].served += computed
        for owner in self._asked:
            share = self._shares[owner]
            share.debt = max(0, share.debt + tokens[owner] - self._part)
        self._asked = ()

    @property
    def owners_waiting(self) -> int:
        """How many owners have requests that wait."""
        return sum(bool(share.line) for share in self._shares.values())

    def _forget(self) -> None:
        if not any(share.active for share in self._shares.values()):
            self._shares.clear()
            self._level = 0

    def __len__(self) -> int:
        return sum(len(share.line) for share in self._shares.values())

    def __iter__(self) -> Iterator[Request]:
        return chain.from_iterable(share.line for share in self._shares.values())
