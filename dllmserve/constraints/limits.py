"""Bounds of a constraint. Each is checked before the work that it bounds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from dllmserve.errors import InvalidParameterError

#: characters of a regular expression, of a schema's JSON text, of all choices together
MAX_TEXT = 1 << 18
#: steps of the nondeterministic automaton, with counted repeats written out
MAX_POSITIONS = 120_000
#: states of an automaton over characters or bytes
MAX_STATES = 16_384
#: states times kinds of characters, or states times classes of tokens
MAX_TABLE = 1 << 24
#: steps of finding the states, in Python: some seconds of one core
MAX_STEPS = 4_000_000
#: elementary operations of one construction in arrays, some seconds of one core
MAX_WORK = 1 << 31
#: pairs of states that beginnings of tokens lead between: those that are kept, and the work
MAX_MOVES = 1 << 25
MAX_PAIRS = 1 << 28
#: seconds of a core that one constraint may take, if no other limit stops it
MAX_SECONDS = 30.0

_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


@contextmanager
def bounded_time() -> Iterator[None]:
    """All that is checked inside of this takes :data:`MAX_SECONDS` of this thread at most."""
    token = _deadline.set(time.thread_time() + MAX_SECONDS)
    try:
        yield
    finally:
        _deadline.reset(token)


def check(value: int, limit: int, what: str) -> None:
    """Raise InvalidParameterError if a constraint is larger than a limit, or takes too long.

    Args:
        value: how large it is, or how large it has become so far.
        limit: what is allowed.
        what: what is counted.
    """
    if value > limit:
        raise InvalidParameterError(
            f"the constraint is too large: {what} is {value:,} or more, and at most {limit:,} are "
            "possible; use smaller counted repeats (maxLength, maxItems, {m,n}), fewer "
            "alternatives, or no bound at all where none is needed"
        )
    deadline = _deadline.get()
    if deadline is not None and time.thread_time() > deadline:
        raise InvalidParameterError(
            f"the constraint takes more than {MAX_SECONDS:g} seconds to compile; make it smaller, "
            "with fewer alternatives, patterns and counted repeats"
        )
