"""Grammars that were made before."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from dllmserve.constraints.grammar import TokenGrammar


class GrammarCache:
    """Grammars by key, the least recently used of which go when there is no room. Thread-safe.

    Threads that ask for the same one while it is made wait for it, and get the same error if it
    cannot be made. Errors are not kept.

    Args:
        capacity: bytes of arrays that are kept at most. A grammar that is larger is made each time.

    Example:
        >>> from dllmserve.constraints.cache import GrammarCache
        >>> cache = GrammarCache(64 << 20)
        >>> len(cache)
        0
    """

    def __init__(self, capacity: int = 256 << 20) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, TokenGrammar] = OrderedDict()
        self._made: dict[str, Future[TokenGrammar]] = {}
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the grammars that are kept."""
        return self._nbytes

    def find(self, key: str) -> TokenGrammar | None:
        """The grammar with this key, if it is there; never waits for one that is being made."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def get(self, key: str, make: Callable[[], TokenGrammar]) -> TokenGrammar:
        """The grammar with this key, which ``make`` makes if it is not there.

        Raises:
            Exception: what ``make`` raises, in this thread or in the one that made it.
        """
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
            future = self._made.get(key)
            if future is None:
                own = self._made[key] = Future()
        if future is not None:
            return future.result()
        try:
            made = make()
        except BaseException as error:
            with self._lock:
                del self._made[key]
            own.set_exception(error)
            raise
        with self._lock:
            del self._made[key]
            self._keep(key, made)
        own.set_result(made)
        return made

    def _keep(self, key: str, grammar: TokenGrammar) -> None:
        if grammar.nbytes > self._capacity:
            return
        self._kept[key] = grammar
        self._nbytes += grammar.nbytes
        while self._nbytes > self._capacity:
            _, old = self._kept.popitem(last=False)
            self._nbytes -= old.nbytes
