"""Counter-based noise: a draw depends on seed, position, step and token id alone.

So a request's random numbers are the same whatever its batch, its chunk of the LM head
or the number of ranks that share the vocabulary. The mixer is splitmix64 (Steele, Lea
and Flood, 2014), in int64 arithmetic, which wraps around like uint64.
"""

from __future__ import annotations

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
