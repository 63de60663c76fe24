"""CORS: what a browser asks before it calls, and what a page may read of each answer."""

from pathlib import Path
from typing import Any

import pytest

from dllmserve.errors import ConfigError
from dllmserve.server.config import ServerConfig
from dllmserve.server.serve import _refusal_headers
from tests.server.http.live import Echo, Waiter, ask, connected, get, post
from tests.server.http.live import serving as listening
from tests.server.stand_in import KEYS, Reply, Server, run, secret, serving, until

PAGE = "https://app.example"
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
#: what a page sends with OpenAI's package for browsers
STAINLESS = (
    "authorization,content-type,x-stainless-arch,x-stainless-helper-method,x-stainless-lang,"
    "x-stainless-os,x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,"
    "x-stainless-runtime-version,x-stainless-timeout"
)


def readable(answer: Reply, origin: str = PAGE) -> None:
    """A page of the origin may read the answer, with what its client looks for."""
    assert answer.headers["access-control-allow-origin"] == origin, answer
    exposed = answer.headers["access-control-expose-headers"].lower().split(", ")
    assert {"x-request-id", "retry-after", "x-should-retry"} <= set(exposed)
    assert "access-control-allow-credentials" not in answer.headers


async def preflight(server: Server, path: str = CHAT, **more: str) -> Reply:
    asked = {"origin": PAGE, "access-control-request-method": "POST"}
    asked |= {"access-control-request-" + k.replace("_", "-"): v for k, v in more.items()}
    return await server.ask("OPTIONS", path, **asked)


def names(answer: Reply, header: str) -> list[str]:
    return [name.strip() for name in answer.headers[header].split(",")]


def test_a_preflight_gets_the_headers_that_it_asks_for(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, cors_origins=PAGE, keys=KEYS) as server:
            for asked in (STAINLESS, "x-anything-else"):
                answer = await preflight(server, headers=asked)
                assert answer.status == 200
                assert answer.headers["access-control-allow-origin"] == PAGE
                assert names(answer, "access-control-allow-headers") == asked.split(",")
                assert {"GET", "POST", "DELETE"} <= set(
                    names(answer, "access-control-allow-methods")
                )
                assert int(answer.headers["access-control-max-age"]) >= 600
                assert "access-control-allow-private-network" not in answer.headers
            answer = await preflight(server, "/v1/result/7", headers="x-a", private_network="true")
            assert answer.headers["access-control-allow-private-network"] == "true"
            assert "access-control-allow-headers" not in (await preflight(server)).headers

    run(main())


@pytest.mark.parametrize(
    "origin", ["https://other.example", "http://app.example", f"{PAGE}:8443", f"{PAGE}.a", "null"]
)
def test_other_pages(origin: str, byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, cors_origins=PAGE) as server:
            asked = {"origin": origin, "access-control-request-method": "POST"}
            answer = await server.ask("OPTIONS", CHAT, **asked)
            assert answer.status == 400
            for reply in (answer, await server.post(CHAT, BODY, origin=origin)):
                assert "access-control-allow-origin" not in reply.headers
                assert "origin" in reply.headers["vary"].lower()

    run(main())


