"""Connections: counts a server's connections, and drops idle ones when there are too many."""

from __future__ import annotations

import ipaddress
import math
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from dllmserve._checks import check_float, check_int
from dllmserve.errors import ConfigError
from dllmserve.server.http.refusal import RefusalHeaders, no_headers
from dllmserve.server.http.respond import Headers

#: seconds that a new connection has for its first request before it may be dropped
GRACE_S = 0.05
#: least seconds between two connections that are dropped for new ones, so that dropping takes a
#: bounded share of the time
PACE_S = 0.001
#: seconds by which several drops in a row may be ahead of that pace
AHEAD_S = 0.016
#: requests of probes and strangers that are answered at a time. The others wait. A flood of them
#: would make each turn of the event loop long, and a client's request takes about ten turns
SIDE_BY_SIDE = 16
#: connections that are dropped at once, at least and at most, when there are no open files left
_FEWEST, _MOST = 8, 64

#: what a request's head says of its sender. A "probe" asks for a path that needs no key; a
#: "stranger" has no valid key and gets a 401; both are answered at once. A sender with a valid key
#: is a "key". Where no keys are configured, every other sender is a "client"
Sender = Literal["probe", "stranger", "client", "key"]
#: finds the kind of sender from the path and the headers of a request
Classify = Callable[[str, Headers], Sender]
#: why a connection was closed without an answer
DROPS = ("idle", "files", "full", "handshake", "slow_reader")


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """Limits on connections. A connection over a limit gets the status below and is closed.

    Attributes:
        header_timeout_s: seconds from a request's first byte, or from the moment that the
            connection was accepted, to the end of its headers; 408, or no answer if it had not
            begun. It also limits a body that the application does not wait for any more.
        max_header_bytes: request line and headers together; chunk extensions; trailers; 431.
        max_headers: number of headers; 431.
        max_target_bytes: path and query; 414.
        max_connections: connections with a request under way, without those of probes and
            strangers; 503.
        reserve: further connections. Requests with a key may use half of them; the other half is
            kept for reading heads and for answering probes.
        max_per_address: open connections of one address, or of one IPv6 network of 64 bits; 429.
            None: no limit.
        write_timeout_s: seconds for which a client may leave a full write buffer unread; no status.

    Raises:
        ConfigError: a limit is not positive.
    """

    header_timeout_s: float = 10.0
    max_header_bytes: int = 65536
    max_headers: int = 100
    max_target_bytes: int = 8192
    max_connections: int = 1024
    reserve: int = 128
    max_per_address: int | None = None
    write_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("header_timeout_s", "write_timeout_s"):
            check_float(ConfigError, name, getattr(self, name), 0, low_open=True)
        for name in ("max_header_bytes", "max_headers", "max_target_bytes", "max_connections"):
            check_int(ConfigError, name, getattr(self, name), 1)
        check_int(ConfigError, "reserve", self.reserve, 0)
        if self.max_per_address is not None:
            check_int(ConfigError, "max_per_address", self.max_per_address, 1)


@dataclass
class ConnectionStats:
    """Counts of one server, for metrics.

    Attributes:
        open: connections open now, from the moment that they are accepted.
        busy: those of them that may not be dropped for new ones.
        refused: connections and requests refused before they reached the application, by status.
        dropped: connections that were closed without an answer, by reason, one of :data:`DROPS`.
    """

    open: int = 0
    busy: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False, slots=True)
class ConnectionSlot:
    """The slot of one connection, from the moment that it is accepted to its end.

    Attributes:
        group: the address that it counts for, see :func:`group`.
        deadline: when its first head has to be complete, on the clock of :class:`Connections`.
        drop: ends the connection at once.
        busy: whether a request of a client is under way.
        used: whether a request has been answered.
        gone: whether the connection has ended or was dropped.
    """

    group: str | None
    deadline: float
    drop: Callable[[], None]
    busy: bool = False
    used: bool = False
    gone: bool = False


