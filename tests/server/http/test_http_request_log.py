"""Request ids, the line at the end of a request, and handlers that fail."""

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dllmserve.server.http.auth import ApiKeys, AuthGuard
from dllmserve.server.http.body import BodyGuard
from dllmserve.server.http.rate import RateLimit
from dllmserve.server.http.request_id import RequestLog, route_template
from tests.server.http.live import (
    Answer,
    Echo,
    Waiter,
    ask,
    connected,
    get,
    post,
    read_body,
    reply,
    serving,
    until,
)
from tests.steady import run

NEW_ID = re.compile(r"[0-9a-f]{32}")
Records = Callable[[], list[Any]]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Records:
    """The lines of the access log so far."""
    caplog.set_level(logging.INFO, "dllmserve.access")
    return lambda: [r for r in caplog.records if r.name == "dllmserve.access"]


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> Records:
    """Everything at ERROR so far, uvicorn's included."""
    return lambda: [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_good_ids_are_kept_and_others_replaced(lines: Records) -> None:
    good = ["a", "A.b_c-9", "0" * 64, "-", "6fd1c1a0-5b3e-4e55-9f0c-1d2e3f405162"]
    bad = ["", "0" * 65, "a b", "a/b", "a\tb", "é", "a,b", "<x>", "\x1b[2J".strip("\x1b"), "${a}"]
    bad.append("x" * 65000)

    async def main() -> None:
        echo = Echo()
        async with serving(RequestLog(echo), max_header_bytes=70000) as live:
            async with connected(live.port) as client:
                for given in good:
                    answer = await client.ask(get("/", f"X-Request-Id: {given}"))
                    assert answer.headers["x-request-id"] == given
                made = set()
                for given in bad:
                    answer = await client.ask(get("/", f"X-Request-Id: {given}"))
                    made.add(answer.headers["x-request-id"])
                made.add((await client.ask(get())).headers["x-request-id"])
                twice = get("/", "X-Request-Id: a", "X-Request-Id: b")
                made.add((await client.ask(twice)).headers["x-request-id"])
                assert len(made) == len(bad) + 2
                assert all(NEW_ID.fullmatch(name) for name in made)
            logged = [record.request_id for record in lines()]
            assert logged == [scope["state"]["request_id"] for scope in echo.seen]
            assert logged[: len(good)] == good

    run(main())


def test_id_of_the_handler_does_not_come_twice() -> None:
    async def own(scope: Scope, receive: Receive, send: Send) -> None:
        await reply(send, b"", 200, (b"x-request-id", b"mine"), (b"a", b"b"))

    async def main() -> None:
        async with serving(RequestLog(own)) as live, connected(live.port) as client:
            await client.send(get("/", "X-Request-Id: yours"))
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert head.lower().count(b"x-request-id") == 1
            assert b"x-request-id: yours\r\n" in head
            assert b"a: b\r\n" in head

    run(main())


KEY = "0123456789abcdef"


def stack(app: ASGIApp, **options: Any) -> RequestLog:
    """All guards, in the order they are meant to have."""
    keys = ApiKeys.from_list([f"alice={KEY}"])
    body = BodyGuard(app, max_bytes=1000, timeout_s=0.3)
    guard = AuthGuard(body, keys=keys, open_paths=frozenset({"/health"}), rate=RateLimit(9))
    return RequestLog(guard, **options)


def test_answers_of_inner_guards_have_ids_and_lines(lines: Records) -> None:
    mine = f"X-Api-Key: {KEY}"
    cases = [
        (get("/v1/x", "X-Request-Id: r"), 401, ""),
        (post(b"x" * 1001, mine, "X-Request-Id: r"), 413, "alice"),
        (post(b"xx", mine, "X-Request-Id: r")[:-1], 408, "alice"),
        (post(b"x", mine, "X-Request-Id: r", "Content-Type: a/b"), 415, "alice"),
        *[(get("/v1/x", mine, "X-Request-Id: r"), 200, "alice")] * 6,
        (get("/v1/x", mine, "X-Request-Id: r"), 429, ""),
        (get("/health", "X-Request-Id: r"), 200, ""),
    ]

    async def main() -> None:
        async with serving(stack(Echo())) as live:
            for data, status, _ in cases:
                answer = await ask(live.port, data)
                assert (answer.status, answer.headers["x-request-id"]) == (status, "r")
            # below ASGI there are no ids
            answer = await ask(live.port, get("/", "X-Request-Id: r").replace(b"GET", b"BAD", 1))
            assert answer.status == 400
            assert "x-request-id" not in answer.headers

    run(main())
    seen = [(r.status, r.key_name) for r in lines() if hasattr(r, "request_id")]
    assert seen == [(status, name) for _, status, name in cases]
    [refused] = [r for r in lines() if not hasattr(r, "request_id")]
    assert (refused.status, refused.code) == (400, "malformed_request")
    assert "127.0.0.1" not in str(vars(refused))


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def test_probes_that_go_well_are_quiet(lines: Records, caplog: pytest.LogCaptureFixture) -> None:
    status = [200, 503, 200]

    async def probe(request: Request) -> PlainTextResponse:
        return PlainTextResponse("hi", status.pop())

    async def main() -> None:
        routes = [Route("/live", probe), Route("/other", probe)]
        app = RequestLog(Starlette(routes=routes), quiet=frozenset({"/live"}))
        async with serving(app) as live:
            for data in (get("/live"), get("/live"), get("/other")):
                await ask(live.port, data)

    caplog.set_level("DEBUG", logger="dllmserve.access")
    run(main())
    found = [(r.levelname, r.route, r.status) for r in lines()]
    assert found == [("DEBUG", "/live", 200), ("INFO", "/live", 503), ("INFO", "/other", 200)]


def test_fields_of_a_line(lines: Records) -> None:
    clock = Clock()
    counted: list[tuple[str, str, int, float]] = []

    async def item(request: Request) -> PlainTextResponse:
        clock.now += 0.25
        own = {"prompt_tokens": 7, "name": "x", "status": "x", "message": "x", "args": ()}
        request.scope["state"]["log"] = own
        return PlainTextResponse("hi", 203)

    async def main() -> None:
        routes = [Route("/item/{number:int}", item, methods=["GET", "POST"])]
        app = RequestLog(Starlette(routes=routes), clock=clock, metrics_hook=hook)
        async with serving(app) as live:
            for data in (get("/item/5?a=b"), get("/item/x"), get("/nothing/5"), QUERY):
                await ask(live.port, data)

    def hook(method: str, route: str, status: int, seconds: float) -> None:
        counted.append((method, route, status, seconds))

    QUERY = get("/item/5").replace(b"GET", b"QUERY", 1)
    run(main())
    assert counted == [
        ("GET", "/item/{number:int}", 203, 0.25),
        ("GET", "unmatched", 404, 0.0),
        ("GET", "unmatched", 404, 0.0),
        ("OTHER", "/item/{number:int}", 405, 0.0),
    ]
    first = lines()[0]
    assert first.levelname == "INFO"
    assert first.getMessage() == "request"
    assert (first.method, first.route, first.status) == ("GET", "/item/{number:int}", 203)
    assert (first.duration_ms, first.key_name, first.prompt_tokens) == (250.0, "", 7)
    # names that are taken get a prefix
    assert (first.log_name, first.log_status, first.log_message) == ("x", "x", "x")
    assert not hasattr(first, "disconnected")
    for record in lines():
        assert "/item/5" not in str(record.__dict__.get("route"))


def test_client_that_leaves_is_499(lines: Records, errors: Records) -> None:
    waiter = Waiter()

    async def main() -> None:
        async with serving(RequestLog(BodyGuard(waiter))) as live:
            for data in (post(b"{}"), post(b"{}")[:-1]):
                async with connected(live.port) as client:
                    await client.send(data)
                    await until(lambda: bool(live.state.tasks), "not started")
                    await asyncio.sleep(0.02)
                await until(lambda: not live.state.tasks, "still running")

    run(main())
    assert [record.status for record in lines()] == [499, 499]
    assert waiter.left == 1
    assert not errors()


def test_client_that_leaves_during_the_answer(lines: Records, errors: Records) -> None:
    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await read_body(receive)
        assert (await receive())["type"] == "http.disconnect"

    async def raising(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await receive()
        raise ClientDisconnect

    async def main(app: ASGIApp) -> None:
        async with serving(RequestLog(app)) as live:
            async with connected(live.port) as client:
                await client.send(get())
                await until(lambda: bool(live.state.tasks), "not started")
                await asyncio.sleep(0.02)
            await until(lambda: not live.state.tasks, "still running")

    run(main(stream))
    run(main(raising))
    first, second = lines()
    assert (first.status, first.disconnected) == (200, True)
    assert second.status == 499
    assert not errors()


def test_end_of_a_complete_answer_is_no_disconnect(lines: Records) -> None:
    """Servers say "http.disconnect" then, too."""

    async def listening(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await reply(send)
        assert (await receive())["type"] == "http.disconnect"

    async def main() -> None:
        async with serving(RequestLog(listening)) as live:
            assert (await ask(live.port, get())).status == 200
            await until(lambda: not live.state.tasks, "still running")

    run(main())
    assert not hasattr(lines()[0], "disconnected")


def broken_before(scope: Scope, receive: Receive, send: Send) -> Any:
    raise RuntimeError("secret: /srv/model")


async def broken_after_start(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"half", "more_body": True})
    raise RuntimeError("secret: /srv/model")


async def broken_at_end(scope: Scope, receive: Receive, send: Send) -> None:
    await reply(send, b"whole")
    raise RuntimeError("secret: /srv/model")


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()


async def unfinished(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"half", "more_body": True})


async def outcome(app: ASGIApp) -> tuple[Answer | None, bool]:
    """The answer, None if it was cut, and whether the connection can be used again."""
    async with serving(RequestLog(app)) as live, connected(live.port) as client:
        try:
            answer = await client.ask(get("/v1/generate", "X-Request-Id: r"))
        except asyncio.IncompleteReadError:
            return None, False
        try:
            await client.ask(get("/"))
        except asyncio.IncompleteReadError:
            return answer, False
        return answer, True


@pytest.mark.parametrize("app", [broken_before, silent])
def test_failure_before_the_answer_is_a_generic_500(
    app: ASGIApp, lines: Records, errors: Records
) -> None:
    answer, _ = run(outcome(app))
    assert answer is not None
    assert answer.status == 500
    assert answer.headers["x-request-id"] == "r"
    assert answer.error["type"] == "server_error"
    assert b"secret" not in answer.body
    assert b'"detail"' in answer.body
    assert lines()[0].status == 500
    [record] = errors()
    assert (record.name, record.request_id) == ("dllmserve.server", "r")
    assert bool(record.exc_info) == (app is broken_before)


@pytest.mark.parametrize("app", [broken_after_start, unfinished])
def test_failure_during_the_answer_cuts_it(app: ASGIApp, lines: Records, errors: Records) -> None:
    answer, usable = run(outcome(app))
    assert (answer, usable) == (None, False)
    assert lines()[0].status == 200
    [record] = errors()  # uvicorn has nothing to add
    assert record.name == "dllmserve.server"


def test_failure_after_the_answer_is_only_logged(lines: Records, errors: Records) -> None:
    answer, usable = run(outcome(broken_at_end))
    assert answer is not None
    assert (answer.body, usable) == (b"whole", True)
    assert [record.getMessage() for record in errors()] == ["request failed"] * 2
    assert [record.status for record in lines()] == [200, 200]


def test_cancelled_requests_are_answered_with_503(lines: Records) -> None:
    """uvicorn cancels what still runs when its time to shut down is over."""

    async def main() -> None:
        waiter = Waiter()
        async with serving(RequestLog(waiter)) as live, connected(live.port) as client:
            await client.send(get())
            await until(lambda: waiter.started == 1, "not started")
            for task in list(live.state.tasks):
                task.cancel()
            answer = await client.answer()
            assert (answer.status, answer.error["type"]) == (503, "overloaded_error")
            await client.closed()

    run(main())
    assert [record.status for record in lines()] == [503]


def test_other_scopes_pass() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    nothing: Any = None
    run(RequestLog(app)({"type": "lifespan"}, nothing, nothing))
    assert seen == [{"type": "lifespan"}]


@pytest.mark.parametrize("route", [None, object(), type("R", (), {"path": 7})()])
def test_route_without_a_template(route: Any) -> None:
    assert route_template({"route": route}) == "unmatched"


def test_server_without_the_extension_sees_the_exception_logged(errors: Records) -> None:
    """Other servers cannot be told to abort; they see that the response is incomplete."""
    sent: list[Message] = []

    async def main() -> None:
        async def send(message: Message) -> None:
            sent.append(message)

        nothing: Any = None
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        await RequestLog(broken_after_start)(scope, nothing, send)

    run(main())
    assert [message.get("more_body") for message in sent] == [None, True]
    assert [record.getMessage() for record in errors()] == ["request failed"]
