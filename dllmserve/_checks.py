"""Value checks shared by the public dataclasses. Booleans are never numbers here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from dllmserve.errors import DllmServeError, unknown_option

ErrorType = type[DllmServeError]


def check_known(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise UnknownOptionError for the first name that is not known."""
    names = set(known)
    for name in given:
        if name not in names:
            raise unknown_option(owner, name, names)


def check_int(err: ErrorType, name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise ``err`` unless ``value`` is an int (not a bool) in ``[low, high]``."""
    bounds = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise err(f"{name} must be {bounds}, got {value!r} ({type(value).__name__})")
    if value < low or (high is not None and value > high):
        raise err(f"{name} must be {bounds}, got {value}")


def check_float(
    err: ErrorType,
    name: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    low_open: bool = False,
) -> None:
    """Raise ``err`` unless ``value`` is a finite int or float within the bounds."""
    left = "(" if low_open else "["
    if low is None:
        bounds = "a finite number" if high is None else f"a finite number <= {high:g}"
    elif high is None:
        bounds = f"a finite number {'>' if low_open else '>='} {low:g}"
    else:
        bounds = f"a number in {left}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise err(f"{name} must be {bounds}, got {value!r} ({type(value).__name__})")
    too_low = low is not None and (value < low or (low_open and value == low))
    if not _finite(value) or too_low or (high is not None and value > high):
        raise err(f"{name} must be {bounds}, got {value}")


def _finite(value: int | float) -> bool:
    """Whether a float can hold the value; ints may be too large."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_bool(err: ErrorType, name: str, value: Any) -> None:
    """Raise ``err`` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise err(f"{name} must be True or False, got {value!r} ({type(value).__name__})")


def check_choice(err: ErrorType, name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise ``err`` unless ``value`` is one of the given strings."""
    allowed = tuple(choices)
    if not isinstance(value, str) or value not in allowed:
        listed = ", ".join(repr(c) for c in allowed)
        raise err(f"{name} must be one of {listed}, got {value!r}")
