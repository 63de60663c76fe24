"""Grammars: from what a request's answer has to match to an automaton over the model's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from dllmserve.constraints.compiled import Compiled
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.rows import ends_of
from dllmserve.engine.tokenizer import Tokenizer
from dllmserve.errors import InvalidParameterError
from dllmserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from dllmserve.constraints.compile import GrammarCache
    from dllmserve.constraints.vocabulary import Vocabulary


class Grammars:
    """Compiles constraints for one model and tokenizer; may be used by many threads at once.

    Args:
        spec: the model.
        tokenizer: None for checkpoints without one, whose answers have no text to constrain.
    """

    def __init__(self, spec: ModelSpec, tokenizer: Tokenizer | None) -> None:
        self._spec, self._tokenizer = spec, tokenizer

    @cached_property
    def _cache(self) -> GrammarCache:
        from dllmserve.constraints.compile import GrammarCache

        return GrammarCache()

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        from dllmserve.constraints.vocabulary import Vocabulary

        if self._tokenizer is None:
            raise InvalidParameterError(
                "regex, json_schema and choice need a tokenizer, and this checkpoint has none"
            )
        return Vocabulary.of(self._tokenizer)

    def of(self, params: SamplingParams) -> Sequence[Compiled]:
        """The grammar of an answer; none if nothing is asked of it.

        It is compiled, which may take seconds, unless it was before.

        Raises:
            InvalidParameterError: it is no such thing, is not regular, or is too large.
        """
        if not params.constrained:
            return ()
        spec = self._spec
        ends = ends_of(params, spec)
        if params.logits_eos_inf:
            ends = tuple(token for token in ends if token not in spec.text_end_ids)
        grammar = self._cache.get(
            regex=params.regex,
            json_schema=params.json_schema,
            choice=params.choice,
            vocabulary=self._vocabulary,
            vocab_size=spec.embedding_size,
            mask_id=spec.mask_id,
            end_ids=ends,
        )
        return (grammar,)
