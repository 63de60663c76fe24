"""The length of an answer, which has two names: gen_length, and max_tokens."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from dllmserve._values import Kept, NotGiven, rank
from dllmserve.errors import InvalidParameterError
from dllmserve.knobs import check_knobs

#: max_tokens and gen_length, as documented
DEFAULT_LENGTHS = NotGiven(64), NotGiven(128)


def settle_length(params: Any) -> None:
    """Make one length of its two names: the one that was given, or changed, sets the other.

    Args:
        params: SamplingParams that are being made.
    """
    pair = ("max_tokens", "gen_length")
    ranks = {name: rank(getattr(params, name)) for name in pair}
    for name in (name for name in pair if ranks[name] == 2):
        check_knobs(InvalidParameterError, params, name)
    # neither does a list of all fields mean anything by the two defaults
    every = len(params.__dict__["_given"]) == len(fields(params))
    filler = params.__dict__["_filler"] or (every and params.gen_length == DEFAULT_LENGTHS[1])
    if filler and params.max_tokens == DEFAULT_LENGTHS[0] and ranks["gen_length"] == 2:
        ranks["max_tokens"] = 0
    named = [name for name in pair if ranks[name] and ranks[name] == max(ranks.values())]
    if len(named) == 2 and params.max_tokens != params.gen_length:
        raise InvalidParameterError(
            f"max_tokens={params.max_tokens} and gen_length={params.gen_length} contradict each "
            "other: gen_length counts for diffusion models, and max_tokens for autoregressive "
            "ones. Give one of them: alone, either is the length"
        )
    if named:
        length = getattr(params, named[0])
        for name in pair:
            kept = Kept(length) if name in named else NotGiven(length)
            object.__setattr__(params, name, kept)
