"""StateTable: every running request's tokens, masks and parameters, in stable device rows."""

from __future__ import annotations

import torch
from torch import Tensor

from dllmserve._values import MAX_STOP_IDS
from dllmserve.core.rows import IntField, RowInit, Track
from dllmserve.decoding.noise import CanvasNoise, CounterNoise
from dllmserve.device import host_to_device
from dllmserve.runtime.platform import beside_steps, fetch
from dllmserve.sampling_params import FLOATS

#: ``stale`` of a position that was never computed, and of one that was written since: both are
#: more than any drift, which is at most 2
NEVER_COMPUTED, REWRITTEN = 1e30, 4.0


class StateTable:
    """Device rows. The last row and the last column are trash: padding may write there.

    Attributes:
        tokens: [R + 1, T + 1] int64 canvas ids; undefined where masked.
        masked: [R + 1, T + 1] bool. The flag alone says what is masked, so a prompt may
            contain the mask id.
        open: [R + 1, T + 1] bool, positions that the request fills; the others are given.
        floats: [R + 1, len(FLOATS)] float64, the numbers of SamplingParams that rules read.
        ints: [R + 1, len(IntField)] int64.
        forwards: [R + 1] int64, forwards done: the noise counter.
        ends: [R + 1, E] int64, ids that end the answer; -1 is none.
        last: [R + 1, E] int64, ids whose proposals have no confidence; -1 is none.
        steps: [R + 1, T + 1] int32, number from 1 of the request's forward that wrote the position,
            the last one if several did; 0 where given, undefined where masked.
        stale: [R + 1, T + 1] float32, how much a position's K,V are out of date; what the number
            is, the row's :class:`~dllmserve.core.rows.Track` says.
        memory_row: [R + 1] float64, the rule's number for the request.
        memory_cells: [R + 1, T + 1] float64, the rule's number for each position.
        host: row -> its RowInit, for choices that the host makes.
        noise: where ids of canvases of noise come from; an engine's can be replaced to run with
            recorded draws.
        candidates: row -> [length, C] int64, ids whose log-probabilities are wanted at the
            positions from the first to fill to the last; -1 for none. Of rows that want some.
    """

    def __init__(self, num_rows: int, max_len: int, device: torch.device, ends: int = 1) -> None:
        rows, width = num_rows + 1, max_len + 1
        self.device = device
        self.max_len = max_len
        self.trash_row = num_rows
        self.tokens = torch.zeros(rows, width, dtype=torch.int64, device=device)
        self.masked = torch.zeros(rows, width, dtype=torch.bool, device=device)
        self.open = torch.zeros(rows, width, dtype=torch.bool, device=device)
        self.ends = torch.full((rows, ends + MAX_STOP_IDS), -1, dtype=torch.int64, device=device)
        self.last = torch.full((rows, max(ends, 1)), -1, dtype=torch.int64, device=device)
        self.floats = torch.zeros(rows, len(FLOATS), dtype=torch.float64, device=device)
        self.ints = torch.zeros(rows, len(IntField), dtype=torch.int64, device=device)
        self.forwards = torch.zeros(rows, dtype=torch.int64, device=device)
        self.steps = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self.stale = torch.zeros(rows, width, device=device)
        self.memory_row = torch.zeros(rows, dtype=torch.float64, device=device)
        self.memory_cells = torch.zeros(rows, width, dtype=torch.float64, device=device)
        self.noise: CanvasNoise = CounterNoise(1)
        self.host: dict[int, RowInit] = {}
        self.candidates: dict[int, Tensor] = {}

    def write_row(self, init: RowInit) -> None:
        """Fill a row for a newly admitted request."""
        row = init.row
        self.tokens[row, : len(init.ids)] = host_to_device(init.ids, self.device)
        self.open[row] = False
        for start, end in init.holes:
            self.open[row, start:end] = True
        self.masked[row] = self.open[row]
        if init.noise:
            self._begin_canvases(init)
        self.steps[row] = 0
        self.candidates.pop(row, None)
        if init.candidates:
            ids = host_to_device(_candidate_ids(init), self.device)
            self.candidates[row] = ids.view(init.length, -1)
        if init.last:
            self.last[row] = -1
            self.last[row, : len(init.last)] = host_to_device(init.last, self.device)
        self.floats[row] = host_to_device(init.floats, self.device, torch.float64)
        self.ints[row] = host_to_device(init.ints, self.device)
        self.ends[row] = -1
        if init.ends:
            self.ends[row, : len(init.ends)] = host_to_device(init.ends, self.device)
        if init.track is not Track.NONE:
            self.stale[row] = NEVER_COMPUTED if init.track is Track.DRIFT else -1.0
        self.forwards[row : row + 1] = 0  # a single element would be copied, and waited for
        self.host[row] = init

    def _begin_canvases(self, init: RowInit) -> None:
        """Put noise where the row is to be filled."""
        seed = host_to_device([init.ints[IntField.SEED]], self.device)
        step = torch.full_like(seed, -1)
        for start, end in init.holes:
            position = torch.arange(start, end, device=self.device)[None]
            self.tokens[init.row, start:end] = self.noise.ids(seed, position, step)[0]

    def answer(self, row: int) -> Tensor:
        """Ids of a row from its first position to fill to its last: [length] int64, a view."""
        init = self.host[row]
        return self.tokens[row, init.start : init.start + init.length]

    def answer_steps(self, row: int) -> Tensor:
        """Forwards that wrote them: [length] int32, a view."""
        init = self.host[row]
        return self.steps[row, init.start : init.start + init.length]

    def read_written(self, row: int, count: int) -> tuple[list[int], list[int]]:
        """The first ``count`` answer ids of a row and their forwards, copied to the host."""
        both = torch.stack((self.answer(row), self.answer_steps(row).long()))
        ids, steps = fetch(both[:, :count]).tolist()
        return ids, steps

    def read_answer(self, row: int, count: int) -> list[int]:
        """The first ``count`` answer ids of a row, copied to the host."""
        ids: list[int] = fetch(self.answer(row)[:count]).tolist()
        return ids

    def read_settled(self, row: int, start: int, end: int) -> list[int]:
        """Answer ids ``[start, end)`` of a row that no later step writes any more.

        They are read beside the steps in flight, not behind them.
        """
        with beside_steps(self.device):
            ids: list[int] = fetch(self.answer(row)[start:end]).tolist()
        return ids

    def read_masked(self, row: int) -> list[bool]:
        """Masked flags of a row's answer, copied to the host."""
        init = self.host[row]
        flags: list[bool] = fetch(self.masked[row, init.start : init.start + init.length]).tolist()
        return flags


def _candidate_ids(init: RowInit) -> list[int]:
    """Candidates of each position from the first to fill to the last, -1 behind those of each."""
    width = max(map(len, init.candidates))
    rows = [[-1] * width for _ in range(init.length)]
    places = (p - init.start for start, end in init.holes for p in range(start, end))
    for place, ids in zip(places, init.candidates, strict=True):
        rows[place][: len(ids)] = ids
    return [token for ids in rows for token in ids]
