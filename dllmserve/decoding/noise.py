"""Counter-based noise: a draw depends on seed, position, step and token id alone.

So a request's random numbers are the same whatever its batch, its chunk of the LM head
or the number of ranks that share the vocabulary. The mixer is splitmix64 (Steele, Lea
and Flood, 2014), in int64 arithmetic, which wraps around like uint64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit constant."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MUL_1 = _signed(0xBF58476D1CE4E5B9)
_MUL_2 = _signed(0x94D049BB133111EB)
#: separates the draws that choose positions from those that choose tokens
_POSITION_SALT = 0x5EED
#: and those that choose a canvas's noise
_CANVAS_SALT = 0xCA45A5


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's >> copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """splitmix64's output function on int64 tensors of any shape."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MUL_1
    x = (x ^ _shift_right(x, 27)) * _MUL_2
    return x ^ _shift_right(x, 31)


def _uniform(bits: Tensor) -> Tensor:
    """float64 in (0, 1) from the upper 52 bits; never 0 or 1.

    With 53 bits the half would not fit any more, and the largest draw would round to 1.
    """
    return (_shift_right(bits, 12).double() + 0.5) * 2.0**-52


def row_keys(seed: Tensor, position: Tensor, step: Tensor) -> Tensor:
    """One key per row from seed, canvas position and step, all [n] int64."""
    return mix(mix(mix(seed) + position) + step)


def token_uniforms(keys: Tensor, ids: Tensor) -> Tensor:
    """Uniforms of rows [n] for token ids [V]: [n, V] float64 in (0, 1)."""
    return _uniform(mix(keys[:, None] + ids[None, :] * _GOLDEN))


def position_uniforms(keys: Tensor) -> Tensor:
    """One uniform per row, for remasking="random": [n] float64 in (0, 1)."""
    return _uniform(mix(keys ^ torch.full_like(keys, _POSITION_SALT)))


class CanvasNoise(Protocol):
    """Where the ids come from that a canvas of noise holds (DiffusionGemma).

    :class:`CounterNoise` is what engines take. A test that has recorded another program's draws
    gives them with a class of its own, see :attr:`dllmserve.runtime.state_table.StateTable.noise`.
    It must not wait for the device.
    """

    def ids(self, seed: Tensor, position: Tensor, step: Tensor) -> Tensor:
        """Noise of n canvases.

        Args:
            seed: [n] int64, the requests'.
            position: [n, W] int64, positions in their rows.
            step: [n] int64, the forward behind which it is drawn, from 0 on in each canvas; -1 for
                what a canvas begins with.

        Returns:
            [n, W] int64.
        """
        ...

    def drawn(self, ids: Tensor, seed: Tensor, position: Tensor, step: Tensor) -> Tensor:
        """What the forward's own draw from the model's distribution counts as: [n, W] int64.

        Args:
            ids: [n, W] int64, what was drawn.
            seed, position, step: as for :meth:`ids`.
        """
        ...


