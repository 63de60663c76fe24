"""Lease: a clock that stands still while no server has a store."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable

from dllmserve.errors import JobStoreError
from dllmserve.server.store.rows import UNFINISHED

#: seconds for which a lease is given, and after which it is renewed. The difference is for the
#: disk: while a server lives, its lease does not run out
LEASE_S, RENEW_S = 1.5, 1.0
#: an older dllmserve has made its stores without it
MAKE_ALIVE = "CREATE TABLE IF NOT EXISTS alive (until REAL NOT NULL)"

_UNTIL = "SELECT until FROM alive"
_NEWEST = "SELECT max(created) FROM jobs WHERE state = ?"


class Lease:
    """Counts the seconds in which servers had a store, on top of the unix time it was made at.

    A server that is killed cannot say when. So it has a lease in the file: until when it counts
    as alive. Each commit that writes renews it, and so does an open store once a second while a
    job is unfinished; the next server counts on from there. Jumps of the wall clock change
    nothing, and no server that is killed at once, again and again, keeps a job alive for ever.

    Args:
        db: the store, inside of a transaction.
        monotonic: seconds that only grow.
        began: when the server began by them, which is before it opens the store; None for now.

    Raises:
        JobStoreError: the store has no sensible time in it.
    """

    def __init__(
        self, db: sqlite3.Connection, monotonic: Callable[[], float], began: float | None
    ) -> None:
        self._db, self._monotonic = db, monotonic
        found = [until for (until,) in db.execute(_UNTIL)]
        (newest,) = db.execute(_NEWEST, (UNFINISHED,)).fetchone()
        if not found:  # the store is new, or of a dllmserve that had no lease
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
        """Seconds until it has to be renewed: 0 if it has to be now."""
        return max(0.0, self.until - (LEASE_S - RENEW_S) - self.now())

    def renew(self) -> float:
        """Write until when the server counts as alive; returns it. It holds once committed."""
        until = self.now() + LEASE_S
        self._db.execute("UPDATE alive SET until = ?", (until,))
        return until

    def end(self) -> None:
        """Write that the server is gone now."""
        self._db.execute("UPDATE alive SET until = ?", (self.now(),))
