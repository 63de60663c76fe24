"""What requests give back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FilledHole:
    """What a hole of a template was filled with.

    Attributes:
        name: the hole's, or None.
        text: of its tokens, without special tokens and cut before a stop string.
        token_ids: as many as the hole has positions; fewer if it ended early, and then the last
            one is the end id.
    """

    name: str | None
    text: str
    token_ids: list[int]

    def as_dict(self) -> dict[str, Any]:
        """An entry of ``holes`` in what LLM.infill returns."""
        return {"name": self.name, "text": self.text, "token_ids": self.token_ids}


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
        holes: those of a template, in order.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    forward_passes: int
    cached_tokens: int = 0
    holes: Sequence[FilledHole] = ()

    @property
    def written(self) -> str:
        """Text of what the model wrote: the answer, or what is in the holes."""
        return "".join(hole.text for hole in self.holes) if self.holes else self.text

    def as_dict(self) -> dict[str, Any]:
        """The dictionary that LLM.generate returns, and LLM.infill with its ``holes``."""
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
