"""CommittedText: the text of an answer while it grows."""

from __future__ import annotations

from collections.abc import Sequence

from dllmserve.engine.tokenizer import Tokenizer


class CommittedText:
    """The text of an answer that grows from the left, given out once it cannot change.

    What may still become another character, or the beginning of a stop string, is held
    back. All pieces together are the answer's text.

    Args:
        tokenizer: the answer's.
        stops: strings that end the answer.

    Example:
        >>> text = CommittedText(tokenizer, ["END"])  # doctest: +SKIP
        >>> text.add([87, 69]), text.finish("WE")  # doctest: +SKIP
        ('W', 'E')
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        # text is decoded from the piece before, because some tokenizers treat the first
        # token of what they decode differently
        self._from, self._read = 0, 0
        self._held = ""
        self._given = ""

    def add(self, ids: Sequence[int]) -> str:
        """Take the next committed ids; return the text that has become certain."""
        self._ids += ids
        before = self._tokenizer.decode(self._ids[self._from : self._read])
        text = self._tokenizer.decode(self._ids[self._from :])
        # the mark of an unfinished character
        if text.endswith("\ufffd") or len(text) <= len(before):
            return ""
        self._held += text[len(before) :]
        self._from, self._read = self._read, len(self._ids)
        keep = _begun(self._held, self._stops)
        piece, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        self._given += piece
        return piece

    def finish(self, text: str) -> str:
        """The rest of the answer, whose whole text is ``text``."""
        rest = text[len(self._given) :] if text.startswith(self._given) else ""
        self._given += rest
        return rest


def _begun(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of the text that a stop string begins with."""
    for size in range(min(len(text), max((len(s) for s in stops), default=1) - 1), 0, -1):
        if any(s.startswith(text[-size:]) for s in stops):
            return size
    return 0
