"""AnswerLogprobs: what the forwards of one request have said of log-probabilities, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from dllmserve.core.request import Request
from dllmserve.decoding.logprobs import Wanted
from dllmserve.outputs import TokenLogprob


class AnswerLogprobs:
    """Log-probabilities of an answer's positions.

    Every forward says what it knows of the positions that were masked before it. A position is
    masked until it is written, and so is one that is masked again; so what was said last is what
    the forward says that wrote it.

    Args:
        request: it asks for log-probabilities, or of its candidates'.
    """

    def __init__(self, request: Request) -> None:
        self._canvas = request.canvas
        self._candidates = request.candidates
        #: positions that the host has written, by the request
        self._forced = request.forced
        named = max(map(len, request.candidates), default=0)
        self._wanted = Wanted(request.params.logprobs or 0, named)
        length = request.canvas.end - request.canvas.start
        size = (length, self._wanted.columns)
        self._values = torch.full(size, -1.0, dtype=torch.float64)

    def note(self, block: int, columns: Tensor, values: Tensor, wanted: Wanted) -> None:
        """Take what a forward says.

        Args:
            block: canvas position of its block's start.
            columns: [k] int64, positions from there.
            values: [k, wanted.columns] float64, of each.
            wanted: what the columns of values are; no less than this request wants.
        """
        likely, named = self._wanted
        ids, tops, others = 2, 2 + wanted.likely, 2 + 2 * wanted.likely
        parts = (
            values[:, :ids],
            values[:, ids : ids + likely],
            values[:, tops : tops + likely],
            values[:, others : others + named],
        )
        self._values[columns + (block - self._canvas.start)] = torch.cat(parts, dim=1)

    def read(self, token_ids: Sequence[int], start: int = 0) -> list[TokenLogprob]:
        """Of the answer's positions from ``start`` on, where these tokens stand."""
        rows: list[list[float]] = self._values[start : start + len(token_ids)].tolist()
        places = range(self._canvas.start + start, self._canvas.start + start + len(rows))
        return [self._one(*one) for one in zip(places, token_ids, rows, strict=True)]

    def _one(self, position: int, token: int, row: list[float]) -> TokenLogprob:
        likely = self._wanted.likely
        if position in self._forced:
            return {"token_id": token, "logprob": None, "top": []}
        ids, values = row[2 : 2 + likely], row[2 + likely : 2 + 2 * likely]
        pairs = zip(ids, values, strict=True)
        top: list[list[int | float]] = [[int(id), v] for id, v in pairs if v > -inf and id >= 0]
        # what was filled in behind an end id is no forward's proposal
        logprob = row[1] if row[0] == token else None
        return {"token_id": token, "logprob": logprob, "top": top}

    def candidates(self, count: int) -> list[list[float]]:
        """Of the candidates at the positions to fill among the first ``count`` of the answer."""
        start, first = self._canvas.start, 2 + 2 * self._wanted.likely
        places = [p - start for low, high in self._canvas.holes for p in range(low, high)]
        rows: list[list[float]] = self._values[:, first:].tolist()
        pairs = zip(places, self._candidates, strict=True)
        return [rows[p][: len(ids)] if p < count else [] for p, ids in pairs]
