"""Values of SamplingParams that are more than a number or a text: biases, sparse attention, ..."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from dllmserve._checks import check_float, check_ids, check_int, check_known
from dllmserve.errors import InvalidParameterError
from dllmserve.knobs import check_knobs, knob

#: longest answer and largest step count that a request may ask for
MAX_GEN_LENGTH = 8192
MAX_STEPS = 8192
#: most ids of stop_token_ids
MAX_STOP_IDS = 16
#: diffusion block of the presets, and where neither a request nor an operator says another
BLOCK_LENGTH = 32
MAX_STOP_STRINGS = 16
#: Token ids that a request may bias; the largest bias, up or down, is that of OpenAI's API.
MAX_LOGIT_BIAS = 1024
LOGIT_BIAS_BOUND = 100.0
#: most of the likeliest tokens whose log-probabilities an answer may carry (OpenAI's bound)
MAX_LOGPROBS = 20
#: most texts that ``choice`` may name
MAX_CHOICES = 1024


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


class Usual(float):
    """A number that nobody gave; a rule may have another.

    Copies, pickles and ``dataclasses.replace`` keep the type. ``asdict`` gives a plain number.
    """

    def __deepcopy__(self, _: Any) -> float:
        return float(self)


class Kept(NotGiven):
    """A length that somebody gave, and that ``dataclasses.replace`` hands on to a copy."""


class Filled(str):
    """A name that a preset fills in; a model that has no use for it takes another.

    Copies, pickles and ``dataclasses.replace`` keep the type. ``asdict`` gives a plain text.
    """

    def __deepcopy__(self, _: Any) -> str:
        return str(self)


def rank(length: int) -> int:
    """Of a length's two names, which one counts: what is given now, then what was given before."""
    return 1 if isinstance(length, Kept) else 0 if isinstance(length, NotGiven) else 2


def normal_ids(ids: Any) -> tuple[int, ...] | None:
    """``stop_token_ids`` as it is kept. Raises InvalidParameterError."""
    if ids is None:
        return None
    found = check_ids(InvalidParameterError, "stop_token_ids", ids)
    if len(found) > MAX_STOP_IDS:
        raise InvalidParameterError(
            f"stop_token_ids takes at most {MAX_STOP_IDS} ids, got {len(found)}"
        )
    return found


def normal_schema(schema: Any) -> str | None:
    """``json_schema`` as it is kept: JSON text. Raises InvalidParameterError."""
    if schema is None:
        return None
    try:
        read = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(read, ensure_ascii=False, allow_nan=False)
        text.encode()  # lone surrogates are no characters
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameterError(f"json_schema is no JSON: {error}") from error
    if not isinstance(read, (Mapping, bool)):
        raise InvalidParameterError(
            f"json_schema must be a JSON object, as a dict or a text, got {schema!r}"
        )
    return text


def normal_choice(choice: Any) -> tuple[str, ...] | None:
    """``choice`` as it is kept. Raises InvalidParameterError."""
    if choice is None:
        return None
    if hasattr(choice, "tolist"):
        choice = choice.tolist()
    texts = isinstance(choice, (list, tuple)) and all(isinstance(c, str) and c for c in choice)
    if not texts or not choice:
        raise InvalidParameterError(
            f"choice must be a list of texts that are not empty, got {choice!r}"
        )
    if len(choice) > MAX_CHOICES:
        raise InvalidParameterError(f"choice takes at most {MAX_CHOICES} texts, got {len(choice)}")
    return tuple(dict.fromkeys(choice))


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


#: how the tokens outside a block are scored
SCORES = ("mean_query", "attention")


@dataclass(frozen=True)
class SparseConfig:
    """Sparse attention of one request.

    Source: Sparse-dLLM (OpenMOSS) for the eviction rule, dLLM-Serve (arXiv 2512.17077)
    for the selection per K,V head.

    For each block of the answer, the first ``delay_step`` forwards run over the whole
    canvas; the next one does too and then keeps, in every layer, the
    ``int(candidates * retention_ratio)`` tokens outside the block that the block's mean
    query likes best; all later forwards of the block compute the block alone against the
    kept tokens.

    Attributes:
        enabled: False behaves as if no SparseConfig had been given.
        retention_ratio: share of the tokens outside the block that is kept, 0 to 1.
        delay_step: forwards over the whole canvas before the one that selects.
        default_block_len: the window, from the block's start, whose queries score the
            context and whose tokens never compete; a longer block widens it. Also the
            block length when SamplingParams.block_length is None.
        head_select: True selects per K,V head (dLLM-Serve), False one set for all heads
            (Sparse-dLLM).
        pool_kernel: width of the max-pooling over neighbouring scores; 1 is no pooling.
        score: "mean_query" scores a token by the mean of the block's queries times its key
            (Sparse-dLLM, dLLM-Serve); "attention" by the largest attention weight that any of
            the block's queries gives it, so that what one position alone needs stays.
        min_keep: tokens that are kept at least, as far as there are so many: in short contexts
            every token counts, and leaving some out saves nothing.

    Raises:
        InvalidParameterError: (a ValueError) a field has a wrong type or value.
        UnknownOptionError: (a TypeError) an unknown keyword.

    Example:
        >>> SparseConfig(retention_ratio=0.25).keep(100)
        25
    """

    enabled: bool = knob(True, "Attend to a selected part of the context.")
    retention_ratio: float = knob(
        0.5, "Share of the tokens outside the block that is kept.", low=0, high=1
    )
    delay_step: int = knob(1, "Full forwards of a block before the one that selects.", low=0)
    default_block_len: int = knob(
        32, "Scoring window, and the block length if block_length is not given.", low=1
    )
    head_select: bool = knob(True, "Select for each K,V head on its own, or one set for all.")
    pool_kernel: int = knob(
        3, "Width of the max-pooling over neighbouring scores; 1 is off.", low=1, most_asked=1024
    )
    score: str = knob(
        "mean_query",
        "Keep tokens by the block's mean query, or by the attention that they get.",
        choices=SCORES,
    )
    min_keep: int = knob(0, "Tokens outside the block that are kept at least.", low=0)

    def __new__(cls, *args: Any, **kwargs: Any) -> SparseConfig:
        """Refuse unknown keywords with the nearest name, which dataclasses would not do."""
        check_known(cls.__name__, kwargs, [f.name for f in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_knobs(InvalidParameterError, self)

    def keep(self, candidates: int) -> int:
        """Number of tokens kept out of ``candidates`` tokens outside the block."""
        return min(max(int(candidates * self.retention_ratio), self.min_keep), candidates)