class _Group:
    """The idle connections of one address."""

    def __init__(self) -> None:
        # slots and the time since when they are idle, oldest first
        self.fresh: dict[ConnectionSlot, float] = {}  # without an answer so far
        self.used: dict[ConnectionSlot, float] = {}

    def __len__(self) -> int:
        return len(self.fresh) + len(self.used)

    def of(self, slot: ConnectionSlot) -> dict[ConnectionSlot, float]:
        return self.used if slot.used else self.fresh

    def next(self, now: float) -> tuple[ConnectionSlot, float]:
        """The slot to drop next, and the seconds for which it must not be dropped yet."""
        if len(self.fresh) > len(self.used):
            slot, since = next(iter(self.fresh.items()))
            left = since + GRACE_S - now
            if left <= 0 or not self.used:
                return slot, left
        return next(iter(self.used)), 0.0


def _clients(path: str, headers: Headers) -> Sender:
    """The default: everybody is a client, because nobody needs a key."""
    del path, headers
    return "client"


class Connections:
    """All connections of one server.

    A connection is busy while a request of a client is under way, and idle otherwise: in the
    handshake, in a head, between requests, when it only waits to be closed, and while a probe or a
    stranger is answered, which takes no time if the answer is read. Busy connections are never
    dropped.

    When all ``max_connections + reserve`` slots are taken, an idle connection is dropped for each
    new one. It is one of the address with most idle connections. These are in two groups: those
    that have had an answer, and those that have not. From the larger group, the connection that is
    idle for longest is dropped. A connection without an answer has :data:`GRACE_S` for its first
    request, as long as there is another to drop.

    So a sender without a key cannot keep others out, whatever it sends or leaves unread, and an
    address that opens many connections loses its own ones.

    Args:
        limits: for all of them.
        stats: counted into; by default new ones.
        classify: tells the kind of sender of a request; by default everybody is a client.
        refusal_headers: further headers for the answer to a refused request.
        clock: returns seconds, as the event loop's clock does.

    Example:
        >>> connections = Connections(ConnectionLimits(max_connections=1, reserve=0))
        >>> slot = connections.enter("10.0.0.1", drop=lambda: print("dropped"))
        >>> connections.begin(slot, "/", ()), connections.stats.busy
        (True, 1)
        >>> connections.enter("10.0.0.2", drop=lambda: None) is None
        True
    """

    def __init__(
        self,
        limits: ConnectionLimits,
        stats: ConnectionStats | None = None,
        *,
        classify: Classify = _clients,
        refusal_headers: RefusalHeaders = no_headers,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.stats = stats if stats is not None else ConnectionStats()
        self.refusal_headers = refusal_headers
        self._classify = classify
        self._clock = clock
        self._most = limits.max_connections + limits.reserve
        self._may_be_busy: dict[Sender, int] = {
            "client": limits.max_connections,
            "key": limits.max_connections + limits.reserve // 2,
        }
        self._held: Counter[str | None] = Counter()
        self._idle: dict[str | None, _Group] = {}  # no group is empty
        # requests of probes and strangers: how many have their turn, and what starts the next
        self._turns = 0
        self._waiting: deque[Callable[[], bool]] = deque()
        # the time up to which the connections dropped so far have used the pace
        self._paced_to = -math.inf

    def seconds_to_room(self) -> float:
        """Seconds for which no connection is accepted; 0 if one may be accepted now.

        There is a wait when the pace of drops is used up, or all idle connections are too new.
        """
        if self.stats.open < self._most or not self._idle:
            return 0.0
        ahead = self._paced_to - self._clock()
        if ahead > AHEAD_S:
            return ahead
        _, left = self._next()
        return max(0.0, left)

    def crowded(self, group: str | None) -> bool:
        """Whether an address has as many connections as it is allowed."""
        most = self.limits.max_per_address
        return most is not None and group is not None and self._held[group] >= most

    def enter(self, group: str | None, drop: Callable[[], None]) -> ConnectionSlot | None:
        """Give a new connection a slot, and drop an idle one for it if none is free.

        Returns:
            The slot; None if all connections are busy.
        """
        if self.stats.open >= self._most:
            if not self._idle:
                self.stats.dropped["full"] += 1
                return None
            self._paced_to = max(self._paced_to, self._clock()) + PACE_S
            self._drop_one("idle")
        slot = ConnectionSlot(group, self._clock() + self.limits.header_timeout_s, drop)
        self.stats.open += 1
        self._held[group] += 1
        self._set_idle(slot)
        return slot

    def begin(self, slot: ConnectionSlot, path: str, headers: Headers) -> bool:
        """Whether a request may be answered. A client's request makes the connection busy."""
        if slot.busy or slot.gone:
            return not slot.gone
        most = self._may_be_busy.get(self._classify(path, headers))
        if most is None:
            return True
        if self.stats.busy >= most:
            return False
        self._unset_idle(slot)
        slot.busy = True
        self.stats.busy += 1
        return True

    def rest(self, slot: ConnectionSlot) -> None:
        """Make the connection idle: all its requests have been answered."""
        if slot.gone:
            return
        if slot.busy:
            slot.busy = False
            self.stats.busy -= 1
        else:
            self._unset_idle(slot)
        slot.used = True
        self._set_idle(slot)

    def take_turn(self, start: Callable[[], bool]) -> None:
        """Answer a probe or a stranger, now or after others.

        Args:
            start: starts the answer and returns True, or returns False if there is nothing to
                answer any more. After True, :meth:`end_turn` has to be called.
        """
        self._waiting.append(start)
        self._start_next()

    def end_turn(self) -> None:
        """Let the next one start: a probe or a stranger is answered, or does not read."""
        self._turns -= 1
        self._start_next()

    def _start_next(self) -> None:
        while self._waiting and self._turns < SIDE_BY_SIDE:
            self._turns += self._waiting.popleft()()

    def leave(self, slot: ConnectionSlot) -> None:
        """Free the slot of a connection that has ended. Safe to call again."""
        if slot.gone:
            return
        if slot.busy:
            self.stats.busy -= 1
        else:
            self._unset_idle(slot)
        slot.busy, slot.gone = False, True
        self.stats.open -= 1
        self._held[slot.group] -= 1
        if not self._held[slot.group]:
            del self._held[slot.group]

    def give_files(self) -> int:
        """Drop half of the idle connections, because there are no open files left.

        Returns:
            How many were dropped.
        """
        idle = self.stats.open - self.stats.busy
        count = min(idle, max(_FEWEST, min(_MOST, idle // 2)))
        for _ in range(count):
            self._drop_one("files")
        return count

    def _drop_one(self, reason: str) -> None:
        slot, _ = self._next()
        self.stats.dropped[reason] += 1
        self.leave(slot)
        slot.drop()

    def _next(self) -> tuple[ConnectionSlot, float]:
        return max(self._idle.values(), key=len).next(self._clock())

    def _set_idle(self, slot: ConnectionSlot) -> None:
        self._idle.setdefault(slot.group, _Group()).of(slot)[slot] = self._clock()

    def _unset_idle(self, slot: ConnectionSlot) -> None:
        group = self._idle[slot.group]
        del group.of(slot)[slot]
        if not group:
            del self._idle[slot.group]


def group(family: int, address: Any) -> str | None:
    """The address that a connection counts for.

    It is the IPv4 address, or the IPv6 network of 64 bits; None for other families. A provider
    gives a household a network of 64 bits or more, so single IPv6 addresses say nothing.

    Example:
        >>> group(socket.AF_INET6, ("2001:db8:1:2:3::4", 5000, 0, 0))
        '2001:db8:1:2::/64'
        >>> group(socket.AF_INET6, ("::ffff:10.0.0.1", 5000, 0, 0))
        '10.0.0.1'
    """
    if family == socket.AF_INET:
        return str(address[0])
    if family != socket.AF_INET6:
        return None
    found = ipaddress.IPv6Address(address[0].partition("%")[0])
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(found) >> 64 << 64, 64)))
