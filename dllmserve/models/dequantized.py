"""Tensors that are read a part at a time, and matrices of few bits among them.

A quantized matrix is made of numbers, of scales, and maybe of zero points; each of these is a
tensor of a file. A part is read from the words, scales and zero points that it needs, a word more
at its ends, and is (numbers - zero points) * scales in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from dllmserve.errors import WeightsError

#: numbers that are dequantised at once
_CHUNK = 2**22


class TensorLike(Protocol):
    """What loading needs of a tensor: safetensors' slices have it, and :class:`Dequantized`."""

    def get_shape(self) -> list[int]:
        """Its shape."""
        ...

    def get_dtype(self) -> str:
        """Its dtype, as safetensors calls it."""
        ...

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        """A part of it."""
        ...


class MisfitError(ValueError):
    """A tensor that is missing, or has another shape or dtype; the message names it."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a file.

    Attributes:
        name, path: its own, and the file's.
        slice: of safetensors.
        shape, kind: of the tensor; the dtype as safetensors calls it.
    """

    name: str
    path: Path
    slice: Any
    shape: tuple[int, ...]
    kind: str

    def read(self, *index: range) -> Tensor:
        """A part of it; fewer than two dimensions count as one column [n, 1]."""
        parts = tuple(slice(part.start, part.stop) for part in index)
        try:
            if len(self.shape) == len(parts):
                data: Tensor = self.slice[parts]
                return data
            whole: Tensor = self.slice[...]
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{self.name} cannot be read from {self.path} (truncated or corrupt?): {error}"
            ) from error
        return whole.reshape(-1, 1)[parts]

    def require(self, kinds: Iterable[str], *shapes: tuple[int, ...]) -> None:
        """Raise unless it has one of these dtypes, and of these shapes if there are any."""
        kinds = tuple(kinds)
        if self.kind not in kinds:
            raise MisfitError(f"{self.name} is {self.kind}, expected {' or '.join(kinds)}")
        if shapes and self.shape not in shapes:
            raise MisfitError(
                f"{self.name} is {self.shape}, expected {' or '.join(map(str, shapes))}"
            )


@dataclass(frozen=True)
class Matrix:
    """Small numbers, or scales.

    Attributes:
        stored: the tensor that holds them.
        shape: [rows, columns] of the numbers.
        bits: of each number in an int32 word, the first one in the lowest bits; 0 if none are
            packed.
        packed: the dimension of the stored tensor that words go along.
        turned: it is stored as [columns, rows].
        less: is subtracted from each number.
        add: is added to each word.
    """

    stored: Stored
    shape: tuple[int, int]
    bits: int = 0
    packed: int = 1
    turned: bool = False
    less: int = 0
    add: int = 0

    def read(self, rows: range, columns: range) -> Tensor:
        """A part of it [rows, columns], in float32."""
        wanted = [columns, rows] if self.turned else [rows, columns]
        if self.bits:
            along, each = wanted[self.packed], 32 // self.bits
            first = along.start // each
            wanted[self.packed] = range(first, -(-along.stop // each))
            words = self.stored.read(*wanted)
            words = words + self.add if self.add else words
            numbers = _unpacked(words.T if self.packed == 0 else words, self.bits)
            begin = along.start - first * each
            numbers = numbers[:, begin : begin + len(along)]
            data = numbers.T if self.packed == 0 else numbers
        else:
            data = self.stored.read(*wanted)
        wide = (data.T if self.turned else data).float()
        return wide.sub_(self.less) if self.less else wide


def _unpacked(
    words: Tensor,  # [n, w] int32
    bits: int,
) -> Tensor:
    """The numbers in words [n, 32 w / bits] uint8: of a byte the lower half comes first."""
    # a single column counts as contiguous whatever its stride is, which a view does not accept
    data = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return data if bits == 8 else torch.stack((data & 15, data >> 4), dim=-1).flatten(1)


@dataclass(frozen=True)
class Grid:
    """Scales or zero points, each for a rectangle of a matrix.

    Attributes:
        numbers: a number for each rectangle.
        height, width: of a rectangle.
        order: [columns] the column of ``numbers`` for each column of the matrix; None if they
            follow each other.
    """

    numbers: Matrix
    height: int
    width: int
    order: Stored | None = None

    def read(self, rows: range, columns: range) -> Tensor:
        """Those of a part of the matrix: [rows, columns], or one where they are all the same."""
        above = range(rows.start // self.height, (rows.stop - 1) // self.height + 1)
        ids = torch.arange(columns.start, columns.stop) // self.width
        if self.order is not None:
            ids = self._ordered(self.order, columns, ids)
        left = range(int(ids.min()), int(ids.max()) + 1)
        part = self.numbers.read(above, left)
        if len(left) > 1:
            part = part[:, ids - left.start]
        if self.height > 1 and len(above) > 1:
            part = part[torch.arange(rows.start, rows.stop) // self.height - above.start]
        return part

    def _ordered(self, order: Stored, columns: range, plain: Tensor) -> Tensor:
        """The groups [columns] that the checkpoint names; ``plain`` where all are -1, for unset."""
        ids, count = order.read(columns, range(1))[:, 0].long(), self.numbers.shape[1]
        if bool((ids == -1).all()):
            return plain
        if int(ids.min()) < 0 or int(ids.max()) >= count:
            raise WeightsError(
                f"{order.name} names groups {int(ids.min())} to {int(ids.max())}, expected 0 to "
                f"{count - 1}"
            )
        return ids


@dataclass(frozen=True)
class Dequantized:
    """A quantized matrix as if it were stored in float32: (numbers - zero points) * scales.

    Attributes:
        name: "X.weight".

    Example:
        >>> matrix[2:4, :]  # [2, inputs] float32, of which no other row is read
    """

    name: str
    _numbers: Matrix
    _scales: Grid
    _zeros: Grid | None = None

    def get_shape(self) -> list[int]:
        """[outputs, inputs]."""
        return list(self._numbers.shape)

    def get_dtype(self) -> str:
        """What a part is read in."""
        return "F32"

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        """A part of it in float32; two slices without steps. Raises WeightsError."""
        rows, columns = self._ranges(index)
        out = torch.empty(len(rows), len(columns))
        step = max(_CHUNK // max(len(columns), 1), 32)
        for start in range(0, len(rows) if columns else 0, step):
            some = rows[start : start + step]
            numbers = self._numbers.read(some, columns)
            if self._zeros is not None:
                numbers = numbers.sub_(self._zeros.read(some, columns))
            torch.mul(numbers, self._scales.read(some, columns), out=out[start : start + step])
        return out

    def scaled(self, index: tuple[slice, ...]) -> tuple[Tensor, Tensor] | None:
        """A part as it is stored: [rows, columns] float8_e4m3fn, and scales [rows] float32.

        None of a matrix whose rows have more than one scale each, and of one that is not FP8.
        """
        stored = self._numbers.stored
        wide = self._scales.numbers.shape[1] > 1 or self._zeros is not None
        if stored.kind != "F8_E4M3" or wide:
            return None
        rows, columns = self._ranges(index)
        scale = self._scales.read(rows, columns)
        return stored.read(rows, columns), scale.expand(len(rows), 1)[:, 0].contiguous()

    def _ranges(self, index: tuple[slice, ...]) -> tuple[range, range]:
        (rows, columns) = (
            range(n)[part] for n, part in zip(self._numbers.shape, index, strict=True)
        )
        return rows, columns
