"""Grammars: from what a request's answer has to match to an automaton over the model's tokens."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dllmserve.constraints.compiled import Compiled
from dllmserve.core.constrained import check_count
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.rows import ends_of
from dllmserve.engine.tokenizer import Tokenizer
from dllmserve.errors import InvalidParameterError
from dllmserve.holes import Holes
from dllmserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from dllmserve.constraints.cache import GrammarCache
    from dllmserve.constraints.vocabulary import Vocabulary


class Grammars:
    """Compiles constraints for one model and tokenizer; may be used by many threads at once.

    Args:
        spec: the model.
        tokenizer: None for checkpoints without one, whose answers have no text to constrain.
    """

    def __init__(self, spec: ModelSpec, tokenizer: Tokenizer | None) -> None:
        self._spec, self._tokenizer = spec, tokenizer
        self._lock = threading.Lock()

    @cached_property
    def _cache(self) -> GrammarCache:
        from dllmserve.constraints.cache import GrammarCache  # loads numpy

        return GrammarCache()

    def of(self, params: SamplingParams, holes: Holes = ()) -> Sequence[Compiled | None]:
        """What an answer, or each of the holes of a template, has to match; () for nothing.

        It is compiled, which may take seconds, unless it was before.

        Raises:
            InvalidParameterError: it is no such thing, is not regular, or is too large.
        """
        ends = ends_of(params, self._spec)
        if params.logits_eos_inf:
            ends = tuple(token for token in ends if token not in self._spec.text_end_ids)
        if not holes:
            return (self._compiled(params, ends),) if params.constrained else ()
        asked = sum(bool(hole.constraints) for _, hole in holes)
        check_count(asked)
        if not asked:
            return ()
        return [
            self._compiled(hole, ends if hole.may_end else ()) if hole.constraints else None
            for _, hole in holes
        ]

    def _compiled(self, asked: Any, ends: tuple[int, ...]) -> Compiled:
        from dllmserve.constraints.compile import compile_grammar, grammar_key

        if self._spec.noise:
            raise InvalidParameterError(
                "regex, json_schema and choice do not work with a canvas of noise: its tokens are "
                "taken all at once, each by itself, so nothing says that they match together"
            )
        given: dict[str, Any] = {
            "regex": asked.regex,
            "json_schema": asked.json_schema,
            "choice": asked.choice,
            "vocabulary": self._vocabulary(),
            "vocab_size": self._spec.embedding_size,
            "mask_id": self._spec.mask_id,
            "end_ids": ends,
        }
        key = grammar_key(**given)
        return Compiled(self._cache.get(key, lambda: compile_grammar(**given)))

    def _vocabulary(self) -> Vocabulary:
        if self._tokenizer is None:
            raise InvalidParameterError(
                "regex, json_schema and choice need a tokenizer, and this checkpoint has none"
            )
        with self._lock:  # it takes a while, and is made once
            return self._tokenizer.vocabulary
