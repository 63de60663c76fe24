"""What requests give back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict


class TokenLogprob(TypedDict):
    """Log-probabilities at a position of an answer, by the forward that wrote it; natural.

    They are of the model's own distribution over all ids: after guidance, before logit_bias and
    other edits, constraints, temperature, top-p and top-k.

    Attributes:
        token_id: what stands there.
        logprob: of that token; None where no forward decided it (it was given, filled in behind
            an end id, or all that a constraint left).
        top: ``[id, logprob]`` of the likeliest tokens, the likeliest first, equal ones by id.
    """

    token_id: int
    logprob: float | None
    top: list[list[int | float]]


class Forward(TypedDict):
    """What a forward of a request decided.

    Attributes:
        forward: its number, from 1.
        written: ``[position in the answer, token id, confidence]``; the confidence is None where
            something was filled in behind an end id. What replaced another token is among them,
            with its probability.
        remasked: positions in the answer that were masked again.
    """

    forward: int
    written: list[list[int | float | None]]
    remasked: list[int]


@dataclass(frozen=True)
class FilledHole:
    """What a hole of a template was filled with.

    Attributes:
        name: the hole's, or None.
        text: of its tokens, without special tokens and cut before a stop string.
        token_ids: as many as the hole has positions; fewer if it ended early, and then the last
            one is the end id.
        steps, logprobs: of each of token_ids, as those of :class:`RequestOutput`.
    """

    name: str | None
    text: str
    token_ids: list[int]
    steps: list[int]
    logprobs: list[TokenLogprob] | None = None

    def as_dict(self) -> dict[str, Any]:
        """An entry of ``holes`` in what LLM.infill returns."""
        found = {"name": self.name, "text": self.text, "token_ids": self.token_ids}
        asked = {} if self.logprobs is None else {"logprobs": self.logprobs}
        return {**found, "steps": self.steps, **asked}


@dataclass(frozen=True)
class RequestOutput:
    """A finished request.

    Attributes:
        text: the answer, without special tokens and cut before a stop string. Of a template, the
            whole text, what was given included.
        token_ids: answer ids; the last one is the end id if finish_reason is "stop" by one. Of a
            template, all of them: given ones, and those of the holes.
        finish_reason: "stop" (an end id or a stop string) or "length".
        prompt_tokens, completion_tokens: lengths in tokens.
        forward_passes: forwards that the request took part in; guidance counts once.
        cached_tokens: tokens of the prompt whose K and V were found, from requests before.
        edits: written tokens that were replaced, of all that the request computed.
        steps: number, from 1, of the request's forward that wrote each of token_ids; 0 where
            a token was given.
        logprobs: of each of token_ids, if asked for.
        candidate_logprobs: log-probabilities of the request's candidates, one list for each
            position to fill of the answer; [] where no forward decided it. None without candidates.
        history: forwards that decided something, if asked for.
        holes: those of a template, in order.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    forward_passes: int
    cached_tokens: int = 0
    edits: int = 0
    steps: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    candidate_logprobs: list[list[float]] | None = None
    history: list[Forward] | None = None
    holes: tuple[FilledHole, ...] = ()

    @property
    def answer(self) -> RequestOutput:
        """What the model wrote alone: of a template, what is in its only hole."""
        if not self.holes:
            return self
        (hole,) = self.holes
        steps, logprobs, ids = hole.steps, hole.logprobs, hole.token_ids
        found = replace(self, text=hole.text, token_ids=ids, steps=steps, logprobs=logprobs)
        return replace(found, holes=())

    def as_dict(self) -> dict[str, Any]:
        """The dictionary that LLM.generate returns, and LLM.infill with its ``holes``."""
        asked = {"logprobs": self.logprobs, "history": self.history}
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            **({"holes": [hole.as_dict() for hole in self.holes]} if self.holes else {}),
            "finish_reason": self.finish_reason,
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "forward_passes": self.forward_passes,
                "cached_tokens": self.cached_tokens,
                "edits": self.edits,
            },
            "steps": self.steps,
            **{key: value for key, value in asked.items() if value is not None},
        }


@dataclass(frozen=True)
class CanvasStep:
    """The answer after one forward pass, for people who want to watch.

    Attributes:
        token_ids: [gen_length] ids; provisional where ``committed`` is False and a
            proposal exists, else None.
        committed: [gen_length] flags: written. Of a request that edits, tokens of the active block
            may still be replaced.
        confidence: [gen_length] confidence of the proposals; None without one.
        block: [start, end) of the active block in the answer.
        forward_passes: forwards so far.
        output: the finished request in the last event, else None.
        edited: positions whose written token this forward has replaced by another.
    """

    token_ids: list[int | None]
    committed: list[bool]
    confidence: list[float | None]
    block: tuple[int, int]
    forward_passes: int
    output: RequestOutput | None = None
    edited: Sequence[int] = ()


@dataclass(frozen=True)
class TextDelta:
    """A piece of committed text. The last one carries the output.

    Attributes:
        text: never taken back; all pieces together are the answer's text.
        tokens: ids that became committed with it.
        output: the finished request, in the last piece.
        logprobs: of those ids, if the request asks for log-probabilities.
    """

    text: str
    tokens: int = 0
    output: RequestOutput | None = None
    logprobs: list[TokenLogprob] | None = None
