"""Logs: whatever is put into them, one event is one line."""

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest

from dllmserve.errors import ConfigError
from dllmserve.server.http.escape import escaped, shown
from dllmserve.server.http.logs import JsonFormatter, TextFormatter, configure_logging
from dllmserve.server.http.request_id import RequestLog
from dllmserve.server.http.respond import error_body
from tests.server.http.live import Echo, connected, get, serving
from tests.steady import run

NAMES = ("dllmserve", "uvicorn", "uvicorn.error", "uvicorn.access", "asyncio")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Logging as it was before."""
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [(x, list(x.handlers), x.level, x.propagate) for x in loggers]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


#: every character that ends a line, steers a terminal, or confuses some parser
EVIL = [
    "a\nb",
    "a\r\nb",
    "\r",
    '\n{"level":"INFO","message":"forged"}',
    '"}\n{"level":"INFO","message":"forged"}',
    '","level":"ERROR","x":"',
    "\x1b[2J\x1b[31mred",
    "\x1b]0;title\x07",
    "\x9b31m",
    "\x85next",
    "\u2028\u2029",
    "\x00\x01\x08\x0b\x0c\x1c\x1d\x1e\x1f",
    "\x7f\x80\x9f",
    "\u202eright to left\u2066",
    "\ufeff",
    "lone \ud800 and \udfff",
    "\ud83d",
    "😀 é 漢",
    "back\\slash \\n \\u0000",
    "%s %d %(x)s {0}",
    "=",
    "",
    "x" * 100_000,
]

#: what may stand in a line of either format
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


class Nasty:
    """An object that cannot be shown."""

    def __str__(self) -> str:
        raise RuntimeError("\nno")

    __repr__ = __str__


class NastyError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("\nno")


def lines_of(format: Any, **record: Any) -> list[str]:
    """Log one event in every place where text can be; the lines that came out."""
    stream = io.StringIO()
    configure_logging(format, "debug", stream=stream)
    logging.getLogger("dllmserve.test").error(**record)
    text = stream.getvalue()
    assert text.endswith("\n")
    # every kind of line end that Python knows counts as one
    return text[:-1].splitlines()


@pytest.mark.parametrize("evil", EVIL)
def test_json_lines_cannot_be_forged(evil: str) -> None:
    places: list[dict[str, Any]] = [
        {"msg": evil},
        {"msg": "%s", "args": (evil,)},
        {"msg": "m", "extra": {"field": evil}},
        {"msg": "m", "extra": {f"k{evil}": 1}},
        {"msg": "m", "extra": {"field": {evil: [evil, (evil, {"a": evil})]}}},
        {"msg": "m", "exc_info": ValueError(evil)},
        {"msg": "m", "extra": {"field": ValueError(evil)}},
        {"msg": f"%d {evil}", "args": ("not a number", evil)},
    ]
    for place in places:
        args = place.pop("args", ())
        [line] = raw(place, args) if args else lines_of("json", **place)
        assert line.isascii() and line.isprintable()
        assert len(line) < 600_000
        event = json.loads(line)
        assert event["level"] == "ERROR"
        assert event["logger"] == "dllmserve.test"
        assert "x" not in event
        assert not re.search("[\ud800-\udfff]", json.dumps(event, ensure_ascii=False))


def raw(place: dict[str, Any], args: tuple[Any, ...]) -> list[str]:
    stream = io.StringIO()
    configure_logging("json", stream=stream)
    logging.getLogger("dllmserve.test").error(place["msg"], *args)
    return stream.getvalue()[:-1].splitlines()


@pytest.mark.parametrize("evil", EVIL)
def test_text_lines_cannot_be_forged(evil: str) -> None:
    for place in (
        {"msg": evil.replace("%", "%%")},
        {"msg": "m", "extra": {"field": evil}},
        {"msg": "m", "extra": {f"k{evil}": {evil: evil}}},
    ):
        [line] = lines_of("text", **place)
        assert not CONTROL.search(line)
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ERROR   dllmserve\.test: ", line)
    first, *rest = lines_of("text", msg="m", exc_info=ValueError(evil))
    assert first.endswith(" m")
    assert rest and all(line.startswith("  | ") for line in rest)
    assert not any(CONTROL.search(line) for line in rest)


def test_values_survive_json() -> None:
    fields = {"n": 3, "f": 0.5, "t": True, "z": None, "s": "a\nb é", "l": [1, "x"], "d": {"a": 1}}
    [line] = lines_of("json", msg="hello", extra=fields)
    event = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event.pop("time"))
    head = {"level": "ERROR", "logger": "dllmserve.test", "message": "hello"}
    assert event == head | fields


def test_odd_values_are_still_json() -> None:
    deep: Any = []
    deep.append(deep)
    odd = {
        "nan": float("nan"),
        "inf": float("-inf"),
        "huge": 10**5000,
        "nasty": Nasty(),
        "bytes": b"a\n\xff",
        "deep": deep,
        "long": list(range(1000)),
        "set": {1},
        "exc": "mine",
        "level": "mine",
        "time": "mine",
        7: "number",
    }
    [line] = lines_of("json", msg="m", extra=odd)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    event = json.loads(line, parse_constant=refuse)
    assert (event["nan"], event["inf"], event["huge"]) == ("nan", "-inf", "<int>")
    assert (event["nasty"], event["bytes"]) == ("<Nasty>", "a\\nÿ")
    assert len(event["long"]) == 64
    assert (event["extra_exc"], event["extra_level"], event["extra_time"]) == ("mine",) * 3
    assert (event["level"], event["7"]) == ("ERROR", "number")


def test_exceptions_are_one_string() -> None:
    try:
        try:
            raise KeyError("inner\nvalue")
        except KeyError as error:
            raise ValueError("outer") from error
    except ValueError as caught:
        failure = caught
    [line] = lines_of("json", msg="m", exc_info=failure, stack_info=True)
    trace = json.loads(line)["exc"]
    assert "KeyError" in trace and "ValueError: outer" in trace and "Stack (most recent" in trace
    [line] = lines_of("json", msg="m", exc_info=NastyError())
    assert "NastyError" in json.loads(line)["exc"]
    [line] = lines_of("json", msg="m", exc_info=ValueError("x" * 1_000_000))
    assert "left out" in line and len(line) < 100_000


def test_long_values_keep_both_ends() -> None:
    [line] = lines_of("json", msg="start" + "x" * 100_000 + "end")
    message = json.loads(line)["message"]
    assert len(message) < 20_000
    assert message.startswith("start") and message.endswith("end")


def test_message_that_does_not_fit_its_arguments(capfd: pytest.CaptureFixture[str]) -> None:
    """logging would print a traceback to stderr, with the arguments as they are."""
    for message, args in (
        ("%d", ("a\nb",)),
        ("%s %s", (1,)),
        ("%(x)s", (1, 2)),
        ("%s", (Nasty(),)),
    ):
        [line] = raw({"msg": message}, args)
        assert json.loads(line)["message"].startswith(message)
    assert capfd.readouterr().err == ""


def test_text_fields() -> None:
    fields = {"status": 200, "route": "/v1/{id}", "s": 'a b="c"', "none": None, "e": ""}
    [line] = lines_of("text", msg="request", extra=fields)
    tail = r'request status=200 route=/v1/{id} s="a b=\"c\"" none=null e=""'
    assert line.endswith(f" ERROR   dllmserve.test: {tail}")


def test_calling_again_replaces_the_handlers(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("uvicorn").addHandler(logging.StreamHandler(io.StringIO()))
    logging.getLogger("uvicorn.error").setLevel("CRITICAL")  # as uvicorn.Config(log_level=) does
    kept = logging.NullHandler()
    logging.getLogger("dllmserve").addHandler(kept)
    for _ in range(3):
        configure_logging("text")
    stream = io.StringIO()
    configure_logging("json", "Warning", stream=stream)
    logging.getLogger("dllmserve.x").info("quiet")
    for name in ("dllmserve.x", "uvicorn.error", "asyncio"):
        logging.getLogger(name).warning("loud", extra={"color_message": "\x1b[1mloud"})
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(e["logger"], e["message"]) for e in events] == [
        ("dllmserve.x", "loud"),
        ("uvicorn.error", "loud"),
        ("asyncio", "loud"),
    ]
    assert all("color_message" not in event for event in events)
    assert kept in logging.getLogger("dllmserve").handlers
    assert not logging.getLogger("uvicorn.access").hasHandlers()
    configure_logging("text")
    logging.getLogger("dllmserve").warning("to stderr")
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("WARNING dllmserve: to stderr\n")


@pytest.mark.parametrize(("format", "level"), [("xml", "INFO"), ("json", "LOUD"), ("json", "")])
def test_options_are_checked(format: Any, level: str) -> None:
    with pytest.raises(ConfigError, match="must be one of"):
        configure_logging(format, level)


def test_requests_with_evil_headers_are_one_line_each() -> None:
    stream = io.StringIO()
    configure_logging("json", stream=stream)
    values = [e for e in EVIL if not re.search("[\x00-\x08\x0a-\x1f\x7f]", e) and len(e) < 9000]

    async def main() -> int:
        count = 0
        async with serving(RequestLog(Echo())) as live, connected(live.port) as client:
            for value in values:
                text = value.encode("utf-8", "replace").decode("latin-1")
                path = "/%0a%0d%1b%00%e2%80%a8%ff"
                await client.ask(get(path, f"X-Request-Id: {text}", f"User-Agent: {text}"))
                count += 1
        return count

    count = run(main())
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["message"] for event in events] == ["request"] * count
    assert all(re.fullmatch("[0-9a-f]{32}|=", event["request_id"]) for event in events)


def test_asgi_state_of_an_evil_handler_is_one_line() -> None:
    stream = io.StringIO()
    configure_logging("json", stream=stream)

    async def note(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["log"] = {text[:50]: text for text in EVIL}

    async def main() -> None:
        app = RequestLog(Echo(before=note))
        async with serving(app) as live, connected(live.port) as client:
            assert (await client.ask(get())).status == 200

    run(main())
    [line] = stream.getvalue().splitlines()
    assert json.loads(line)["status"] == 200


def test_shown_and_escaped() -> None:
    assert shown("abc") == "abc"
    assert shown("x" * 300) == "x" * 200 + "… (300 characters)"
    assert shown(b"\xff\n") == "ÿ\\n"
    assert shown(Nasty()) == "<Nasty>"
    assert shown(10**5000) == "<int>"
    assert escaped("a\x1b\u2028\U000e0001\ud800 \u3000é") == (
        "a\\x1b\\u2028\\U000e0001\\ud800 \u3000é"
    )
    assert all(not CONTROL.search(shown(text)) and len(shown(text)) < 2500 for text in EVIL)


@pytest.mark.parametrize("evil", EVIL)
def test_error_bodies_are_clean(evil: str) -> None:
    body = error_body(evil, type="not_found", param=None, path="/v1/generate")
    error = json.loads(body)
    assert error["detail"] == error["error"]["message"]
    assert not CONTROL.search(body.decode())
    assert len(body) < 10_000


def test_formatters_need_no_configuration() -> None:
    record = logging.makeLogRecord({"msg": "m", "created": 0.9996, "name": "n\n", "levelname": "X"})
    assert TextFormatter().format(record) == "1970-01-01T00:00:00.999Z X       n\\n: m"
    assert json.loads(JsonFormatter().format(record))["logger"] == "n\n"


#: texts in which Python or a library shows an address, and what may be left of each
SHOWN = [
    ("<socket.socket fd=7, laddr=('127.0.0.1', 80), raddr=('10.1.2.3', 5000)>", "fd=7"),
    ("<socket.socket fd=7, laddr=('::1', 80, 0, 0), raddr=('fe80::9%eth0', 5, 0, 2)>", "fd=7"),
    ("Connect call failed ('10.1.2.3', 5000)", "Connect call failed"),
    ("from ('2001:db8::7', 5000, 0, 0)", "from"),
]
#: the same in the lines of others, and in tracebacks
ELSEWHERE = [
    ("10.1.2.3:5000 - HTTP connection made", "HTTP connection made"),
    ("lost 10.1.2.3.", "lost"),
    ("::1 said no", "said no"),
    ("[2001:db8::7]:5000 - gone", "gone"),
    ("peername=('10.1.2.3', 5000)", "peername="),
    ("::ffff:10.1.2.3, twice: 10.1.2.3", "twice"),
]
ADDRESS = re.compile(r"10\.1\.2\.3|127\.0\.0\.1|::1|fe80|db8|:5000")


@pytest.mark.parametrize("format", ["json", "text"])
def test_no_address_of_a_client_is_logged(format: Any) -> None:
    stream = io.StringIO()
    configure_logging(format, "debug", stream=stream)
    for text, kept in SHOWN:
        for name in ("dllmserve.server", "dllmserve.access", "uvicorn.error", "asyncio"):
            logging.getLogger(name).error("%s", text, extra={"more": text, "deep": {"a": [text]}})
            assert kept in stream.getvalue()
    for text, kept in SHOWN + ELSEWHERE:
        logging.getLogger("asyncio").error("%s", text, extra={"more": text})
        logging.getLogger("uvicorn.error").warning(text)
        for name in ("asyncio", "dllmserve.server"):
            try:
                raise OSError(text)
            except OSError:
                logging.getLogger(name).exception("failed")
        assert kept in stream.getvalue()
    assert not ADDRESS.search(stream.getvalue())


def test_what_is_no_address_is_left_alone() -> None:
    """Ours say where the server listens; nobody can break a line by what looks like a socket."""
    stream = io.StringIO()
    configure_logging("json", stream=stream)
    logging.getLogger("dllmserve.server").info("listening on http://127.0.0.1:8000, [::1]:80")
    kept = "at 12:30:45, File x.py:10, z::b, [12], std::x, 1.2.3, 0.5: ab:cd, __init__.py"
    logging.getLogger("asyncio").warning(kept)
    evil = {"a": "laddr=(", "b": "raddr=('", "c": "('1', 2"}
    logging.getLogger("dllmserve.server").info("x", extra=evil)
    listening, foreign, last = (json.loads(line) for line in stream.getvalue().splitlines())
    assert listening["message"] == "listening on http://127.0.0.1:8000, [::1]:80"
    assert foreign["message"] == kept
    assert evil.items() <= last.items()
