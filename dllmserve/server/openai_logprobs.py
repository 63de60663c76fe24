"""Log-probabilities in OpenAI's shapes.

They are natural logarithms, of the forward pass that wrote the token: a diffusion model writes
tokens in any order, so they are not those of a text that comes token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from dllmserve.engine.tokenizer import Tokenizer
from dllmserve.outputs import TokenLogprob

#: text, log-probability, likeliest ones and offset of a token
_Told = tuple[str, float | None, list[tuple[str, float]], int]
#: what a token decodes to that is a part of a character
_PART = "\ufffd"
#: of a character
_MOST_BYTES = 4


class TopLogprob(BaseModel):
    """A token that might have stood there."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of a chat's answer."""

    content: list[ContentLogprob]
    refusal: None


class CompletionLogprobs(BaseModel):
    """Of a completion; each list has an entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
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

    def __init__(
        self, tokenizer: Tokenizer | None, *, chat: bool, top: int, offset: int = 0
    ) -> None:
        self._tokenizer, self._chat, self._top, self._offset = tokenizer, chat, top, offset
        # the token before, and those of a character that has begun
        self._before: list[int] = []
        self._begun: list[int] = []

    def add(self, entries: Sequence[TokenLogprob], length: int | None = None) -> dict[str, Any]:
        """The next tokens, in the endpoint's shape.

        Args:
            entries: one a token.
            length: characters up to the end of the whole text, once that is known: it may have been
                cut before a stop string.
        """
        found = []
        for entry in entries:
            id, offset = entry["token_id"], self._offset
            text, told = self._grown(id), self._told(id)
            if told and (length is None or offset < length):
                top = [(self._told(int(other)), p) for other, p in entry["top"][: self._top]]
                found.append((told, entry["logprob"], top, offset))
            self._offset += len(text)
            if text:
                self._before, self._begun = [id], []
        return self._chats(found) if self._chat else self._completions(found)

    def _grown(self, id: int) -> str:
        """The text that a token adds: none as long as a character is not complete."""
        self._begun.append(id)
        text = self._behind(self._begun)
        # a character has four bytes at most, so what is no character by now never will be
        return "" if text.endswith(_PART) and len(self._begun) < _MOST_BYTES else text

    def _told(self, id: int) -> str:
        """A token's own text."""
        text = self._behind([id])
        return _PART if _PART in text else text

    def _behind(self, ids: list[int]) -> str:
        """Text of ids that stand behind those before: the first one of all may lose a blank."""
        if self._tokenizer is None:
            return ""
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + ids)[len(before) :]

    @staticmethod
    def _chats(found: Sequence[_Told]) -> dict[str, Any]:
        content = [
            {**_token(text, logprob), "top_logprobs": [_token(*other) for other in top]}
            for text, logprob, top, _ in found
        ]
        return {"content": content, "refusal": None}

    def _completions(self, found: Sequence[_Told]) -> dict[str, Any]:
        tops: list[dict[str, float]] = []
        for _, _, top, _ in found:
            tops.append({})
            for text, logprob in top:  # the likeliest of those with the same text
                tops[-1].setdefault(text, logprob)
        return {
            "tokens": [text for text, _, _, _ in found],
            "token_logprobs": [logprob for _, logprob, _, _ in found],
            "top_logprobs": tops if self._top else None,
            "text_offset": [offset for _, _, _, offset in found],
        }


def _token(text: str, logprob: float | None) -> dict[str, Any]:
    # a part of a character is no text, and has no bytes that a text could tell
    return {
        "token": text,
        # what no forward decided was the only possibility
        "logprob": 0.0 if logprob is None else logprob,
        "bytes": None if _PART in text else list(text.encode()),
    }
