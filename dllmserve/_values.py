"""Values of SamplingParams that are more than a number or a text: stop strings, biases, lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from dllmserve._checks import check_float, check_int
from dllmserve.errors import InvalidParameterError

MAX_STOP_STRINGS = 16
#: Token ids that a request may bias; the largest bias, up or down, is that of OpenAI's API.
MAX_LOGIT_BIAS = 1024
LOGIT_BIAS_BOUND = 100.0


class LogitBias(dict[int, float]):
    """A dict that stays as it is, and so can be hashed with the parameters that hold it."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return LogitBias, (dict(self),)  # not filled item by item

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("logit_bias cannot be changed: make new SamplingParams")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse


class NotGiven(int):
    """A length that nobody gave: a default, or what the other name of it says.

    Copies, pickles and ``dataclasses.replace`` keep the type. ``asdict`` gives a plain number.
    """

    def __deepcopy__(self, _: Any) -> int:
        return int(self)


class Kept(NotGiven):
    """A length that somebody gave, and that ``dataclasses.replace`` hands on to a copy."""


def rank(length: int) -> int:
    """Of a length's two names, which one counts: what is given now, then what was given before."""
    return 1 if isinstance(length, Kept) else 0 if isinstance(length, NotGiven) else 2


def normal_stop(stop: Any) -> str | tuple[str, ...] | None:
    if hasattr(stop, "tolist"):
        stop = stop.tolist()  # numpy's array of texts, or its text
    if stop is None:
        return None
    if not isinstance(stop, (str, list, tuple)):
        raise InvalidParameterError(
            f"stop must be a string or a list of strings, got {stop!r} ({type(stop).__name__})"
        )
    strings = [stop] if isinstance(stop, str) else list(stop)
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidParameterError(
            f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(strings)}"
        )
    for item in strings:
        if not isinstance(item, str) or not item:
            raise InvalidParameterError(f"stop strings must be non-empty strings, got {item!r}")
    return stop if isinstance(stop, str) else tuple(strings)


def normal_bias(bias: Any) -> LogitBias | None:
    err, bound = InvalidParameterError, LOGIT_BIAS_BOUND
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise err(
            "logit_bias must be a mapping of token ids to numbers, "
            f"got {bias!r} ({type(bias).__name__})"
        )
    if len(bias) > MAX_LOGIT_BIAS:
        raise err(f"logit_bias takes at most {MAX_LOGIT_BIAS} token ids, got {len(bias)}")
    found = {
        check_int(err, "a token id of logit_bias", token, 0): float(
            check_float(err, f"logit_bias[{token}]", value, -bound, bound)
        )
        for token, value in bias.items()
    }
    return LogitBias(sorted(found.items())) or None
