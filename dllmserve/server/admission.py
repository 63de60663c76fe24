"""Admission: how many requests, and how much work, may be under way; when to try again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dllmserve.core.fair import TIMES_FREE
from dllmserve.core.request import Request
from dllmserve.core.work import forwards_of, work_of
from dllmserve.errors import CapacityError, OverloadedError, QuotaError

#: seconds of work that may be under way when the operator gave no bound
WORK_SECONDS = 60.0
#: tokens, and forwards, that an answer with an early end is expected to take before any has ended
TYPICAL = 128.0
#: weight of each such answer in what is expected of the next
_LEARN = 1 / 16
#: busy seconds before the measured speed is used, and those after which half of it is forgotten
_WARM_S, _MEMORY_S = 2.0, 120.0
_MOST_RETRY_S = 30


@dataclass
class AdmissionSlot:
    """The room that one request takes among those under way. It is given back once.

    Attributes:
        owner: the owner of the request.
        work, forwards: what the request may cost.
        open_ended: the answer may end early, so work and forwards are expected values and not
            what its length allows.
        taken: whether the slot has not been given back yet.
    """

    owner: str
    work: int
    forwards: int
    open_ended: bool = False
    taken: bool = True


@dataclass
class Account:
    """What one owner has under way, and what its last answers with an early end took.

    Attributes:
        requests, work: under way now.
        tokens, forwards: expected of the owner's next answer with an early end. They are learned
            from the owner's own answers only.
    """

    requests: int = 0
    work: int = 0
    tokens: float = TYPICAL
    forwards: float = TYPICAL


class Admission:
    """Bounds the requests and the work under way, of all owners together and of each.

    The cost of a request is known when it arrives. An answer that may end early is the exception
    (``early_end``, or any of a block-causal or autoregressive model without ``ignore_eos``): few
    come near the length that they may have, so such an answer counts as what the owner's earlier
    ones took.

    Where there are several owners, one owner may have at most three times the slots, and the
    work, that are free. So the first owner can take three quarters, and the next owner always
    finds room. Each of n owners may have 1 / (n + 1) of the work in any case.

    Args:
        max_requests: requests waiting and running.
        max_work: work of all of them; None is what takes a minute at the measured speed.
        max_per_owner: requests of one owner; None sets no separate limit.
        several: whether there are several owners, so that each must leave room for others.
        progress: returns what the engine has done so far: the arguments of :meth:`measure`.

    Attributes:
        requests, work: under way now.
        at_once: requests that the engine runs at once; up to that number a learned bound on work
            does not apply.
        closed_because: why no request is taken, in words for clients; None while they are.
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
        #: one for each owner that has sent a request, so at most one for each key
        self._accounts: dict[str, Account] = {}
        self._forwards = 0
        self._done = self._done_forwards = 0.0
        self._past_busy = self._past_forwards = 0.0
        self._speed = 0.0
        self._progress = progress

    def take(self, requests: Sequence[Request], owner: str = "") -> list[AdmissionSlot]:
        """Take a slot for each request, or none at all.

        Raises:
            CapacityError: so many requests at once never have room.
            QuotaError: the owner has used its share; the error says when to try again.
            OverloadedError: there is no room now; the error says when to try again.
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
        """Raise OverloadedError if ``count`` more requests have no room, whatever their work."""
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
        """How many of ``free`` slots an owner may take who already holds ``held``."""
        if not self._several:
            return free
        # held + more <= TIMES_FREE * (free - more); an owner without a slot gets a free one
        return min(free, max((TIMES_FREE * free - held) // (TIMES_FREE + 1), 1 - held))

    def _check_work(self, slots: Sequence[AdmissionSlot], owner: str) -> None:
        """Raise OverloadedError if the slots would be too much work."""
        held, work = self._account(owner), sum(slot.work for slot in slots)
        self.measure(*self._progress())
        limit = self._max_work
        # requests that run at once do not queue, so the speed of single requests says nothing here
        if limit is None and self._speed and self.requests + len(slots) > self.at_once:
            limit = int(self._speed * WORK_SECONDS)
        # an owner with nothing under way may run anything; the validator refuses what can never run
        if limit is None or not held.requests:
            return
        if not self._several and self.work + work > limit:
            raise OverloadedError(
                f"work of {self.work} is under way and {work} more is over the "
                f"{limit} that this server takes on: try again later",
                self.retry_after(),
            )
        # owners are served in turns, so each may have an equal part of the work, with one part kept
        # for the next owner, whatever the others have
        free = limit - self.work - work
        if self._several and held.work + work > max(limit // (self._active + 1), TIMES_FREE * free):
            raise QuotaError(
                f"work of {held.work} of this key is under way and {work} more is over its part "
                f"of the {limit} that this server takes on: try again later",
                self.retry_after(owner),
            )

    def take_anyway(self, request: Request, owner: str = "") -> AdmissionSlot:
        """Take a slot, without any check, for a job that an earlier process had accepted."""
        slot = self._slot_for(request, owner)
        self._enter(slot)
        return slot

    @property
    def _active(self) -> int:
        """Owners who have something under way."""
        return sum(account.requests > 0 for account in self._accounts.values())

    def engine_name(self, owner: str) -> str:
        """The name of an owner for the engines: "" if there is only one owner.

        It reveals nothing of the key to an engine, which may run code of a checkpoint.
        """
        return (owner[:8] or "nobody") if self._several else ""

    def _account(self, owner: str) -> Account:
        return self._accounts.setdefault(owner, Account())

    def _slot_for(self, request: Request, owner: str) -> AdmissionSlot:
        """A slot for a request, with what it may cost."""
        params, most = request.params, forwards_of(request)
        # a request that grows fills nothing behind its end either
        if not (params.early_end or (request.grows and not params.ignore_eos)):
            return AdmissionSlot(owner, work_of(request), most)
        expected = self._account(owner)
        forwards, tokens = min(most, math.ceil(expected.forwards)), math.ceil(expected.tokens)
        work = work_of(request, forwards, tokens)
        return AdmissionSlot(owner, work, forwards, open_ended=True)

    def _enter(self, slot: AdmissionSlot, sign: int = 1) -> None:
        account = self._account(slot.owner)
        account.requests += sign
        account.work += sign * slot.work
        self.requests += sign
        self.work += sign * slot.work
        self._forwards += sign * slot.forwards

    def give_back(self, slot: AdmissionSlot, forwards: int | None = None, tokens: int = 0) -> None:
        """Free a slot. A second call for the same slot does nothing.

        Args:
            slot: from :meth:`take`.
            forwards: forward passes that the request took; None if it was dropped.
            tokens: tokens of its answer.
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
        """Learn the speed from what the engine has done since the last call.

        Args:
            busy_s: seconds since the start in which the engine had work.
            forwards: forward passes since the start, summed over the requests in them.
        """
        busy, passed = busy_s - self._past_busy, forwards - self._past_forwards
        known = self._done_forwards + self._forwards
        if busy > _WARM_S and known:
            # requests under way count as well. Otherwise long requests after short ones would look
            # like a standstill, and so would the time spent on dropped requests
            self._speed = passed / busy * (self._done + self.work) / known
        if busy > _MEMORY_S:  # forget half: requests of long ago say little about those of now
            self._past_busy += busy / 2
            self._past_forwards += passed / 2
            self._done /= 2
            self._done_forwards /= 2

    def retry_after(self, owner: str | None = None) -> int:
        """Whole seconds until there may be room, from 1 to 30.

        Args:
            owner: the owner whose requests have to end first; None for those of any owner.
        """
        self.measure(*self._progress())
        work, speed = self.work, self._speed
        if owner is not None:
            work = self._account(owner).work
            speed /= max(1, self._active)
        if not speed:
            return 1
        return max(1, min(_MOST_RETRY_S, math.ceil(work / speed / 4)))
