"""AnswerHistory: which forward wrote what of an answer, and what it masked again."""

from __future__ import annotations

from dllmserve.outputs import CanvasStep, Forward


class AnswerHistory:
    """What a request's forwards did, from pictures of the answer after each of them.

    Attributes:
        forwards: those that decided something, in order.

    Example:
        >>> history = AnswerHistory()
        >>> history.note(CanvasStep([7, None], [True, False], [0.9, 0.4], (0, 2), 1))
        >>> history.note(CanvasStep([7, 8], [True, True], [None, 0.6], (0, 2), 2))
        >>> [forward["written"] for forward in history.forwards]
        [[[0, 7, 0.9]], [[1, 8, 0.6]]]
    """

    def __init__(self) -> None:
        self.forwards: list[Forward] = []
        self._before: list[int | None] = []

    def note(self, step: CanvasStep) -> None:
        """Take the picture after a forward that decided something."""
        pairs = zip(step.token_ids, step.committed, strict=True)
        now = [token if done else None for token, done in pairs]
        before = self._before or [None] * len(now)
        written: list[list[int | float | None]] = [
            [place, token, step.confidence[place]]
            for place, token in enumerate(now)
            if token is not None and token != before[place]
        ]
        remasked = [p for p, token in enumerate(now) if token is None and before[p] is not None]
        number = step.forward_passes
        self.forwards.append({"forward": number, "written": written, "remasked": remasked})
        self._before = now
