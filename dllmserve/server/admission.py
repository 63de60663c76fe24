"""Admission: how much may be under way, in requests and in work, and when to come back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dllmserve.core.request import Request
from dllmserve.errors import OverloadedError

#: seconds of work that are let in when no bound was given
WORK_SECONDS = 60.0
#: busy seconds before the measured speed is believed
_WARM_S = 2.0
_MOST_RETRY_S = 30


def work_of(request: Request) -> int:
    """Steps x canvas tokens x rows: what a request costs at most, known on arrival.

    A rule that writes several tokens a step, an early end and a cache make it cost less.
    """
    if request.quotas:
        forwards = sum(len(block) for block in request.quotas)
    else:
        forwards = request.params.gen_length
    return forwards * request.canvas_len * request.rows_needed


@dataclass
class Place:
    """A request's place among those under way; give it back once."""

    work: int
    taken: bool = True


class Admission:
    """Bounds what is under way.

    Args:
        max_requests: waiting and running.
        max_work: of all of them together; None is what takes a minute at the measured speed.

    Attributes:
        requests, work: under way now.
        open: False refuses everything (``closed_because`` says why).
    """

    def __init__(self, max_requests: int, max_work: int | None) -> None:
        self.requests = 0
        self.work = 0
        self.closed_because: str | None = None
        self._max_requests, self._max_work = max_requests, max_work
        self._done = 0
        self._speed = 0.0

    def take(self, requests: Sequence[Request]) -> list[Place]:
        """Take a place for each request, or none at all.

        Raises:
            OverloadedError: there is no room; it says when to try again.
        """
        if self.closed_because is not None:
            raise OverloadedError(self.closed_because, retry_after=self.retry_after())
        count = len(requests)
        if count > self._max_requests:
            raise OverloadedError(
                f"{count} requests at once are over max_requests={self._max_requests}",
                retry_after=self.retry_after(),
            )
        if self.requests + count > self._max_requests:
            raise OverloadedError(
                f"{self.requests} requests are under way and {count} more are over "
                f"max_requests={self._max_requests}: try again later",
                retry_after=self.retry_after(),
            )
        works = [work_of(request) for request in requests]
        limit = self._max_work
        if limit is None and self._speed:
            limit = int(self._speed * WORK_SECONDS)
        # alone, anything may run: what could never run is refused elsewhere
        if limit is not None and self.requests and self.work + sum(works) > limit:
            raise OverloadedError(
                f"work of {self.work} is under way and {sum(works)} more is over the "
                f"{limit} that this server takes on: try again later",
                retry_after=self.retry_after(),
            )
        self.requests += count
        self.work += sum(works)
        return [Place(work) for work in works]

    def take_anyway(self, request: Request) -> Place:
        """A place for a request that was accepted before this process began."""
        place = Place(work_of(request))
        self.requests += 1
        self.work += place.work
        return place

    def give_back(self, place: Place, *, done: bool) -> None:
        """Free a place. ``done``: its work was done and not dropped."""
        if not place.taken:
            return
        place.taken = False
        self.requests -= 1
        self.work -= place.work
        if done:
            self._done += place.work

    def measure(self, busy_s: float) -> None:
        """Learn the speed from the seconds in which the engine had work, so far."""
        if busy_s > _WARM_S and self._done:
            self._speed = self._done / busy_s

    def retry_after(self) -> int:
        """Whole seconds until there may be room: 1 to 30."""
        if not self._speed:
            return 1
        return max(1, min(_MOST_RETRY_S, math.ceil(self.work / self._speed / 4)))
