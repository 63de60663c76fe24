"""Lease: a clock that stands still while no server has a store."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable

from dllmserve.errors import JobStoreError
from dllmserve.server.store.rows import UNFINISHED

#: seconds for which a lease holds, and after which it is renewed. The difference is time for the
#: disk, so that the lease of a live server does not run out
LEASE_S, RENEW_S = 1.5, 1.0
#: stores of an older dllmserve lack this table
MAKE_ALIVE = "CREATE TABLE IF NOT EXISTS alive (until REAL NOT NULL)"

_UNTIL = "SELECT until FROM alive"
_NEWEST = "SELECT max(created) FROM jobs WHERE state = ?"


class Lease:
    """Counts the seconds in which servers had a store, added to the unix time it was made at.

    A server that is killed cannot store when that was. So the file holds a lease: the time until
    which the server counts as alive. Each commit that writes renews the lease, and so does an open
    store once a second while a job is unfinished. The next server counts on from the lease's end.
    Jumps of the wall clock change nothing. Servers that are killed at once, again and again, do
    not keep a job alive for ever.

    Args:
        db: the store, inside of a transaction.
        monotonic: seconds that only grow.
        began: the value of ``monotonic`` when the server began, before it opened the store; None
            for now.

    Raises:
        JobStoreError: the time in the store is invalid.
    """

    def __init__(
        self, db: sqlite3.Connection, monotonic: Callable[[], float], began: float | None
    ) -> None:
        self._db, self._monotonic = db, monotonic
        found = [until for (until,) in db.execute(_UNTIL)]
        (newest,) = db.execute(_NEWEST, (UNFINISHED,)).fetchone()
        if not found:  # the store is new, or an older dllmserve without leases made it
            found = [time.time() if newest is None else newest]
            db.execute("INSERT INTO alive VALUES (?)", found)
        if len(found) > 1 or not isinstance(found[0], float) or not 0 <= found[0] < math.inf:
            raise JobStoreError("the time until which its server was alive cannot be")
        self._began = monotonic() if began is None else began
        self._base = max(found[0], newest or 0.0)
        self.until = self._base

    def now(self) -> float:
        """The clock; may be read from any thread."""
        return self._base + self._monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds until the lease has to be renewed; 0 for now."""
        return max(0.0, self.until - (LEASE_S - RENEW_S) - self.now())

    def renew(self) -> float:
        """Write a new end of the lease, and return it. It holds once it is committed."""
        until = self.now() + LEASE_S
        self._db.execute("UPDATE alive SET until = ?", (until,))
        return until

    def end(self) -> None:
        """Write that the lease ends now."""
        self._db.execute("UPDATE alive SET until = ?", (self.now(),))
