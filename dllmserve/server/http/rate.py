"""Rate: how many requests a minute each owner may ask for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from dllmserve._checks import check_int
from dllmserve.errors import CapacityError, ConfigError, QuotaError


class RateLimit:
    """A token bucket for each owner, refilled at a steady rate.

    An owner that was idle for a minute may use the tokens of a minute at once.

    Args:
        per_minute: average rate; None is no limit.
        clock: seconds, monotonic.

    Raises:
        ConfigError: the rate is not positive.

    Example:
        >>> rate = RateLimit(60, clock=lambda: 0.0)
        >>> rate.take("ann", 59), rate.take("ann", 2), rate.take("bob")
        (0.0, 1.0, 0.0)
    """

    def __init__(
        self, per_minute: int | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if per_minute is not None:
            check_int(ConfigError, "requests_per_minute", per_minute, 1)
        self.per_minute = per_minute
        self._clock = clock
        #: tokens, and when they were counted; at most one entry for each key
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, owner: str, count: int = 1) -> float:
        """Take tokens.

        Returns:
            0 if they were there; else the seconds until they are, and nothing is taken. A bucket
            never holds more than a minute's tokens, so :meth:`check` refuses larger counts.
        """
        if self.per_minute is None:
            return 0.0
        wait, tokens = self.wait(owner, count), self._tokens(owner)
        if not wait:
            self._buckets[owner] = (tokens - count, self._clock())
        return wait

    def wait(self, owner: str, count: int = 1) -> float:
        """Seconds until so many tokens are there; 0 if they are."""
        if self.per_minute is None:
            return 0.0
        return max(0.0, (count - self._tokens(owner)) * 60 / self.per_minute)

    def check(self, owner: str, count: int) -> None:
        """Check a request for ``count`` answers, for one of which a token was taken already.

        Raises:
            CapacityError: nobody may ask for so many at once.
            QuotaError: there are not enough tokens now; the error says when there will be.
        """
        limit = self.per_minute
        if limit is None or count <= 1:
            return
        if count > limit:
            raise CapacityError(
                f"{count} requests at once are over requests_per_minute={limit}: send fewer at a "
                "time"
            )
        if self.wait(owner, count - 1):
            raise QuotaError(
                f"{count} requests at once are more than is left of requests_per_minute={limit}: "
                "try again when Retry-After has passed, or send fewer at a time",
                math.ceil(self.wait(owner, count)),  # who comes back pays for one at once
                code="rate_limit_exceeded",
            )

    def _tokens(self, owner: str) -> float:
        most = float(self.per_minute or 0)
        now = self._clock()
        tokens, counted = self._buckets.get(owner, (most, now))
        return min(most, tokens + (now - counted) * most / 60)
