"""Constraints: from a regular expression, a JSON schema or a choice to an automaton over tokens.

:func:`compile_grammar` does it, :class:`Vocabulary` is what it needs to know of a tokenizer, and
:class:`TokenGrammar` is what comes out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dllmserve.constraints.cache import GrammarCache as GrammarCache
    from dllmserve.constraints.compile import compile_grammar as compile_grammar
    from dllmserve.constraints.compile import grammar_key as grammar_key
    from dllmserve.constraints.grammar import TokenGrammar as TokenGrammar
    from dllmserve.constraints.vocabulary import Vocabulary as Vocabulary

_HOMES = {
    "GrammarCache": "cache",
    "TokenGrammar": "grammar",
    "Vocabulary": "vocabulary",
    "compile_grammar": "compile",
    "grammar_key": "compile",
}


def __getattr__(name: str) -> Any:
    """Import on first use: numpy takes a while."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
