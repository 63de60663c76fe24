"""When requests arrive: a seeded random process, or a file."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import msgspec

from dllmserve.errors import ConfigError
from dllmserve.tools.bench.serve.options import MAX_REQUESTS
from dllmserve.tools.text import read_lines


@dataclass(frozen=True)
class TraceEntry:
    """One line of a trace.

    Attributes:
        at: seconds from the start.
        prompt: of the request.
        fields: merged into its body.
    """

    at: float
    prompt: str
    fields: Mapping[str, Any]


def arrival_times(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Seconds at which requests arrive, without an end.

    The gaps are drawn from a gamma distribution of that shape and of mean ``1 / rate``: shape 1
    is a Poisson process, less is burstier, more is more regular. The same seed gives the same
    arrivals at every rate, only faster.

    Example:
        >>> from itertools import islice
        >>> [round(at, 2) for at in islice(arrival_times(2.0, 1.0, 0), 3)]
        [0.93, 1.64, 1.91]
    """
    if math.isinf(rate):
        yield from repeat(0.0)
    draw, at = random.Random(seed), 0.0
    while True:
        at += draw.gammavariate(burstiness, 1 / (rate * burstiness))
        yield at


def read_trace(file: str) -> list[TraceEntry]:
    """Lines of a trace, by time.

    Raises:
        ConfigError: a line is wrong, or there is none.
        OSError: the file cannot be read.
    """
    found = [_entry(line, f"{file}:{number}") for number, line in read_lines(file)]
    if not found:
        raise ConfigError(f"trace: {file} holds no request")
    if len(found) > MAX_REQUESTS:
        raise ConfigError(f"trace: {file} holds {len(found):,} requests, over {MAX_REQUESTS:,}")
    return sorted(found, key=lambda entry: entry.at)


def _entry(line: str, place: str) -> TraceEntry:
    try:
        value = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f'{place} must be an object such as {{"at": 0.5, "prompt": "..."}}')
    at, prompt = value.pop("at", None), value.pop("prompt", None)
    if isinstance(at, bool) or not isinstance(at, (int, float)) or not 0 <= at < math.inf:
        raise ConfigError(f'{place}: "at" must be a number of seconds >= 0, got {at!r}')
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError(f'{place}: "prompt" must be a text that is not empty')
    if "stream" in value:
        raise ConfigError(f'{place} must not hold "stream"; use --stream or --no-stream')
    return TraceEntry(float(at), prompt, value)
