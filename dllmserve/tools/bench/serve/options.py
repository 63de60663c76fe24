"""What one ``dllmserve bench serve`` does, checked before anything is sent."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from dllmserve._checks import check_choice, check_float, check_int
from dllmserve.errors import ConfigError

ENDPOINTS = ("chat", "completions", "native")
DEFAULT_URL = "http://127.0.0.1:8000"
#: of a row whose length nobody gave: seconds where there is a rate, requests where there is none
DEFAULT_DURATION, DEFAULT_REQUESTS = 30.0, 100
#: of one row; its outcomes are all kept
MAX_REQUESTS = 1_000_000
#: headers that the client itself sets
_OWN_HEADERS = frozenset({"connection", "content-length", "content-type", "transfer-encoding"})
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass(frozen=True)
class Address:
    """Where the server is.

    Attributes:
        host: name or number, without brackets.
        port: of TCP.
        tls: whether the connection is encrypted.
        authority: host and port as in the ``Host`` header.
        prefix: path in front of ``/v1``, without a slash at its end.
    """

    host: str
    port: int
    tls: bool
    authority: str
    prefix: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """From a base URL; a "/v1" at its end, as OpenAI's clients want it, is dropped.

        Raises:
            ConfigError: no http(s) URL, or one with a password, a query or odd characters.

        Example:
            >>> Address.parse("http://localhost:8000/v1").port
            8000
        """
        if not url.isascii() or not url.isprintable() or " " in url:
            raise ConfigError(f"url must be plain ASCII without blanks, got {url!r}")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"url: {error}, got {url!r}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url must look like {DEFAULT_URL}, got {url!r}")
        if parts.username is not None or parts.password is not None:
            # the value is not repeated: it is a secret
            raise ConfigError("url must hold no user or password; use --api-key or --header")
        if parts.query or parts.fragment:
            raise ConfigError(f"url must end before any ? or #, got {url!r}")
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        return cls(parts.hostname, port or (443 if tls else 80), tls, parts.netloc, prefix)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """One load test.

    Attributes:
        url: of the server, without ``/v1``.
        endpoint: one of ENDPOINTS.
        model: name in the requests; None takes the first that the server lists.
        stream: whether answers are streamed.
        api_key: sent as a bearer token, never shown.
        headers: further headers; values are never shown.
        body: fields merged into every request.
        rates: requests per second, one row each; infinity is all at once. Empty with a trace.
        trace: name of the file that the arrivals come from.
        requests, duration: how many, and seconds of arrivals; whichever ends first.
        burstiness: shape of the gamma distribution of the gaps; 1 is a Poisson process.
        concurrency: most requests in flight, None for no limit.
        seed: of arrivals and built-in prompts.
        warmup: requests before the first row, one at a time, not counted.
        timeout: seconds that a request may take from being sent.
        prompts: name of the file that the prompts come from.
        max_tokens, temperature: of every request.
        slo_total, slo_first: bounds, in seconds, that a good request keeps.

    Raises:
        ConfigError: a value is wrong, or two of them exclude each other.
    """

    url: str = DEFAULT_URL
    endpoint: str = "chat"
    model: str | None = None
    stream: bool = True
    api_key: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = (1.0,)
    trace: str | None = None
    requests: int | None = None
    duration: float | None = None
    burstiness: float = 1.0
    concurrency: int | None = None
    seed: int = 0
    warmup: int = 1
    timeout: float = 600.0
    prompts: str | None = None
    max_tokens: int = 64
    temperature: float = 0.0
    slo_total: float | None = None
    slo_first: float | None = None

    def __post_init__(self) -> None:
        Address.parse(self.url)
        check_choice(ConfigError, "endpoint", self.endpoint, ENDPOINTS)
        check_int(ConfigError, "max_tokens", self.max_tokens, 1)
        check_float(ConfigError, "temperature", self.temperature, 0)
        check_int(ConfigError, "warmup", self.warmup, 0)
        check_int(ConfigError, "seed", self.seed, 0)
        check_float(ConfigError, "timeout", self.timeout, 0, low_open=True)
        check_float(ConfigError, "burstiness", self.burstiness, 0, low_open=True)
        if self.concurrency is not None:
            check_int(ConfigError, "concurrency", self.concurrency, 1)
        for name in ("slo_total", "slo_first", "duration"):
            if getattr(self, name) is not None:
                check_float(ConfigError, name, getattr(self, name), 0, low_open=True)
        if self.requests is not None:
            check_int(ConfigError, "requests", self.requests, 1, MAX_REQUESTS)
        self._check_stream()
        self._check_load()
        _check_key(self.api_key)

    @property
    def address(self) -> Address:
        """The url's parts."""
        return Address.parse(self.url)

    @property
    def bounded(self) -> bool:
        """Whether there is a bound that a good request keeps."""
        return self.slo_total is not None or self.slo_first is not None

    def closed(self, rate: float) -> bool:
        """Whether a row is a closed loop: a request is sent when one before it has ended."""
        return self.trace is None and math.isinf(rate) and self.concurrency is not None

    def limits(self, rate: float) -> tuple[int, float]:
        """Most requests of a row, and seconds after which none arrives; infinity is no limit."""
        count, seconds = self.requests, self.duration
        if count is None and seconds is None and self.trace is None:
            if math.isinf(rate):
                count = DEFAULT_REQUESTS
            else:
                seconds = DEFAULT_DURATION
        return (
            MAX_REQUESTS if count is None else count,
            math.inf if seconds is None else seconds,
        )

    def public(self) -> dict[str, Any]:
        """Every option but the secrets, for the record."""
        names = [n for n in self.__dataclass_fields__ if n not in ("api_key", "headers")]
        shown = {name: getattr(self, name) for name in names}
        # JSON has no infinity
        shown["rates"] = ["inf" if math.isinf(rate) else rate for rate in self.rates]
        return {**shown, "headers": sorted(self.headers), "api_key": self.api_key is not None}

    def _check_stream(self) -> None:
        if self.endpoint == "native" and self.stream:
            raise ConfigError("stream: the native API is submit and poll, use --no-stream")
        if self.slo_first is not None and not self.stream:
            raise ConfigError(
                "slo_first needs a stream: only a stream tells when the first text is there"
            )
        if "stream" in self.body:
            raise ConfigError("body must not hold 'stream'; use --stream or --no-stream")

    def _check_load(self) -> None:
        if self.trace is not None and self.rates:
            raise ConfigError("rate and trace exclude each other: a trace has its own times")
        if self.trace is not None and self.prompts is not None:
            raise ConfigError("prompts and trace exclude each other: a trace has its own prompts")
        if self.trace is None and not self.rates:
            raise ConfigError("rates must hold at least one rate, such as 1,2,4")
        for rate in self.rates:
            if math.isinf(rate) and self.duration is not None and self.concurrency is None:
                raise ConfigError(
                    "duration has no meaning for requests that are all sent at once; "
                    "use --requests, a finite --rate, or --concurrency for a closed loop"
                )
            _, seconds = self.limits(rate)
            if self.requests is None and math.isfinite(rate) and rate * seconds > MAX_REQUESTS:
                raise ConfigError(
                    f"rate={rate:g} for duration={seconds:g} is over the {MAX_REQUESTS:,} "
                    "requests that one row may hold"
                )


