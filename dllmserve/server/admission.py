"""Admission: how much may be under way, in requests and in work, and when to come back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dllmserve.core.request import Request
from dllmserve.core.work import forwards_of, work_of
from dllmserve.errors import CapacityError, OverloadedError

#: seconds of work that are let in when no bound was given
WORK_SECONDS = 60.0
#: what an answer that ends by itself takes, in tokens and in forwards, until some have ended
TYPICAL = 128.0
#: how much each of them changes what is expected of the next
_LEARN = 1 / 16
#: busy seconds before the measured speed is believed
_WARM_S = 2.0
_MOST_RETRY_S = 30


@dataclass
class Place:
    """A request's place among those under way; give it back once.

    Attributes:
        work, forwards: what it may cost.
        open_ended: the answer ends by itself, so that these are not what its length allows.
        taken: not given back yet.
    """

    work: int
    forwards: int
    open_ended: bool = False
    taken: bool = True


class Admission:
    """Bounds what is under way.

    What a request may cost is known when it comes, but for answers that end by themselves: their
    length is an upper bound that few come near, so they count as what such answers took so far.

    Args:
        max_requests: waiting and running.
        max_work: of all of them together; None is what takes a minute at the measured speed.

    Attributes:
        requests, work: under way now.
        at_once: requests that the engine runs at once; below it no learned bound holds.
        closed_because: why nothing is taken, for clients; None while the door is open.
    """

    def __init__(self, max_requests: int, max_work: int | None) -> None:
        self.requests = 0
        self.work = 0
        self.closed_because: str | None = None
        self.at_once = 0
        self._max_requests, self._max_work = max_requests, max_work
        self._forwards = 0
        self._done = self._done_forwards = 0
        self._speed = 0.0
        self._tokens = self._steps = TYPICAL

    def take(self, requests: Sequence[Request]) -> list[Place]:
        """Take a place for each request, or none at all.

        Raises:
            CapacityError: there are more requests than ever have room.
            OverloadedError: there is no room now; it says when to try again.
        """
        if self.closed_because is not None:
            raise OverloadedError(self.closed_because, retry_after=self.retry_after())
        count = len(requests)
        if count > self._max_requests:
            raise CapacityError(
                f"{count} requests at once are over max_requests={self._max_requests}: "
                "send fewer at a time"
            )
        self.check_room(count)
        places = [self._place(request) for request in requests]
        work = sum(place.work for place in places)
        limit = self._max_work
        # what runs at once is no queue: the speed learned from single requests says nothing of it
        if limit is None and self._speed and self.requests + count > self.at_once:
            limit = int(self._speed * WORK_SECONDS)
        # alone, anything may run: what could never run is refused elsewhere
        if limit is not None and self.requests and self.work + work > limit:
            raise OverloadedError(
                f"work of {self.work} is under way and {work} more is over the "
                f"{limit} that this server takes on: try again later",
                retry_after=self.retry_after(),
            )
        for place in places:
            self._enter(place)
        return places

    def check_room(self, count: int) -> None:
        """Raise OverloadedError if so many requests more would be too many, whatever they are."""
        if self.requests + count > self._max_requests:
            raise OverloadedError(
                f"{self.requests} requests are under way and {count} more are over "
                f"max_requests={self._max_requests}: try again later",
                retry_after=self.retry_after(),
            )

    def take_anyway(self, request: Request) -> Place:
        """A place for a request that was accepted before this process began."""
        place = self._place(request)
        self._enter(place)
        return place

    def _place(self, request: Request) -> Place:
        """A place for a request, with what it may cost."""
        params = request.params
        if not params.early_end:
            return Place(work_of(request), forwards_of(request))
        forwards = min(forwards_of(request), math.ceil(self._steps))
        canvas = request.canvas_len
        if params.suffix_window is not None:
            seen = request.prompt_len + math.ceil(self._tokens) + params.suffix_window
            canvas = min(canvas, seen)
        return Place(forwards * canvas * request.rows_needed, forwards, open_ended=True)

    def _enter(self, place: Place) -> None:
        self.requests += 1
        self.work += place.work
        self._forwards += place.forwards

    def give_back(self, place: Place, forwards: int | None = None, tokens: int = 0) -> None:
        """Free a place.

        Args:
            place: from :meth:`take`.
            forwards: forward passes that the request took; None if it was dropped.
            tokens: of its answer.
        """
        if not place.taken:
            return
        place.taken = False
        self.requests -= 1
        self.work -= place.work
        self._forwards -= place.forwards
        if forwards is not None:
            self._done += place.work
            self._done_forwards += forwards
            if place.open_ended:
                self._steps += (forwards - self._steps) * _LEARN
                self._tokens += (tokens - self._tokens) * _LEARN

    def measure(self, busy_s: float, forwards: int) -> None:
        """Learn the speed from what the engine has done so far.

        Args:
            busy_s: seconds in which it had work.
            forwards: forward passes of all requests, each counted for itself.
        """
        known = self._done_forwards + self._forwards
        if busy_s > _WARM_S and known:
            # those under way count too: after some short ones, long ones would look like a
            # standstill otherwise, and so would the time spent on what was dropped
            self._speed = forwards / busy_s * (self._done + self.work) / known

    def retry_after(self) -> int:
        """Whole seconds until there may be room: 1 to 30."""
        if not self._speed:
            return 1
        return max(1, min(_MOST_RETRY_S, math.ceil(self.work / self._speed / 4)))
