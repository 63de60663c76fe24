"""Nobody gets past without a key, and nobody gets more than their share."""

import asyncio
import http.client
import itertools
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import Message, Receive, Scope, Send

from dllmserve.errors import CapacityError, ConfigError, QuotaError
from dllmserve.server.http.auth import ApiKeys, AuthGuard
from dllmserve.server.http.body import BodyGuard
from dllmserve.server.http.rate import RateLimit
from tests.server.http.live import (
    Answer,
    Echo,
    Waiter,
    ask,
    connected,
    get,
    post,
    reply,
    serving,
    until,
)
from tests.steady import run

ALICE, BOB = "alice-" + "0" * 20, "bob-" + "1" * 20
KEYS = ApiKeys.from_list([f"alice={ALICE}", f"bob={BOB}"])
OPEN = frozenset({"/health", "/"})


async def refused(port: int, data: bytes) -> Answer:
    answer = await ask(port, data)
    assert answer.status == 401, data
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.error["type"] == "authentication_error"
    return answer


#: what reaches another path than an open one, though some part of it looks like one
NOT_OPEN = [
    get("/v1/x"),
    get("//v1/x"),
    get("/V1/x"),
    get("/v1%2fx"),
    get("/v1/x/"),
    get("/nothing"),
    get("/Health"),
    get("//health"),
    get("///health"),
    get("//h/health"),
    get("/health/"),
    get("/health/."),
    get("/health."),
    get("/health%00"),
    get("/health%20"),
    get("/health%0a"),
    get("/health%09"),
    get("/health%ef%bc%8f"),
    get("/health;/v1/x"),
    get("/health;x=1"),
    get("/health%3b"),
    get("/health%3f"),
    get("/health%3Fx"),
    get("/health%23"),
    get("/health/../v1/x"),
    get("/health/%2e%2e/v1/x"),
    get("/health%2f..%2fv1/x"),
    get("/./health"),
    get("/v1/../health"),
    get("/v1/%2e%2e/health"),
    get("/%2fhealth"),
    get("/%252fhealth"),
    get("/%2568ealth"),
    get("/\\health"),
    get("/v1/x?/health"),
    get("/v1/x?path=/health"),
    get("/v1/x#/health"),
    get("/v1/x%23/health"),
    get("*"),
    get("http://h/v1/x"),
    get("http://health/v1/x"),
    get("http://h/v1/x?http://h/health"),
    get("/v1/x", "X-Forwarded-Prefix: /health", "X-Original-URL: /health"),
    get("/v1/x", "X-Rewrite-URL: /health", "X-Forwarded-Path: /health"),
    get("/v1/x", "X-HTTP-Method-Override: GET", "Referer: http://h/health"),
    get("/v1/x").replace(b"Host: h", b"Host: health"),
    get("/v1/x").replace(b"HTTP/1.1", b"HTTP/1.0"),
    *(get("/v1/x").replace(b"GET", m, 1) for m in (b"OPTIONS", b"DELETE", b"TRACE", b"QUERY")),
    post(b"{}", path="/v1/x"),
    post(b"{}", "Upgrade: h2c", "Connection: Upgrade", path="/v1/x"),
    get("/v1/x", "Upgrade: websocket", "Connection: Upgrade"),
]


def test_no_spelling_of_a_path_makes_it_open() -> None:
    async def main() -> None:
        echo = Echo()
        async with serving(AuthGuard(echo, keys=KEYS, open_paths=OPEN)) as live:
            for data in NOT_OPEN:
                await refused(live.port, data)
            assert not echo.seen
            head = get("/v1/x").replace(b"GET", b"HEAD", 1)
            async with connected(live.port) as client:
                await client.send(head)
                assert (await client.answer(head=True)).status == 401

    run(main())


def test_open_paths_need_no_key() -> None:
    async def main() -> None:
        echo = Echo()
        async with serving(AuthGuard(echo, keys=KEYS, open_paths=OPEN)) as live:
            same = [
                get("/health"),
                get("/health?x=/v1/x"),
                get("/%68ealth"),  # the same path in other letters, for the app too
                get("http://elsewhere/health"),
                get("/health", "Authorization: Bearer wrong"),
                post(b"", path="/health"),
            ]
            for data in same:
                assert (await ask(live.port, data)).status == 200, data
            assert {scope["path"] for scope in echo.seen} == {"/health"}
            assert {scope["state"]["owner"] for scope in echo.seen} == {""}

    run(main())


