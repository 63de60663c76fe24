"""Matrices and rows in eight bits: e4m3 numbers, and one float32 factor a row.

A weight has a factor for each output, computed once. Activations have one for each token, computed
where they come from. A product of the two is a product of e4m3 numbers, times both factors::

    x      [N, k] e4m3 x [N]        w  [out, k] e4m3 x [out]
    x @ w.T = (x.data @ w.data.T) * x.scale[:, None] * w.scale[None, :]

That is the scheme of vLLM's and compressed-tensors' "FP8_DYNAMIC".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

#: the dtype, its largest number, and the inverse of that
E4M3, MOST, SHARE = torch.float8_e4m3fn, 448.0, 1 / 448
#: rows whose largest number is below are scaled as if it were that; so zeros stay zeros
LEAST = 1e-30
#: numbers that are scaled at once while weights are loaded
_CHUNK = 2**26


class Scaled(NamedTuple):
    """Rows in e4m3.

    Attributes:
        data: [.., n, k] float8_e4m3fn.
        scale: [.., n] float32, by which a row is multiplied.
        dtype: what the rows are in otherwise, and products with them are.
    """

    data: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """That of ``data``."""
        return self.data.shape

    def wide(self) -> Tensor:
        """The rows in float32."""
        return self.data.float() * self.scale[..., None]

    def stacked(self, count: int) -> Scaled:
        """Of [count * n, k] or [count, .., k] rows those of each of ``count`` matrices."""
        width = self.data.shape[-1]
        data, scale = self.data.view(count, -1, width), self.scale.view(count, -1)
        return Scaled(data, scale, self.dtype)

    def matrices(self) -> Iterator[Scaled]:
        """Each of stacked matrices."""
        for data, scale in zip(self.data, self.scale, strict=True):
            yield Scaled(data, scale, self.dtype)


#: what a product is made of: rows as they are, or in e4m3
Rows = Tensor | Scaled


def scaled(x: Tensor) -> Scaled:
    """Rows [.., k] in e4m3, so that the largest of each becomes 448.

    They are multiplied by ``448 / largest`` in float32, because dividing each takes longer.

    Example:
        >>> rows = scaled(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
        >>> rows.data.tolist()
        [[224.0, -448.0], [0.0, 0.0]]
    """
    wide = x.float()
    most = wide.abs().amax(dim=-1).clamp(min=LEAST)
    by = most.reciprocal() * MOST
    return Scaled((wide * by[..., None]).to(E4M3), most * SHARE, x.dtype)


def library_product(x: Scaled, weight: Scaled, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` by torch's library: [N, out] of the weight's dtype.

    Args:
        x: [N, k].
        weight: [out, k], both multiples of 16.
        bias: [out], or None.
    """
    by_row, by_out = x.scale[:, None], weight.scale[None, :]
    return torch._scaled_mm(
        x.data, weight.data.t(), by_row, by_out, bias, out_dtype=weight.dtype, use_fast_accum=True
    )


def fill(to: Scaled, source: Tensor) -> None:
    """Scale rows of a checkpoint [.., k] into place, some at a time."""
    width = source.shape[-1]
    rows = source.reshape(-1, width)
    data, scale = to.data.view(-1, width), to.scale.view(-1)
    step = max(_CHUNK // max(width, 1), 1)
    for low in range(0, len(rows), step):
        part = scaled(rows[low : low + step].to(data.device))
        data[low : low + step].copy_(part.data)
        scale[low : low + step].copy_(part.scale)
