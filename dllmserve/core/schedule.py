"""How many tokens each step of a fixed schedule writes.

Sources: LLaDA generate.py (get_num_transfer_tokens) for "uniform", Dream's
``_sample`` for "dream", and ``get_num_transfer_tokens`` of ZHZisZZ/dllm with its linear schedule
for "mdlm". Steps that would write nothing are left out: they change no token, so the answer is the
same with fewer forwards.
"""

from __future__ import annotations

import struct
from functools import lru_cache


def steps_per_block(steps: int, blocks: int) -> tuple[int, ...]:
    """Spread steps over blocks as evenly as they can be, at least one a block.

    Example:
        >>> steps_per_block(10, 4)
        (3, 3, 2, 2)
    """
    return tuple(max(1, steps // blocks + (b < steps % blocks)) for b in range(blocks))


def split(n: int, steps: int) -> list[int]:
    """LLaDA's even split of n tokens over the steps, larger shares first.

    Example:
        >>> split(30, 8), split(5, 8)
        ([4, 4, 4, 4, 4, 4, 3, 3], [1, 1, 1, 1, 1, 0, 0, 0])
    """
    return [n // steps + (t < n % steps) for t in range(steps)]


def dream_split(n: int, steps: int, eps: float) -> list[int]:
    """Dream's counts: ``int(left * (1 - t[i+1] / t[i]))``, all that is left at the end.

    The arithmetic is float32, as in Dream, so that counts fall on the same side.

    Example:
        >>> dream_split(32, 8, 1e-3)
        [3, 4, 4, 4, 4, 4, 4, 5]
    """
    times = _linspace_f32(1.0, eps, steps + 1)
    counts: list[int] = []
    left = n
    for i in range(steps):
        if i == steps - 1:
            count = left
        else:
            share = _f32(1.0 - _f32(times[i + 1] / times[i]))
            count = int(_f32(left * share))
        counts.append(count)
        left -= count
    return counts


def mdlm_split(n: int, steps: int) -> list[int]:
    """The linear schedule of masked diffusion: shares of what is left, rounded.

    The shares are float32, as upstream, so that halves are rounded to the same side.

    Example:
        >>> mdlm_split(5, 2), mdlm_split(4, 3), mdlm_split(10, 4)
        ([2, 3], [1, 1, 2], [2, 3, 2, 3])
    """
    counts, left = list[int](), n
    for j in range(steps):
        known, next_known = (_f32(1.0 - _f32((steps - i) / steps)) for i in (j, j + 1))
        kept = _f32(_f32(1.0 - next_known) / _f32(1.0 - known))
        counts.append(min(left, round(left * _f32(1.0 - kept))))
        left -= counts[-1]
    return counts


def window_split(masks: int, window: int, steps: int) -> tuple[int, ...]:
    """SDAR's quotas of a block: a whole window's, whatever of it is masked, without empty steps.

    Source: ``get_num_transfer_tokens`` of JetAstra/SDAR's generate.py.

    Example:
        >>> window_split(3, 4, 4), window_split(8, 8, 3)
        ((1, 1, 1), (3, 3, 2))
    """
    shares, left = [], masks
    for share in split(window, steps):
        shares.append(min(share, left))
        left -= shares[-1]
    return tuple(share for share in shares if share)


@lru_cache(maxsize=512)
def block_quotas(
    masks: tuple[int, ...], steps: int, schedule: str, eps: float
) -> tuple[tuple[int, ...], ...]:
    """Tokens to write in each step of each block, by its masks, without the empty steps."""
    quotas = []
    for count, share in zip(masks, steps_per_block(steps, len(masks)), strict=True):
        if schedule == "dream":
            shares = dream_split(count, share, eps)
        else:
            shares = mdlm_split(count, share) if schedule == "mdlm" else split(count, share)
        quotas.append(tuple(k for k in shares if k > 0))
    return tuple(quotas)


def _f32(value: float) -> float:
    """Round to float32, as a host without numpy can."""
    result: float = struct.unpack("f", struct.pack("f", value))[0]
    return result


def _linspace_f32(start: float, end: float, count: int) -> list[float]:
    """torch.linspace in float32: the first half counts up, the second counts down."""
    start, end = _f32(start), _f32(end)
    step = _f32(_f32(end - start) / (count - 1))
    half = count // 2
    return [
        _f32(start + _f32(step * i)) if i < half else _f32(end - _f32(step * (count - 1 - i)))
        for i in range(count)
    ]