def test_guard_and_router_agree_on_the_path() -> None:
    """Behind a real router no target without a key gets what only a key may get."""

    async def secret(request: Request) -> PlainTextResponse:
        return PlainTextResponse("secret")

    async def health(request: Request) -> PlainTextResponse:
        return PlainTextResponse("healthy")

    inner = Mount("/mounted", routes=[Route("/x", secret), Route("/health", secret)])
    routes = [Route("/health", health), Route("/v1/{rest:path}", secret), inner]
    parts = ["/health", "/v1/x", "//", "/..", "%2f", "%2e%2e", ";", "?", "#", "/mounted", "\\"]
    hosts = ["h", "health", "health:80", ""]

    async def main() -> None:
        app = AuthGuard(Starlette(routes=routes), keys=KEYS, open_paths=OPEN)
        answers: set[tuple[int, bytes]] = set()
        async with serving(app) as live, connected(live.port) as client:
            targets = ["/" + "".join(p).lstrip("/") for p in itertools.permutations(parts, 2)]
            targets += [f"http://h{target}" for target in targets]
            for number, target in enumerate(targets):
                host = f"Host: {hosts[number % len(hosts)]}".encode()
                answer = await client.ask(get(target).replace(b"Host: h", host))
                assert answer.body != b"secret", target
                answers.add((answer.status, answer.body if answer.status == 200 else b""))
            key = f"X-Api-Key: {ALICE}"
            assert (await client.ask(get("/mounted/health", key))).body == b"secret"
        # "/" is open, and there is nothing
        assert answers == {(200, b"healthy"), (401, b""), (404, b"")}

    run(main())


def test_both_headers_carry_a_key() -> None:
    async def main() -> None:
        echo = Echo()
        async with serving(AuthGuard(echo, keys=KEYS, open_paths=OPEN)) as live:
            good = [
                [f"Authorization: Bearer {ALICE}"],
                [f"authorization: bearer {ALICE}"],
                [f"AUTHORIZATION: BEARER   {ALICE}  "],
                [f"X-Api-Key: {ALICE}"],
                [f"x-api-key:{ALICE}"],
                [f"Authorization: Bearer {ALICE}", f"X-Api-Key: {ALICE}"],
                ["Authorization: Basic dTpw", f"X-Api-Key: {ALICE}"],
                [f"Authorization: Bearer {ALICE}", "X-Api-Key:"],
                ["Authorization: Bearer", f"X-Api-Key: {ALICE}"],
            ]
            for headers in good:
                assert (await ask(live.port, get("/v1/x", *headers))).status == 200, headers
            states = [scope["state"] for scope in echo.seen]
            assert {state["key_name"] for state in states} == {"alice"}
            alice = KEYS.match(ALICE)
            assert alice is not None
            assert {state["owner"] for state in states} == {alice.owner}
            await ask(live.port, get("/v1/x", f"X-Api-Key: {BOB}"))
            assert echo.seen[-1]["state"]["key_name"] == "bob"
            assert echo.seen[-1]["state"]["owner"] != alice.owner

    run(main())


BAD = {
    "missing_api_key": [
        [],
        ["Authorization:"],
        ["Authorization: Bearer"],
        [f"Authorization: {ALICE}"],
        [f"Authorization: Basic {ALICE}"],
        [f"Authorization: Token {ALICE}"],
        [f"Authorization: Bearer\t{ALICE}"],
        [f"Api-Key: {ALICE}"],
        [f"Cookie: X-Api-Key={ALICE}"],
    ],
    "invalid_api_key": [
        ["Authorization: Bearer x"],
        [f"Authorization: Bearer {ALICE}x"],
        [f"Authorization: Bearer {ALICE[:-1]}"],
        [f"Authorization: Bearer {ALICE.upper()}"],
        [f"Authorization: Bearer {ALICE},{ALICE}"],
        [f"Authorization: Bearer alice={ALICE}"],
        [f"X-Api-Key: {KEYS.match(ALICE).owner}"],  # type: ignore[union-attr]
        [f"X-Api-Key: sha256:{KEYS.match(ALICE).owner}"],  # type: ignore[union-attr]
        ["X-Api-Key: \xff\xfe"],
        ["X-Api-Key: " + "x" * 60000],
    ],
    "ambiguous_api_key": [
        [f"Authorization: Bearer {ALICE}", "X-Api-Key: x"],
        ["Authorization: Bearer x", f"X-Api-Key: {ALICE}"],
        [f"Authorization: Bearer {ALICE}", f"X-Api-Key: {BOB}"],
        [f"Authorization: Bearer {ALICE}", "Authorization: Bearer x"],
        [f"X-Api-Key: {ALICE}", f"X-Api-Key: {BOB}"],
    ],
}