def parse_rates(text: str) -> tuple[float, ...]:
    """Rates from a comma list.

    Raises:
        ConfigError: the text is no such list.

    Example:
        >>> parse_rates("1,2.5,inf")
        (1.0, 2.5, inf)
    """
    found = []
    for part in text.split(","):
        try:
            rate = float(part)
        except ValueError:
            rate = math.nan
        if not rate > 0:  # so that "nan" is refused too
            raise ConfigError(
                f"rate must be numbers > 0 or inf with commas between, such as 1,2,4, got {text!r}"
            )
        found.append(rate)
    return tuple(found)


def parse_body(text: str) -> dict[str, Any]:
    """Fields of a request from JSON.

    Raises:
        ConfigError: the text is no JSON object.

    Example:
        >>> parse_body('{"steps": 32}')
        {'steps': 32}
    """
    try:
        value = msgspec.json.decode(text.encode("utf-8", "surrogateescape"))
    except msgspec.DecodeError as error:
        raise ConfigError(f"body is not JSON: {error}, got {text!r}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"""body must be a JSON object such as '{{"steps": 32}}', got {text!r}""")
    return value


def parse_headers(lines: Sequence[str]) -> dict[str, str]:
    """Headers from ``Name: value`` texts, by name in lower case.

    Raises:
        ConfigError: a text is no header, or one that the client sets itself.

    Example:
        >>> parse_headers(["X-Team: blue"])
        {'x-team': 'blue'}
    """
    found = {}
    for line in lines:
        name, colon, value = line.partition(":")
        value = value.strip()
        # values may be secrets, so that errors show the name at most
        if not colon or not _HEADER_NAME.fullmatch(name):
            raise ConfigError("header must look like 'Name: value'")
        if not value.isascii() or not value.isprintable():
            raise ConfigError(f"header {name}: the value must be printable ASCII")
        if name.lower() in _OWN_HEADERS:
            raise ConfigError(f"header {name} is set by the client itself")
        found[name.lower()] = value
    return found


def _check_key(key: str | None) -> None:
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise ConfigError("api_key must be printable ASCII and not empty")
