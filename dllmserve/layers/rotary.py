"""Rotary angles: frequencies, their scaling for long contexts, and the tables of cos and sin.

Frequencies are computed in float32, in the order in which transformers computes them
(modeling_rope_utils.py), so that tables are the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dllmserve.core.model_spec import RopeScaling


def rotary_tables(
    head_dim: int,
    theta: float,
    max_len: int,
    device: torch.device,
    scaling: RopeScaling | None = None,
    turned: int = 0,
) -> tuple[Tensor, Tensor]:
    """Cos and sin of positions ``0 .. max_len - 1``: [max_len, D/2] float32 each.

    Of D/2 pairs of dimensions the first ``turned`` are rotated, or all of them if that is 0; the
    angle of the others is 0.

    Example:
        >>> cos, sin = rotary_tables(64, 1e4, 128, torch.device("cpu"))
        >>> cos.shape
        torch.Size([128, 32])
    """
    frequencies = inverse_frequencies(head_dim, theta, device, scaling)
    if turned:
        frequencies[turned:] = 0.0
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32, device=device), frequencies)
    cos, sin = angles.cos(), angles.sin()
    if scaling is None or scaling.attention_factor == 1.0:
        return cos, sin
    return cos * scaling.attention_factor, sin * scaling.attention_factor


def inverse_frequencies(
    head_dim: int, theta: float, device: torch.device, scaling: RopeScaling | None = None
) -> Tensor:
    """Radians a position, [D/2] float32, highest first."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    periods = theta**exponents
    plain = 1.0 / periods
    if scaling is None or scaling.kind == "default":
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    # yarn: a ramp over dimensions, 1 where the frequency is kept
    keep = 1 - _yarn_ramp(head_dim, theta, scaling).to(device)
    return 1.0 / (scaling.factor * periods) * (1 - keep) + plain * keep


def query_factors(max_len: int, device: torch.device, scaling: RopeScaling | None) -> Tensor | None:
    """What queries are multiplied by at each position, [max_len] float32; None for 1."""
    if scaling is None or scaling.query_beta == 0.0:
        return None
    passed = torch.floor(torch.arange(max_len, device=device) / scaling.original_len)
    return 1 + scaling.query_beta * torch.log(1 + passed)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's: lower frequencies are divided, higher ones kept, those between blended."""
    length, low, high = scaling.original_len, scaling.low, scaling.high
    waves = 2 * math.pi / plain
    divided = torch.where(waves > length / low, plain / scaling.factor, plain)
    smooth = (length / waves - low) / (high - low)
    blended = (1 - smooth) * divided / scaling.factor + smooth * divided
    between = (waves >= length / high) & (waves <= length / low)
    return torch.where(between, blended, divided)


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """0 where YaRN keeps a frequency, 1 where it divides it, [D/2] (arXiv 2309.00071)."""

    def dimension(turns: float) -> float:
        """Where a frequency turns so often in the original length."""
        wave = scaling.original_len / (turns * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(theta))

    first, last = dimension(scaling.high), dimension(scaling.low)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # no division by zero
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    return torch.clamp((pairs - first) / (last - first), 0, 1)