@pytest.mark.parametrize("code", BAD)
def test_no_or_bad_keys(code: str) -> None:
    async def main() -> None:
        echo = Echo()
        async with serving(AuthGuard(echo, keys=KEYS, open_paths=OPEN)) as live:
            for headers in BAD[code]:
                answer = await refused(live.port, get("/v1/x", *headers))
                assert answer.error["code"] == code, headers
                assert ALICE.encode() not in answer.body
            # a query is no place for a secret
            await refused(live.port, get(f"/v1/x?api_key={ALICE}"))
            assert not echo.seen

    run(main())


def test_without_keys_everybody_is_nobody() -> None:
    async def main() -> None:
        echo = Echo()
        async with serving(AuthGuard(echo, keys=None, open_paths=OPEN)) as live:
            assert (await ask(live.port, get("/v1/x", "X-Api-Key: any"))).status == 200
        state = echo.seen[0]["state"]
        assert (state["owner"], state["key_name"]) == ("", "")

    run(main())


@pytest.mark.parametrize("close", [True, False])
def test_client_still_sending_its_body_gets_the_401(close: bool) -> None:
    def send_all(port: int) -> list[int]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        headers = {"Connection": "close"} if close else {}
        connection.request("POST", "/v1/x", b"x" * 4_000_000, headers)
        with connection.getresponse() as answer:
            answer.read()
            statuses = [answer.status]
        if not close:  # all of the body is read: the connection goes on
            connection.auto_open = 0
            connection.request("GET", "/health")
            with connection.getresponse() as answer:
                statuses.append(answer.status)
        connection.close()
        return statuses

    async def main() -> None:
        app = AuthGuard(BodyGuard(Echo()), keys=KEYS, open_paths=OPEN)
        async with serving(app) as live:
            expected = [401] if close else [401, 200]
            assert await asyncio.to_thread(send_all, live.port) == expected

    run(main())


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Direct:
    """Calls a guard without a server."""

    def __init__(self, **options: Any) -> None:
        self.clock = Clock()
        rate = RateLimit(options.pop("requests_per_minute", None), clock=self.clock)
        self.guard = AuthGuard(self.app, open_paths=OPEN, rate=rate, **options)
        self.calls = 0

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        await reply(send)

    def __call__(self, method: str, path: str, key: str = "") -> tuple[int, int]:
        """Status and Retry-After (or 0) of one request."""
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request"}

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"x-api-key", key.encode())] if key else []
        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        run(self.guard(scope, receive, send))
        start = dict(sent[0]["headers"])
        return sent[0]["status"], int(start.get(b"retry-after", b"0"))


def test_rate_limit() -> None:
    ask = Direct(keys=KEYS, requests_per_minute=6)
    assert [ask("POST", "/v1/x", ALICE)[0] for _ in range(7)] == [200] * 6 + [429]
    assert ask("POST", "/v1/x", ALICE) == (429, 10)
    assert ask("POST", "/v1/x", BOB) == (200, 0), "another key has its own"
    ask.clock.now += 9.5
    assert ask("GET", "/v1/other", ALICE) == (429, 1)
    ask.clock.now += 0.5
    assert ask("POST", "/v1/x", ALICE) == (200, 0)
    assert ask("POST", "/v1/x", ALICE) == (429, 10)
    ask.clock.now += 3600  # no more than a minute's worth comes back
    assert [ask("POST", "/v1/x", ALICE)[0] for _ in range(7)] == [200] * 6 + [429]
    assert ask.calls == 14


