"""Admission: how much may be under way, in requests and in work, and when to come back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dllmserve.core.fair import TIMES_FREE
from dllmserve.core.request import Request
from dllmserve.core.work import forwards_of, work_of
from dllmserve.errors import CapacityError, OverloadedError, QuotaError

#: seconds of work that are let in when no bound was given
WORK_SECONDS = 60.0
#: what an answer that ends by itself takes, in tokens and in forwards, until some have ended
TYPICAL = 128.0
#: how much each of them changes what is expected of the next
_LEARN = 1 / 16
#: busy seconds before the measured speed is believed, and those after which half is forgotten
_WARM_S, _MEMORY_S = 2.0, 120.0
_MOST_RETRY_S = 30


@dataclass
class AdmissionSlot:
    """A request's slot among those under way; give it back once.

    Attributes:
        owner: whose it is.
        work, forwards: what it may cost.
        open_ended: the answer ends by itself, so that these are not what its length allows.
        taken: not given back yet.
    """

    owner: str
    work: int
    forwards: int
    open_ended: bool = False
    taken: bool = True


@dataclass
class Account:
    """What one owner has under way, and what its answers that end by themselves took of late.

    Attributes:
        requests, work: under way now.
        tokens, forwards: expected of the next answer that ends by itself. Each owner teaches
            only what is expected of itself.
    """

    requests: int = 0
    work: int = 0
    tokens: float = TYPICAL
    forwards: float = TYPICAL


class Admission:
    """Bounds what is under way, of all together and of each owner.

    What a request may cost is known when it comes, but for answers that end by themselves: their
    length is an upper bound that few come near, so they count as what such answers took so far.

    Where there are several owners, one may have at most three times what is free, of slots and
    of work: the first takes three quarters, and there is always room for the next. Of work each
    of n owners may have 1 / (n + 1) of it in any case.

    Args:
        max_requests: waiting and running.
        max_work: of all of them together; None is what takes a minute at the measured speed.
        max_per_owner: requests of one owner; None is no limit of its own.
        several: there are several owners, so that one must leave room for others.
        progress: what the engine has done so far, as :meth:`measure` takes it.

    Attributes:
        requests, work: under way now.
        at_once: requests that the engine runs at once; below it no learned bound holds.
        closed_because: why nothing is taken, for clients; None while the door is open.
    """

    def __init__(
        self,
        max_requests: int,
        max_work: int | None,
        *,
        max_per_owner: int | None = None,
        several: bool = False,
        progress: Callable[[], tuple[float, int]] = lambda: (0.0, 0),
    ) -> None:
        self.requests = 0
        self.work = 0
        self.closed_because: str | None = None
        self.at_once = 0
        self._max_requests, self._max_work = max_requests, max_work
        self._max_per_owner, self._several = max_per_owner, several
        #: one for each owner there ever was: as many as there are keys
        self._accounts: dict[str, Account] = {}
        self._forwards = 0
        self._done = self._done_forwards = 0.0
        self._past_busy = self._past_forwards = 0.0
        self._speed = 0.0
        self._progress = progress

    def take(self, requests: Sequence[Request], owner: str = "") -> list[AdmissionSlot]:
        """Take a slot for each request, or none at all.

        Raises:
            CapacityError: there are more requests than ever have room.
            QuotaError: the owner has its share; it says when to try again.
            OverloadedError: there is no room now; it says when to try again.
        """
        if self.closed_because is not None:
            raise OverloadedError(self.closed_because, retry_after=self.retry_after())
        self.check_ever(len(requests))
        self.check_room(len(requests), owner)
        slots = [self._slot_for(request, owner) for request in requests]
        self._check_work(slots, owner)
        for slot in slots:
            self._enter(slot)
        return slots

    def check_ever(self, count: int) -> None:
        """Raise CapacityError if so many requests at once never have room."""
        most = self._max_requests
        limit, why = most, f"max_requests={most}"
        if self._several:
            limit = self._room(most, 0)
            why = f"the {limit} that one key may have of max_requests={most}"
        if self._max_per_owner is not None and self._max_per_owner < limit:
            limit, why = self._max_per_owner, f"max_parallel_per_key={self._max_per_owner}"
        if count > limit:
            raise CapacityError(f"{count} requests at once are over {why}: send fewer at a time")

    def check_room(self, count: int, owner: str = "") -> None:
        """Raise OverloadedError if so many requests more would be too many, whatever they are."""
        held = self._account(owner).requests
        most = self._max_per_owner
        if most is not None and held + count > most:
            raise QuotaError(
                f"{held} requests of this key are under way and {count} more are over "
                f"max_parallel_per_key={most}: wait for one to end",
                self.retry_after(owner),
                code="too_many_parallel_requests",
            )
        free = self._max_requests - self.requests
        room = self._room(free, held)
        if count <= room:
            return
        full = count > free
        fewer = f", or send {room} at most" if room > 0 else ""
        if full or not held:
            raise OverloadedError(
                f"{self.requests} requests are under way and {count} more "
                f"{'are over' if full else 'would leave too little for others of'} "
                f"max_requests={self._max_requests}: try again later{fewer}",
                self.retry_after(),
            )
        raise QuotaError(
            f"{held} requests of this key are under way and {count} more would leave too "
            f"little for others of max_requests={self._max_requests}: wait for one to "
            f"end{fewer}",
            self.retry_after(owner),
        )

    def _room(self, free: int, held: int) -> int:
        """How many of so many free slots an owner may take who holds so many."""
        if not self._several:
            return free
        # held + more <= TIMES_FREE * (free - more); one slot may always be had, if there is one
        return min(free, max((TIMES_FREE * free - held) // (TIMES_FREE + 1), 1 - held))

    def _check_work(self, slots: Sequence[AdmissionSlot], owner: str) -> None:
        """Raise OverloadedError if the slots would be too much work."""
        held, work = self._account(owner), sum(slot.work for slot in slots)
        self.measure(*self._progress())
        limit = self._max_work
        # what runs at once is no queue: the speed learned from single requests says nothing of it
        if limit is None and self._speed and self.requests + len(slots) > self.at_once:
            limit = int(self._speed * WORK_SECONDS)
        # who has nothing under way may run anything: what could never run is refused elsewhere
        if limit is None or not held.requests:
            return
        if not self._several and self.work + work > limit:
            raise OverloadedError(
                f"work of {self.work} is under way and {work} more is over the "
                f"{limit} that this server takes on: try again later",
                self.retry_after(),
            )
        # owners are served in turns, so each may have the part that is left to it when one more
        # comes, whatever the others have
        free = limit - self.work - work
        if self._several and held.work + work > max(limit // (self._active + 1), TIMES_FREE * free):
            raise QuotaError(
                f"work of {held.work} of this key is under way and {work} more is over its part "
                f"of the {limit} that this server takes on: try again later",
                self.retry_after(owner),
            )

    def take_anyway(self, request: Request, owner: str = "") -> AdmissionSlot:
        """A slot for a request that was accepted before this process began."""
        slot = self._slot_for(request, owner)
        self._enter(slot)
        return slot

    @property
    def _active(self) -> int:
        """Owners who have something under way."""
        return sum(account.requests > 0 for account in self._accounts.values())

    def engine_name(self, owner: str) -> str:
        """The name under which the engines know an owner: "" if there is only one.

        It tells an engine, which may run code of a checkpoint, nothing of the key.
        """
        return (owner[:8] or "nobody") if self._several else ""

    def _account(self, owner: str) -> Account:
        return self._accounts.setdefault(owner, Account())

    def _slot_for(self, request: Request, owner: str) -> AdmissionSlot:
        """A slot for a request, with what it may cost."""
        params = request.params
        if not params.early_end:
            return AdmissionSlot(owner, work_of(request), forwards_of(request))
        expected = self._account(owner)
        forwards = min(forwards_of(request), math.ceil(expected.forwards))
        canvas = request.canvas_len
        if params.suffix_window is not None:
            seen = request.prompt_len + math.ceil(expected.tokens) + params.suffix_window
            canvas = min(canvas, seen)
        return AdmissionSlot(
            owner, forwards * canvas * request.rows_needed, forwards, open_ended=True
        )

    def _enter(self, slot: AdmissionSlot, sign: int = 1) -> None:
        account = self._account(slot.owner)
        account.requests += sign
        account.work += sign * slot.work
        self.requests += sign
        self.work += sign * slot.work
        self._forwards += sign * slot.forwards

    def give_back(self, slot: AdmissionSlot, forwards: int | None = None, tokens: int = 0) -> None:
        """Free a slot.

        Args:
            slot: from :meth:`take`.
            forwards: forward passes that the request took; None if it was dropped.
            tokens: of its answer.
        """
        if not slot.taken:
            return
        slot.taken = False
        self._enter(slot, -1)
        if forwards is not None:
            self._done += slot.work
            self._done_forwards += forwards
            if slot.open_ended:
                account = self._account(slot.owner)
                account.forwards += (forwards - account.forwards) * _LEARN
                account.tokens += (tokens - account.tokens) * _LEARN

    def measure(self, busy_s: float, forwards: int) -> None:
        """Learn the speed from what the engine has done of late.

        Args:
            busy_s: seconds in which it had work, since the start.
            forwards: forward passes of all requests, each counted for itself, since the start.
        """
        busy, passed = busy_s - self._past_busy, forwards - self._past_forwards
        known = self._done_forwards + self._forwards
        if busy > _WARM_S and known:
            # those under way count too: after some short ones, long ones would look like a
            # standstill otherwise, and so would the time spent on what was dropped
            self._speed = passed / busy * (self._done + self.work) / known
        if busy > _MEMORY_S:  # what was asked for long ago says little of what is asked for now
            self._past_busy += busy / 2
            self._past_forwards += passed / 2
            self._done /= 2
            self._done_forwards /= 2

    def retry_after(self, owner: str | None = None) -> int:
        """Whole seconds until there may be room: 1 to 30.

        Args:
            owner: whose requests have to end first; None is anybody's.
        """
        self.measure(*self._progress())
        work, speed = self.work, self._speed
        if owner is not None:
            work = self._account(owner).work
            speed /= max(1, self._active)
        if not speed:
            return 1
        return max(1, min(_MOST_RETRY_S, math.ceil(work / speed / 4)))
