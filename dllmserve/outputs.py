"""What requests give back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RequestOutput:
    """A finished request.

    Attributes:
        text: the answer, without special tokens and cut before a stop string.
        token_ids: answer ids; the last one is the end id if finish_reason is "stop" by one.
        finish_reason: "stop" (an end id or a stop string) or "length".
        prompt_tokens, completion_tokens: lengths in tokens.
        forward_passes: forwards that the request took part in; guidance counts once.
        cached_tokens: tokens of the prompt whose K and V were found, from requests before.
        logprobs: of each token, if they were asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    forward_passes: int
    cached_tokens: int = 0
    logprobs: list[dict[str, Any]] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The dictionary that LLM.generate returns."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "forward_passes": self.forward_passes,
                "cached_tokens": self.cached_tokens,
            },
        }


@dataclass(frozen=True)
class CanvasStep:
    """The answer after one forward pass, for people who want to watch.

    Attributes:
        token_ids: [gen_length] ids; provisional where ``committed`` is False and a
            proposal exists, else None.
        committed: [gen_length] flags.
        confidence: [gen_length] confidence of the proposals; None without one.
        block: [start, end) of the active block in the answer.
        forward_passes: forwards so far.
        output: the finished request in the last event, else None.
    """

    token_ids: list[int | None]
    committed: list[bool]
    confidence: list[float | None]
    block: tuple[int, int]
    forward_passes: int
    output: RequestOutput | None = None