def test_what_the_rate_limit_leaves_out() -> None:
    ask = Direct(keys=KEYS, requests_per_minute=1, unmetered_gets=("/v1/result",))
    assert ask("POST", "/v1/result/1", ALICE) == (200, 0)
    for method, path in (("GET", "/v1/result/1"), ("HEAD", "/v1/result/1"), ("GET", "/v1/result")):
        assert ask(method, path, ALICE) == (200, 0)
    assert ask("GET", "/health") == (200, 0)
    for method, path in (("DELETE", "/v1/result/1"), ("GET", "/v1/results"), ("GET", "/v1/x")):
        assert ask(method, path, ALICE) == (429, 60)
    # a wrong key is nobody's request
    assert ask("POST", "/v1/x", "x" * 16)[0] == 401


def test_rate_limit_without_keys_is_shared() -> None:
    ask = Direct(keys=None, requests_per_minute=2)
    assert [ask("GET", "/v1/x", key)[0] for key in ("", ALICE, BOB)] == [200, 200, 429]


def test_calls_of_one_key_in_progress() -> None:
    async def main() -> None:
        waiter = Waiter()
        guard = AuthGuard(waiter, keys=KEYS, open_paths=OPEN, max_calls_per_key=2)
        mine = get("/v1/x", f"X-Api-Key: {ALICE}")
        async with serving(guard) as live, connected(live.port) as one:
            async with connected(live.port) as two:
                await one.send(mine)
                await two.send(mine)
                await until(lambda: waiter.started == 2, "not started")
                answer = await ask(live.port, mine)
                assert (answer.status, answer.headers["retry-after"]) == (429, "1")
                assert answer.error["type"] == "rate_limit_error"
                assert answer.error["code"] == "too_many_calls"
                bob = asyncio.ensure_future(ask(live.port, get("/v1/x", f"X-Api-Key: {BOB}")))
                await until(lambda: waiter.started == 3, "another key has its own")
            await until(lambda: waiter.left == 1, "not noticed")
            again = asyncio.ensure_future(ask(live.port, mine))
            await until(lambda: waiter.started == 4, "the place of the one that left is free")
            waiter.go.set()
            assert {(await one.answer()).body, (await bob).body, (await again).body} == {b"told"}
            assert (await ask(live.port, mine)).status == 200

    run(main())


def test_place_is_given_back_after_an_exception() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    ask = Direct(keys=KEYS, max_calls_per_key=1)
    ask.guard.app = broken
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            ask("GET", "/v1/x", ALICE)


def test_other_scopes() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def main() -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        nothing: Any = None
        guard = AuthGuard(app, keys=KEYS, open_paths=OPEN)
        await guard({"type": "lifespan"}, nothing, send)
        await guard({"type": "websocket", "path": "/health"}, nothing, send)
        return sent

    assert run(main()) == [{"type": "websocket.close", "code": 1008}]
    assert seen == ["lifespan"]


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="max_calls_per_key must be an integer >= 1"):
        AuthGuard(Echo(), keys=KEYS, open_paths=OPEN, max_calls_per_key=True)
    with pytest.raises(ConfigError, match="requests_per_minute must be an integer >= 1"):
        RateLimit(0)


def test_a_request_for_many_answers_counts_for_as_many() -> None:
    clock = Clock()
    rate = RateLimit(6, clock=clock)
    assert rate.take("ann") == 0  # as the guard does, before it is known what is asked for
    with pytest.raises(CapacityError, match="7 requests at once are over requests_per_minute=6"):
        rate.check("ann", 7)
    rate.check("ann", 6)
    assert rate.take("ann", 5) == 0
    rate.check("bob", 6)
    assert rate.take("ann") == 10
    clock.now += 30
    assert rate.take("ann") == 0
    with pytest.raises(QuotaError, match="more than is left of requests_per_minute=6") as caught:
        rate.check("ann", 4)
    assert (caught.value.code, caught.value.http_status) == ("rate_limit_exceeded", 429)
    # whoever comes back when it said is not sent away again
    clock.now += caught.value.retry_after
    assert rate.take("ann") == 0
    rate.check("ann", 4)
    rate.check("ann", 1)
    assert RateLimit(None).take("ann", 10**9) == 0
    RateLimit(None).check("ann", 10**9)
