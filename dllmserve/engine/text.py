"""AnswerText: answer ids to text, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence

from dllmserve.engine.tokenizer import Tokenizer


class AnswerText:
    """Decodes answers; without a tokenizer every text is empty."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def read(self, ids: list[int], stops: Sequence[str]) -> tuple[str, int, bool]:
        """Decode an answer and cut it before the first stop string.

        Returns:
            The text, how many ids belong to it (up to the one that completes the stop
            string), and whether a stop string was found.
        """
        if self._tokenizer is None:
            return "", len(ids), False
        text = self._tokenizer.decode(ids)
        cut = _first(text, stops)
        if cut is None:
            return text, len(ids), False
        used = self._completing(ids, stops)
        return text[:cut], used, True

    def _completing(self, ids: list[int], stops: Sequence[str]) -> int:
        """Fewest leading ids whose text holds a stop string."""
        if self._tokenizer is None:
            return len(ids)
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            if _first(self._tokenizer.decode(ids[:middle]), stops) is None:
                low = middle + 1
            else:
                high = middle
        return low


def _first(text: str, stops: Sequence[str]) -> int | None:
    """Index of the earliest stop string in the text, or None."""
    found = [place for place in (text.find(s) for s in stops) if place >= 0]
    return min(found) if found else None
