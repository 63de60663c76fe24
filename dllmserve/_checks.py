"""Value checks shared by the public dataclasses. Booleans are never numbers here."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from dllmserve.errors import ConfigError, DllmServeError, unknown_option

ErrorType = type[DllmServeError]

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def check_known(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise UnknownOptionError for the first name that is not known."""
    names = set(known)
    for name in given:
        if name not in names:
            raise unknown_option(owner, name, names)


def plain(value: Any) -> Any:
    """A number, flag or text as Python's own: numpy's scalars, and arrays and tensors of one.

    What has dimensions, even if it holds one number alone, is none and stays as it is.
    """
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path whose ``~`` is a user's home directory.

    Raises:
        ConfigError: that user has none, as where a container runs as a user without a name; or
            there is a NUL in it.
    """
    if "\0" in os.fspath(path):
        raise ConfigError(f"{os.fspath(path)!r} is no path: it has a character NUL")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"the ~ in {os.fspath(path)!r} leads nowhere: that user has no home directory here; "
            "give the whole path"
        ) from error


def is_broken_link(path: Path) -> bool:
    """Whether it is a link to something that is not there."""
    return path.is_symlink() and not path.exists()


def true_or_false(err: ErrorType, name: str, text: str) -> bool:
    """The value of a switch that is written out, as in an environment variable."""
    if text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    raise err(f"{name} must be true or false, got {text!r}")


def check_int(err: ErrorType, name: str, value: Any, low: int, high: int | None = None) -> int:
    """The value as a plain int.

    Raises ``err`` unless it is an integer of any kind (not a bool, and no float, whatever its
    value) in ``[low, high]``.
    """
    bounds = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    number = plain(value)
    if isinstance(number, bool) or not hasattr(number, "__index__") or _has_dimensions(number):
        raise err(f"{name} must be {bounds}, got {value!r} ({type(value).__name__})")
    found = operator.index(number)
    if found < low or (high is not None and found > high):
        raise err(f"{name} must be {bounds}, got {found}")
    return found


def check_ids(err: ErrorType, name: str, ids: Any) -> tuple[int, ...]:
    """Token ids as plain ints; raises ``err`` unless they are a list, a tuple or an array."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if not isinstance(ids, (list, tuple)):
        raise err(f"{name} must be a list of token ids, got {ids!r} ({type(ids).__name__})")
    return tuple(check_int(err, f"each of {name}", i, 0) for i in ids)


def listed_ids(text: str) -> list[int]:
    """Token ids of a text, with commas between them; ValueError if it is something else."""
    return [int(part) for part in text.split(",")]


def check_float(
    err: ErrorType,
    name: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    low_open: bool = False,
) -> float:
    """The value as a plain int or float; raises ``err`` unless it is finite and within bounds."""
    left = "(" if low_open else "["
    if low is None:
        bounds = "a finite number" if high is None else f"a finite number <= {high:g}"
    elif high is None:
        bounds = f"a finite number {'>' if low_open else '>='} {low:g}"
    else:
        bounds = f"a number in {left}{low:g}, {high:g}]"
    number = plain(value)
    kinds = hasattr(number, "__float__") or hasattr(number, "__index__")
    if isinstance(number, bool) or not kinds or _has_dimensions(number):
        raise err(f"{name} must be {bounds}, got {value!r} ({type(value).__name__})")
    found = _finite(number)
    if found is None:
        raise err(f"{name} must be {bounds}, got {value}")
    too_low = low is not None and (found < low or (low_open and found == low))
    if too_low or (high is not None and found > high):
        raise err(f"{name} must be {bounds}, got {value}")
    return found


def _has_dimensions(value: Any) -> bool:
    """Whether it is an array or a tensor, of which those with one number can be a float too."""
    return bool(getattr(value, "ndim", 0))


def _finite(value: Any) -> int | float | None:
    """The number as a plain int or float, if it is finite and a float can hold it; else None."""
    try:
        number = float(value)
    except (OverflowError, ValueError, TypeError):  # too large, or a Decimal that is no number
        return None
    if not math.isfinite(number):
        return None
    return operator.index(value) if hasattr(value, "__index__") else number


def check_bool(err: ErrorType, name: str, value: Any) -> bool:
    """The value as a plain bool; raises ``err`` unless it is True or False."""
    flag = plain(value)
    if not isinstance(flag, bool):
        raise err(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
    return flag


def check_choice(err: ErrorType, name: str, value: Any, choices: Collection[str]) -> str:
    """The value as a plain text; raises ``err`` unless it is one of the given ones."""
    text = plain(value)
    if not isinstance(text, str) or text not in choices:
        from dllmserve.foreign import rule_meant  # which nobody needs who makes no mistake

        listed = ", ".join(repr(c) for c in choices)
        hint = rule_meant(name, text)
        raise err(f"{name} must be one of {listed}, got {value!r}{hint and '; '}{hint}")
    return text
