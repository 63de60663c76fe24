"""Logging of the server: one line for each event, which no text of a user can break."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any, Literal, TextIO

from dllmserve._checks import check_choice
from dllmserve.errors import ConfigError
from dllmserve.server.http.escape import escaped, shown

Format = Literal["json", "text"]

#: names that the logging module keeps for itself; an ``extra`` with one of them raises
RESERVED = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
#: uvicorn's copy of the message for colour terminals
_NOISE = frozenset({"color_message"})

#: loggers that get the handler; asyncio's reports exceptions that nobody awaited
_LOGGERS = ("dllmserve", "uvicorn", "asyncio")

_MAX_TEXT = 16_384  # characters of one field
_MAX_TRACE = 65_536  # characters of one traceback
_MAX_ITEMS = 64  # of one list or dict
_MAX_DEPTH = 4
#: stands where the address of a client was
_HIDDEN = "[address]"
#: what Python shows of a socket's ends; neither crosses the end of a JSON string or of a line
_ENDS = re.compile(
    r"\b[lr]addr=\([^)\"\\\n]*\)|\('[0-9A-Fa-f:.]+(?:%\w+)?', \d{1,5}(?:, \d+){0,2}\)"
)
#: where others write the text, and in tracebacks, everything that is an address is hidden
_FOREIGN = ("asyncio", "uvicorn")
_MAYBE_ADDRESS = re.compile(r"(?<![\w.:])(?:\[([0-9A-Fa-f.:]+)\](?::\d+)?|[0-9A-Fa-f.:]{3,60})")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PLAIN = re.compile(r"[^\s\"'=\\]+")


class JsonFormatter(logging.Formatter):
    """One JSON object per line, in ASCII.

    Keys: ``time`` (ISO 8601, UTC, milliseconds), ``level``, ``logger``, ``message``, every field
    of ``extra``, and ``exc`` with the traceback as one string. Control characters and
    everything beyond ASCII are JSON escapes, so a value can end neither its string nor the
    line; lone surrogates, which strict parsers refuse, become U+FFFD. Long values are cut.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line. Never raises."""
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": _cut(_message(record), _MAX_TEXT),
        }
        for key, value in _extras(record).items():
            line[f"extra_{key}" if key in line or key == "exc" else key] = _plain(value)
        trace = _trace(self, record)
        if trace:
            line["exc"] = _cut(trace, _MAX_TRACE)
        text = json.dumps(_whole(line), ensure_ascii=True, separators=(",", ":"))
        return _without_addresses(text, record)


class TextFormatter(logging.Formatter):
    """``time LEVEL logger: message key=value ...`` on one line, for people.

    Control characters are escaped. The lines of a traceback start with "  | ", so that no text
    inside an exception can look like a line of the log.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record as text. Never raises."""
        message = escaped(_cut(_message(record), _MAX_TEXT))
        head = f"{_time(record)} {record.levelname:<7} {escaped(record.name)}: {message}"
        fields = [f"{escaped(key)}={_word(value)}" for key, value in _extras(record).items()]
        lines = [" ".join([head, *fields])]
        trace = _trace(self, record)
        if trace:
            lines += [f"  | {escaped(line)}" for line in _cut(trace, _MAX_TRACE).split("\n")]
        return _without_addresses("\n".join(lines), record)


class _Handler(logging.StreamHandler[TextIO]):
    """The handler of this module, recognised by its class when logging is configured again."""


class OncePerSecond:
    """Logs an event that clients can cause thousands of times a second, with one line a second.

    The field ``times`` of a line says how often it has happened since the line before.

    Args:
        log: where the lines go.
        level: of all of them.
        clock: seconds, monotonic.

    Example:
        >>> full = OncePerSecond(logging.getLogger("dllmserve.server"), logging.WARNING)
        >>> full("no connection can be accepted", reason="Too many open files")
    """

    def __init__(
        self, log: logging.Logger, level: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log, self._level, self._clock = log, level, clock
        self._times = 0
        self._next = -math.inf

    def __call__(self, message: str, **fields: object) -> None:
        """Count the event, and log it if the last line is a second old."""
        self._times += 1
        now = self._clock()
        if now >= self._next:
            self._log.log(self._level, message, extra={**fields, "times": self._times})
            self._next, self._times = now + 1.0, 0


def configure_logging(
    format: Format = "text", level: str = "INFO", *, stream: TextIO | None = None
) -> None:
    """Send the logs of dllmserve, uvicorn and asyncio to one stream, in one format.

    May be called again: the handlers of the call before are replaced. uvicorn's access log is
    off, :class:`~dllmserve.server.http.request_id.RequestLog` writes a better one. Run uvicorn
    with ``log_config=None``, or it installs its own handlers.

    Args:
        format: "json" for machines, "text" for people.
        level: DEBUG, INFO, WARNING, ERROR or CRITICAL, in upper or lower case.
        stream: by default stderr.

    Raises:
        ConfigError: an unknown format or level.

    Example:
        >>> configure_logging("json", "warning")
        >>> logging.getLogger("dllmserve").warning("hello")  # doctest: +SKIP
        {"time":"2026-02-03T04:05:06.789Z","level":"WARNING","logger":"dllmserve",...}
    """
    check_choice(ConfigError, "log format", format, ("json", "text"))
    levels = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    check_choice(ConfigError, "log level", level.upper(), levels)
    handler = _Handler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    for name in (*_LOGGERS, "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            # uvicorn's own would write each line a second time
            if isinstance(old, _Handler) or name.startswith("uvicorn"):
                logger.removeHandler(old)
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(level.upper() if name != "asyncio" else "WARNING")
    # undo the level that a uvicorn.Config with a log_level may have set in this process
    logging.getLogger("uvicorn.error").setLevel(logging.NOTSET)
    logging.getLogger("uvicorn.error").propagate = True
    logging.getLogger("uvicorn.access").propagate = False


def _time(record: logging.LogRecord) -> str:
    when = datetime.fromtimestamp(record.created, UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    """The message; a format string that does not fit its arguments is shown beside them."""
    try:
        return record.getMessage()
    except Exception:  # logging would print it to stderr, unescaped
        return f"{shown(record.msg, _MAX_TEXT)} {shown(record.args, _MAX_TEXT)}"


def _extras(record: logging.LogRecord) -> dict[str, object]:
    """What the caller gave as ``extra``."""
    hidden = RESERVED | _NOISE
    return {str(key): value for key, value in record.__dict__.items() if key not in hidden}


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """Traceback and stack of the record, or ""."""
    parts = []
    if record.exc_info and record.exc_info[0] is not None:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return _MAYBE_ADDRESS.sub(_hidden, "\n".join(parts))


def _without_addresses(line: str, record: logging.LogRecord) -> str:
    """The same without addresses of clients; our own messages may name that of the server."""
    line = _ENDS.sub(_HIDDEN, line)
    if record.name.partition(".")[0] in _FOREIGN:
        line = _MAYBE_ADDRESS.sub(_hidden, line)
    return line


def _hidden(match: re.Match[str]) -> str:
    """The replacement of a word of digits, dots and colons, if it is an address."""
    word = match[1] or match[0]
    for text in (word, word.rstrip(".:"), word.rpartition(":")[0]):
        try:
            ip_address(text)
        except ValueError:
            continue
        return _HIDDEN
    return match[0]


def _cut(text: str, limit: int) -> str:
    """At most about ``limit`` characters: the beginning and the end of the text."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}… ({len(text) - 2 * half} characters left out) …{text[-half:]}"


def _plain(value: object, depth: int = 0) -> Any:
    """A value as plain JSON types of bounded size."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and value.bit_length() <= 64:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, str):
        return _cut(value, _MAX_TEXT)
    if depth < _MAX_DEPTH and isinstance(value, dict):
        pairs = list(value.items())[:_MAX_ITEMS]
        return {shown(key): _plain(item, depth + 1) for key, item in pairs}
    if depth < _MAX_DEPTH and isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value[:_MAX_ITEMS]]
    return shown(value, 1000)


def _whole(value: Any) -> Any:
    """The same value without lone surrogates in its strings."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_whole(key): _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return value


def _word(value: object) -> str:
    """A value of a text line: as it is, or in quotes if it would not read as one word."""
    plain = _plain(value)
    text = plain if isinstance(plain, str) else json.dumps(plain)
    text = escaped(text)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
