"""What one ``dllmserve bench serve`` does, checked before anything is sent."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import msgspec

from dllmserve.errors import ConfigError
from dllmserve.knobs import check_knobs, knob

ENDPOINTS = ("chat", "completions", "native")
DEFAULT_URL = "http://127.0.0.1:8000"
#: of a row whose length nobody gave: seconds where there is a rate, requests where there is none
DEFAULT_DURATION, DEFAULT_REQUESTS = 30.0, 100
#: of one row; its outcomes are all kept
MAX_REQUESTS = 1_000_000
#: headers that the client itself sets
_OWN_HEADERS = frozenset({"connection", "content-length", "content-type", "transfer-encoding"})
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def base_url(url: str) -> str:
    """What paths are put behind; a "/v1" at its end, as OpenAI's clients want it, is dropped.

    Raises:
        ConfigError: no http(s) URL, or one with a password, a query or odd characters.

    Example:
        >>> base_url("http://localhost:8000/v1")
        'http://localhost:8000'
    """
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"url must be plain ASCII without blanks, got {url!r}")
    try:
        parts = urlsplit(url)
        _ = parts.port  # read, because it is not checked before
    except ValueError as error:
        raise ConfigError(f"url: {error}, got {url!r}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"url must look like {DEFAULT_URL}, got {url!r}")
    if parts.username is not None or parts.password is not None:
        # the value is not repeated: it is a secret
        raise ConfigError("url must hold no user or password; use --api-key or --header")
    if parts.query or parts.fragment:
        raise ConfigError(f"url must end before any ? or #, got {url!r}")
    prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{prefix}"


_ABOVE_0: Mapping[str, Any] = {"low": 0, "low_open": True}
#: by the headline that options have in the help
_server, _load, _asked, _report = (
    partial(knob, panel=panel) for panel in ("Server", "Load", "Requests", "Report")
)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """One load test; the knobs say what the fields are.

    ``rates`` has one row each; infinity is all at once, and it is empty with a trace. None is no
    limit, or what the help text says. Secrets are neither shown nor recorded: ``api_key``, and the
    values of ``headers``.

    Raises:
        ConfigError: a value is wrong, or two of them exclude each other.
    """

    url: str = _server(DEFAULT_URL, "Base URL of the server.")
    endpoint: str = _server(
        "chat",
        "API: /v1/chat/completions, /v1/completions, or /v1/generate with /v1/result.",
        choices=ENDPOINTS,
    )
    model: str | None = _server(
        None, "Model in the requests. (default the first that the server lists)"
    )
    stream: bool = _server(
        True, "Whether answers are streamed. (default yes, but native has no streams)"
    )
    api_key: str | None = _server(
        None,
        "Bearer token, never shown. In the environment, as DLLMSERVE_API_KEY, it is hidden from "
        "other users.",
        repr=False,
    )
    headers: Mapping[str, str] | None = _server(
        None, "Header 'Name: value'; may be given several times.", repr=False
    )
    rates: tuple[float, ...] = _load(
        (1.0,), "Requests per second, one row each; inf sends all at once.", own_check=True
    )
    requests: int | None = _load(
        None,
        f"Most requests of a row. (default no limit; {DEFAULT_REQUESTS} with --rate inf)",
        low=1,
        high=MAX_REQUESTS,
    )
    trace: str | None = _load(
        None,
        'Arrivals and prompts from lines of JSON: {"at": seconds, "prompt": text}, and fields of '
        "the request.",
    )
    duration: float | None = _load(
        None,
        f"Seconds of arrivals of a row. (default {DEFAULT_DURATION:g} without --requests)",
        **_ABOVE_0,
    )
    burstiness: float = _load(
        1.0,
        "Shape of the gamma distribution of the gaps: 1 is a Poisson process, less is burstier, "
        "more is more regular.",
        **_ABOVE_0,
    )
    concurrency: int | None = _load(
        None,
        "Most requests at once. A cap closes the loop: a slow server then gets fewer requests. "
        "With --rate inf, N users who each wait for their answer.",
        low=1,
    )
    seed: int = _load(0, "Of arrivals and built-in prompts.")
    warmup: int = _load(1, "Requests before the first row that do not count.")
    timeout: float = _load(600.0, "Seconds that a request may take from being sent.", **_ABOVE_0)
    prompts: str | None = _asked(
        None,
        "One prompt a line, in their order, over and over; JSON lines if the name ends in .jsonl. "
        "(default built-in English instructions)",
    )
    max_tokens: int = _asked(64, "Longest answer in tokens.", low=1)
    temperature: float = _asked(0.0, "Of every request.", low=0)
    body: Mapping[str, Any] | None = _asked(None, "Fields merged into every request.")
    slo_total: float | None = _report(
        None, "A good request has its whole answer within so many seconds.", **_ABOVE_0
    )
    slo_first: float | None = _report(
        None, "A good request has its first text within so many seconds.", **_ABOVE_0
    )

    def __post_init__(self) -> None:
        base_url(self.url)
        check_knobs(ConfigError, self)
        self._check_stream()
        self._check_load()
        _check_key(self.api_key)

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
        shown["body"] = dict(self.body or {})
        return {**shown, "headers": sorted(self.headers or ()), "api_key": self.api_key is not None}

    def _check_stream(self) -> None:
        if self.endpoint == "native" and self.stream:
            raise ConfigError("stream: the native API is submit and poll, use --no-stream")
        if self.slo_first is not None and not self.stream:
            raise ConfigError(
                "slo_first needs a stream: only a stream tells when the first text is there"
            )
        if "stream" in (self.body or {}):
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
