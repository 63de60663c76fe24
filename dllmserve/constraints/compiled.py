"""Compiled: a grammar that travels between processes, and needs numpy only where it is used."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dllmserve.constraints.grammar import TokenGrammar


class Compiled:
    """A grammar, as it is used and as the bytes in which it travels; one is made of the other.

    Args:
        grammar: what was compiled.
    """

    def __init__(self, grammar: TokenGrammar | None = None, data: bytes = b"") -> None:
        if grammar is not None:
            self.__dict__["grammar"] = grammar
        if data:
            self.__dict__["data"] = data

    @staticmethod
    @lru_cache(maxsize=64)
    def of_bytes(data: bytes) -> Compiled:
        """The one that has travelled; the same for the same bytes."""
        return Compiled(data=data)

    @cached_property
    def grammar(self) -> TokenGrammar:
        """As it is used."""
        from dllmserve.constraints.grammar import TokenGrammar

        return TokenGrammar.from_bytes(self.data)

    @cached_property
    def data(self) -> bytes:
        """As it travels."""
        return self.grammar.to_bytes()
