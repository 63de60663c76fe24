"""Where an answer ends: what the configuration, the tokenizer and the chat template say."""

from __future__ import annotations

import logging
from dataclasses import replace

from dllmserve.core.model_spec import ModelSpec
from dllmserve.engine.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


def with_ends(spec: ModelSpec, tokenizer: Tokenizer | None) -> ModelSpec:
    """The spec with every id that ends an answer.

    These are the end ids of config.json and generation_config.json, the tokenizer's
    eos_token, and the control token that the chat template writes behind an answer. That
    last one ends a turn; it is in ``turn_end_ids`` as well unless nothing else ends a text.
    Ids that no answer can hold are left out: the mask, and those without an embedding.
    """
    named = list(spec.eos_ids)
    turn = None
    if tokenizer is not None:
        own, turn = tokenizer.end_id, tokenizer.turn_end()
        named += [id for id in (own, turn) if id is not None]
    ends = tuple(id for id in dict.fromkeys(named) if _possible(id, spec))
    turns = (turn,) if turn in ends and len(ends) > 1 else ()
    return replace(spec, eos_ids=ends, turn_end_ids=tuple(id for id in turns if id is not None))


def _possible(id: int, spec: ModelSpec) -> bool:
    if 0 <= id < spec.embedding_size and id != spec.mask_id:
        return True
    what = "the mask" if id == spec.mask_id else f"outside the {spec.embedding_size} embeddings"
    _log.warning("end id %d is left out: it is %s", id, what)
    return False