class CounterNoise:
    """Uniform ids that depend on seed, position and step alone; see :class:`CanvasNoise`.

    Args:
        vocab_size: ids are ``0 .. vocab_size - 1``.

    Example:
        >>> one = torch.tensor([7])
        >>> CounterNoise(131).ids(one, torch.tensor([[4, 5]]), one - 8).shape
        torch.Size([1, 2])
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def ids(self, seed: Tensor, position: Tensor, step: Tensor) -> Tensor:
        """See :class:`CanvasNoise`."""
        keys = row_keys(seed[:, None], position, step[:, None])
        bits = mix(keys ^ torch.full_like(keys, _CANVAS_SALT))
        return (_uniform(bits) * self._vocab_size).long()

    def drawn(self, ids: Tensor, seed: Tensor, position: Tensor, step: Tensor) -> Tensor:
        """It counts as it is."""
        return ids


@dataclass(frozen=True)
class Recorded:
    """Draws of another program for one request.

    Attributes:
        start: canvas positions begin there: the length of the prompt.
        first: of each canvas the ids that it began with: [canvases][C].
        fresh: of each canvas and forward the noise drawn behind it: [canvases][steps][C].
        drawn: likewise, what the forward's draw from the model came to; () where it is to be our
            own, as with ``temperature=0``.
    """

    start: int
    first: Sequence[Sequence[int]]
    fresh: Sequence[Sequence[Sequence[int]]]
    drawn: Sequence[Sequence[Sequence[int]]] = ()


class RecordedNoise:
    """Recorded draws of the requests with these seeds, and counted ones of others.

    Args:
        vocab_size: of :class:`CounterNoise`, for the others.
        records: by seed.

    Raises:
        ValueError: nothing is recorded.

    Example:
        >>> record = Recorded(3, [[5, 6]], [[[7, 8]]])
        >>> noise = RecordedNoise(131, {1: record})
        >>> one, place = torch.tensor([1]), torch.tensor([[3, 4]])
        >>> noise.ids(one, place, one - 2), noise.ids(one, place, one - 1)
        (tensor([[5, 6]]), tensor([[7, 8]]))
    """

    def __init__(self, vocab_size: int, records: Mapping[int, Recorded]) -> None:
        self._other = CounterNoise(vocab_size)
        found = list(records.values())
        if not any(each for record in found for each in record.fresh):
            raise ValueError("there are no recorded draws: give a canvas and a forward at least")
        canvases = max(len(r.first) for r in found)
        steps = max(len(each) for r in found for each in r.fresh)
        width = max(len(ids) for r in found for ids in r.first)
        starts = torch.tensor([r.start for r in found])
        fresh = torch.full((len(found), canvases, steps + 1, width), -1)
        drawn = fresh.clone()
        for number, record in enumerate(found):
            for canvas, ids in enumerate(record.first):
                fresh[number, canvas, 0, : len(ids)] = torch.tensor(ids)
            for table, draws in ((fresh, record.fresh), (drawn, record.drawn)):
                for canvas, rows in enumerate(draws):
                    for step, ids in enumerate(rows, 1):
                        table[number, canvas, step, : len(ids)] = torch.tensor(ids)
        tables = torch.tensor(list(records)), starts, fresh, drawn
        #: by device: a copy to it must not be part of a CUDA graph
        self._tables = {fresh.device: tables}

    def ids(self, seed: Tensor, position: Tensor, step: Tensor) -> Tensor:
        """See :class:`CanvasNoise`."""
        counted = self._other.ids(seed, position, step)
        return self._read(2, counted, seed, position, step)

    def drawn(self, ids: Tensor, seed: Tensor, position: Tensor, step: Tensor) -> Tensor:
        """See :class:`CanvasNoise`."""
        return self._read(3, ids, seed, position, step)

    def _read(
        self, which: int, other: Tensor, seed: Tensor, position: Tensor, step: Tensor
    ) -> Tensor:
        """What is recorded [n, W], and ``other`` where nothing is."""
        if seed.device not in self._tables:
            first = next(iter(self._tables.values()))
            seeds, starts, fresh, drawn = (table.to(seed.device) for table in first)
            self._tables[seed.device] = seeds, starts, fresh, drawn
        tables = self._tables[seed.device]
        seeds, starts, table = tables[0], tables[1], tables[which]
        same = seeds == seed[:, None]
        number = same.int().argmax(dim=1, keepdim=True)
        offset = position - starts[number]
        _, canvases, steps, width = table.shape
        canvas, column = offset // width, offset % width
        inside = same.any(dim=1, keepdim=True) & (offset >= 0) & (canvas < canvases)
        inside &= (step < steps - 1)[:, None]
        place = (number, canvas.clamp(0, canvases - 1), (step + 1).clamp(max=steps - 1)[:, None])
        found = table[(*place, column)]
        return torch.where(inside & (found >= 0), found, other)
