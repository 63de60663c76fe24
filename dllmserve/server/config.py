"""ServerConfig: the options of ``dllmserve serve`` that are not the engine's."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Any

from dllmserve.errors import ConfigError
from dllmserve.knobs import check_knobs, knob
from dllmserve.presets import PRESETS

LOG_FORMATS = ("auto", "text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
ID_SCHEMES = ("auto", "sequential", "random")
METRICS_COMPAT = ("none", "vllm")
#: scheme://host[:port]; some apps that are no web pages have a scheme of their own
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")

_FILES = ("address_file", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "api_key_file")


def _option(default: Any, panel: str, help: str, **traits: Any) -> Any:
    return knob(default, help, panel=panel, **traits)


_NET, _SAFE, _LOAD, _JOBS, _TEXT, _RUN = (
    "Network",
    "Access",
    "Load",
    "Jobs",
    "Requests",
    "Operation",
)


@dataclass(frozen=True)
class ServerConfig:
    """Options of the server; the help text of each is in its metadata.

    Raises:
        ConfigError: (a ValueError) a wrong value or type.

    Example:
        >>> ServerConfig(port=9000).loopback
        True
    """

    host: str = _option("127.0.0.1", _NET, "Address to listen on.")
    port: int = _option(8000, _NET, "Port to listen on; 0 takes a free one.", low=0, high=65535)
    address_file: str | None = _option(
        None, _NET, "File that says where the server listens, while it does; for probes."
    )
    ssl_certfile: str | None = _option(None, _NET, "TLS certificate (chain) in PEM.")
    ssl_keyfile: str | None = _option(None, _NET, "TLS private key in PEM.")
    ssl_ca_certs: str | None = _option(
        None, _NET, "PEM of the authorities whose client certificates are required."
    )
    cors_origins: str = _option("", _NET, "Origins that browsers may call from, with commas.")
    max_connections: int = _option(
        1024, _NET, "Connections with a request under way; more are answered with 503.", low=1
    )
    max_connections_per_address: int | None = _option(
        None,
        _NET,
        "Open connections of one address, or IPv6 network of 64 bits; more get a 429 (no limit, if "
        "not given; leave it so behind a proxy).",
        low=1,
    )
    header_timeout: float = _option(
        10.0, _NET, "Seconds that a client has to send its headers.", low=0, low_open=True
    )
    body_timeout: float = _option(
        30.0, _NET, "Seconds that a client has to send its body.", low=0, low_open=True
    )
    write_timeout: float = _option(
        30.0, _NET, "Seconds that a client may leave text unread.", low=0, low_open=True
    )
    keep_alive_timeout: float = _option(
        5.0, _NET, "Seconds that an idle connection stays open.", low=0, low_open=True
    )
    max_body_bytes: int = _option(2 << 20, _NET, "Bytes of a request body.", low=1)

    api_key_file: str | None = _option(
        None, _SAFE, "File of API keys, one a line; DLLMSERVE_API_KEYS holds more, with commas."
    )
    insecure_no_auth: bool = _option(
        False, _SAFE, "Listen on other than loopback addresses without any API key."
    )
    open_metrics: bool = _option(False, _SAFE, "Serve /metrics without a key.")
    requests_per_minute: int | None = _option(
        None,
        _SAFE,
        "Answers a minute that each key may ask for; prompts x n of a request count, polls do not "
        "(no limit, if not given).",
        low=1,
    )
    max_parallel_per_key: int | None = _option(
        None,
        _SAFE,
        "Answers at once for each key, unfinished jobs included; prompts x n of a request count "
        "(no limit, if not given).",
        low=1,
    )

    data_parallel_size: int = _option(
        1,
        _LOAD,
        "Engine processes, each with a model of its own; on GPUs each takes "
        "tensor_parallel_size of them.",
        low=1,
    )
    max_requests: int = _option(
        256,
        _LOAD,
        "Requests waiting and running; more get a 503. Of several keys, one may have three "
        "quarters.",
        low=1,
    )
    max_outstanding_work: int | None = _option(
        None,
        _LOAD,
        "Tokens that all of them may compute (if not given: what takes a minute at the "
        "measured speed). A key with nothing under way may bring one call of any size.",
        low=1,
    )
    queue_timeout: float | None = _option(
        None,
        _LOAD,
        "Seconds that a request may wait before it runs (no limit, if not given).",
        low=0,
        low_open=True,
    )
    request_timeout: float = _option(
        600.0, _LOAD, "Seconds that a request may take in all.", low=0, low_open=True
    )
    watchdog_timeout: float = _option(
        300.0,
        _LOAD,
        "Seconds without a heartbeat of the engine after which it is started again.",
        low=0,
        low_open=True,
    )
    load_timeout: float = _option(
        1800.0, _LOAD, "Seconds that loading the model may take.", low=0, low_open=True
    )
    restart: bool = _option(True, _LOAD, "Start a new engine when one dies.")

    job_store: str = _option(
        "auto",
        _JOBS,
        "Where jobs of /v1/generate are kept: a file, memory, or auto (a file for each port "
        "in the user's state directory).",
    )
    request_id_scheme: str = _option(
        "auto",
        _JOBS,
        "Ids of jobs; auto is sequential on loopback without keys, else random.",
        choices=ID_SCHEMES,
    )
    result_ttl: float = _option(
        600.0, _JOBS, "Seconds that a result is kept.", low=0, low_open=True
    )
    max_results: int = _option(10_000, _JOBS, "Results that are kept.", low=1)
    max_result_bytes: int = _option(64 << 20, _JOBS, "Bytes of all results that are kept.", low=1)

    served_model_name: str | None = _option(
        None, _TEXT, "Name of the model in the API (its own, if not given)."
    )
    default_max_tokens: int | None = _option(
        None,
        _TEXT,
        "Answer length of the OpenAI endpoints where a request gives none (if not given: what "
        "fits, for chats that end by themselves, else 128).",
        low=1,
    )
    default_quality: str = _option(
        "balanced",
        _TEXT,
        "Quality of the OpenAI endpoints where a request says nothing of decoding; exact is one "
        "token a step.",
        choices=tuple(PRESETS),
    )
    max_prompts: int = _option(128, _TEXT, "Answers that one request may ask for.", low=1)
    max_n: int = _option(8, _TEXT, "Choices for one prompt.", low=1)
    sse_keep_alive: float = _option(
        15.0,
        _TEXT,
        "Seconds of silence after which a stream gets a comment line.",
        low=0,
        low_open=True,
    )

    shutdown_timeout: float = _option(
        30.0, _RUN, "Seconds that requests under way get to finish after SIGTERM.", low=0
    )
    log_format: str = _option(
        "auto", _RUN, "auto is text in a terminal and json elsewhere.", choices=LOG_FORMATS
    )
    log_level: str = _option("info", _RUN, "Least severity that is logged.", choices=LOG_LEVELS)
    log_prompts: bool = _option(False, _RUN, "Log the first 200 characters of prompts.")
    metrics_compat: str = _option(
        "none",
        _RUN,
        "vllm also exports the gauges that its routers read, under its names.",
        choices=METRICS_COMPAT,
    )

    def __post_init__(self) -> None:
        check_knobs(ConfigError, self)
        for name in ("host", "job_store", "cors_origins"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be a string, got {getattr(self, name)!r}")
        for name in _FILES:
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"{name} must be a file, got {getattr(self, name)!r}")
        if bool(self.ssl_certfile) != bool(self.ssl_keyfile):
            raise ConfigError("TLS needs both ssl_certfile and ssl_keyfile")
        self._check_origins()

    def _check_origins(self) -> None:
        for origin in self.origins:
            if "*" in origin:
                raise ConfigError(
                    f"cors_origins={origin!r} would let every web page call: name the origins"
                )
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    "cors_origins must be origins as browsers send them, such as "
                    f"https://app.example or http://localhost:3000, without a path; got {origin!r}"
                )

    @property
    def origins(self) -> list[str]:
        """The origins of ``cors_origins``, in lower case, without a slash at the end."""
        parts = (part.strip().lower().removesuffix("/") for part in self.cors_origins.split(","))
        return [part for part in parts if part]

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
