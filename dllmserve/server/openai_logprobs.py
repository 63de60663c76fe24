"""Log-probabilities in OpenAI's shapes.

They are natural logarithms, of the forward pass that wrote the token: a diffusion model writes
tokens in any order, so they are not those of a text that comes token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from dllmserve.engine.tokenizer import Tokenizer

#: what a token decodes to that is a part of a character
_PART = "\ufffd"


class TopLogprob(BaseModel):
    """A token that might have stood there."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of a chat's answer."""

    content: list[TokenLogprob]
    refusal: None


class CompletionLogprobs(BaseModel):
    """Of a completion; each list has an entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class AnswerLogprobs:
    """Log-probabilities of one answer, as it grows.

    Entries are those of :attr:`dllmserve.outputs.RequestOutput.logprobs`. Tokens without text, such
    as those that end an answer, have none here, so the others make up the text.

    Args:
        tokenizer: of the answer; without one all texts are empty.
        chat: the shape of /v1/chat/completions, else that of /v1/completions.
        top: how many of the likeliest tokens are told.
        offset: characters before the answer.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, chat: bool, top: int, offset: int = 0):
        self._tokenizer, self._chat, self._top, self._offset = tokenizer, chat, top, offset
        self._before: list[int] = []

    def add(self, entries: Sequence[dict[str, Any]], length: int | None = None) -> dict[str, Any]:
        """The next tokens, in the endpoint's shape.

        Args:
            entries: one a token.
            length: characters of the whole text, where it was cut before a stop string.
        """
        found = []
        for entry in entries:
            id = entry["token_id"]
            text = self._text(id)
            if text and (length is None or self._offset < length):
                top = [(self._text(other), p) for other, p in entry["top"][: self._top]]
                found.append((text, entry["logprob"], top, self._offset))
            self._offset += len(text) if _PART not in text else 0
            self._before = [id]
        return self._chats(found) if self._chat else self._completions(found)

    def _text(self, id: int) -> str:
        """Text of a token that stands behind those before: the first one may lose a blank."""
        if self._tokenizer is None:
            return ""
        decode = self._tokenizer.decode
        before = decode(self._before)
        text = decode([*self._before, id])
        return text[len(before) :] if text.startswith(before) else decode([id])

    @staticmethod
    def _chats(found: Sequence[tuple[str, float, Any, int]]) -> dict[str, Any]:
        content = [
            {**_token(text, logprob), "top_logprobs": [_token(*other) for other in top]}
            for text, logprob, top, _ in found
        ]
        return {"content": content, "refusal": None}

    def _completions(self, found: Sequence[tuple[str, float, Any, int]]) -> dict[str, Any]:
        return {
            "tokens": [text for text, *_ in found],
            "token_logprobs": [logprob for _, logprob, *_ in found],
            "top_logprobs": [dict(reversed(top)) for *_, top, _ in found] if self._top else None,
            "text_offset": [offset for *_, offset in found],
        }


def _token(text: str, logprob: float) -> dict[str, Any]:
    # a part of a character is no text, and has no bytes that a text could tell
    return {
        "token": text,
        "logprob": logprob,
        "bytes": None if _PART in text else list(text.encode()),
    }