def test_without_the_option_there_is_no_cors(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for answer in (
                await preflight(server, headers=STAINLESS),
                await server.post(CHAT, BODY, origin=PAGE),
            ):
                assert not [h for h in answer.headers if h.startswith("access-control")]
                assert "vary" not in answer.headers

    run(main())


def test_answers_and_refusals_of_every_guard_can_be_read(byte_checkpoint: Path) -> None:
    """A page that may not read an error knows of a "network error" only."""
    ann = secret("ann")
    cases: list[tuple[int, str, str, Any, dict[str, str]]] = [
        (200, "POST", CHAT, BODY, ann),
        (200, "POST", CHAT, {**BODY, "stream": True}, ann),
        (200, "GET", "/health", None, {}),
        (200, "POST", "/v1/generate", {"prompt": "a", "gen_length": 1}, ann),
        (400, "POST", CHAT, b"{", ann),
        (400, "POST", CHAT, {**BODY, "temperature": -1}, ann),
        (401, "POST", CHAT, BODY, {}),
        (401, "POST", CHAT, BODY, {"x-api-key": "unknown"}),
        (404, "GET", "/v1/nothing", None, ann),
        (405, "DELETE", CHAT, None, ann),
        (413, "POST", CHAT, b'"%b"' % (b"x" * 3000), ann),
        (415, "POST", CHAT, b"x=1", {**ann, "content-type": "text/plain"}),
        (415, "POST", CHAT, b"{}", {**ann, "content-encoding": "br"}),
    ]

    async def main() -> None:
        options: dict[str, Any] = {"max_body_bytes": 2048, "max_requests": 1, "keys": KEYS}
        async with serving(byte_checkpoint, cors_origins=PAGE, **options) as server:
            for status, method, path, body, headers in cases:
                answer = await server.ask(method, path, body, origin=PAGE, **headers)
                assert answer.status == status, answer
                readable(answer)
                await until(server.idle)
            server.engine.hold = True
            first = server.begin("POST", CHAT, BODY, origin=PAGE, **ann)
            await until(lambda: bool(server.engine.open_calls))
            full = await server.post(CHAT, BODY, origin=PAGE, **ann)
            assert full.status == 503 and full.headers["retry-after"]
            readable(full)
            server.engine.play(server.engine.calls[-1])
            readable(await first.reply())

    run(main())


def test_limits_of_a_key_can_be_read(byte_checkpoint: Path) -> None:
    async def main() -> None:
        options: dict[str, Any] = {"keys": KEYS, "requests_per_minute": 1}
        async with serving(byte_checkpoint, cors_origins=PAGE, **options) as server:
            statuses = []
            for _ in range(2):
                # a preflight counts for no limit
                assert (await preflight(server)).status == 200
                answer = await server.post(CHAT, BODY, origin=PAGE, **secret("ann"))
                readable(answer)
                statuses.append(answer.status)
            assert statuses == [200, 429] and int(answer.headers["retry-after"]) > 0

    run(main())


def test_refusals_of_the_connection_can_be_read() -> None:
    """They come before any request reaches the application."""
    origin = f"Origin: {PAGE}"
    cases = [
        # what comes before the header that names the page
        (get("/" + "x" * 9000, origin), 414, False),
        (b"nonsense\r\n\r\n", 400, False),
        (get("/", "A b: c"), 400, False),
        (get("/", origin, "X-A: " + "x" * 70000), 431, True),
        (get("/", origin, "X-B: c", "A b: c"), 400, True),
        (post(b"", origin, "Transfer-Encoding: gzip"), 400, True),
    ]

    async def main(*allowed: str) -> None:
        more = _refusal_headers(ServerConfig(cors_origins=",".join(allowed)))
        async with listening(Echo(), refusal_headers=more) as live:
            for data, status, named in cases:
                answer = await ask(live.port, data)
                assert answer.status == status, (data[:80], answer)
                # with an only origin it is clear who is meant, if anybody is
                expected = PAGE if named or len(allowed) == 1 else None
                assert answer.headers.get("access-control-allow-origin") == expected, data[:80]
                assert answer.headers["vary"] == "Origin"
        waiter = Waiter()
        async with listening(waiter, refusal_headers=more, max_connections=1) as live:
            async with connected(live.port) as busy:
                await busy.send(get())
                await until(lambda: live.stats.busy == 1)
                answer = await ask(live.port, get("/", origin))
            assert answer.status == 503 and answer.headers["retry-after"]
            assert answer.headers["access-control-allow-origin"] == PAGE
        async with listening(Echo(), refusal_headers=more, max_per_address=1) as live:
            async with connected(live.port), connected(live.port) as second:
                answer = await second.answer()
            assert answer.status == 429
            only = PAGE if len(allowed) == 1 else None
            assert answer.headers.get("access-control-allow-origin") == only

    run(main(PAGE))
    run(main("https://first.example", PAGE))


def test_origins_as_people_write_them() -> None:
    given = " https://A.example/ ,http://localhost:3000,, chrome-extension://abc"
    assert ServerConfig(cors_origins=given).origins == [
        "https://a.example",
        "http://localhost:3000",
        "chrome-extension://abc",
    ]
    for wrong in (
        "*",
        "null",
        "https://*.example",
        "a.example",
        "https://a.example/path",
        "https://",
    ):
        with pytest.raises(ConfigError, match="cors_origins"):
            ServerConfig(cors_origins=wrong)
