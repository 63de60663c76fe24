"""Counter-based noise on the device, bit for bit that of ``decoding.noise``, and a rough twin."""

from __future__ import annotations

import os

import triton
import triton.language as tl

#: Triton's interpreter runs no assembly
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_LN_2 = tl.constexpr(0.6931471805599453)
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MUL_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MUL_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def mix(
    x: tl.tensor,
) -> tl.tensor:
    """decoding.noise.mix on uint64."""
    x = x + _GOLDEN
    x = (x ^ (x >> 30)) * _MUL_1
    x = (x ^ (x >> 27)) * _MUL_2
    return x ^ (x >> 31)


@triton.jit
def spread(
    ids: tl.tensor,
) -> tl.tensor:
    """What ids add to a row's key: uint64."""
    return ids.to(tl.uint64) * _GOLDEN


@triton.jit
def uniform(
    key: tl.tensor,
    ids: tl.tensor,
) -> tl.tensor:
    """token_uniforms of one row: float64 in (0, 1), bit for bit."""
    # below 2^52, so the signed conversion is the same and cheaper
    number = (mix(key.to(tl.uint64) + spread(ids)) >> 12).to(tl.int64)
    return (number.to(tl.float64) + 0.5) * 2.220446049250313e-16


@triton.jit
def gumbel(
    key: tl.tensor,
    ids: tl.tensor,
) -> tl.tensor:
    """Gumbel noise of one row, float64."""
    return -tl.log(-tl.log(uniform(key, ids)))


@triton.jit
def _rough_log(
    x: tl.tensor,
) -> tl.tensor:
    """The natural logarithm in float32, by the one instruction that there is for it."""
    if _INTERPRETED:
        return tl.log2(x) * _LN_2
    found = tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
    return found * _LN_2


@triton.jit
def rough_gumbel(
    keys: tl.tensor,  # uint64, a row's key and what ids add to it
) -> tuple[tl.tensor, tl.tensor]:
    """Gumbel noise in float32, and a number that is below 256 where it may be 0.0025 off or more.

    Only the upper 32 bits of the random number are used. Near u = 1 the logarithm is taken of
    1 - u, which those bits give with their full precision.
    """
    high = (mix(keys) >> 32).to(tl.uint32)
    left = ~high
    u = (high.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    w = (left.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = w * (1.0 + w * (0.5 + w * (0.3333333333 + w * 0.25)))
    rate = tl.where(w < 0.015625, series, -_rough_log(u))
    return -_rough_log(rate), tl.minimum(high, left)
