"""Refusals of every kind, and not one address of a client in the log."""

import asyncio
import contextlib
import re
from pathlib import Path

from tests.server.clients.started import Started, started
from tests.server.http.live import ask, chunked, connected, get, post

KEY = "0123456789abcdef"
MINE = f"X-Api-Key: {KEY}"
OPTIONS = ["--log-level", "debug", "--header-timeout", "3", "--body-timeout", "3"]
OPTIONS += ["--keep-alive-timeout", "3", "--max-connections-per-address", "30"]
CHAT = "/v1/chat/completions"

#: requests that are refused, and the status
REFUSED = [
    (b"nonsense\r\n\r\n", 400),
    (get().replace(b"Host: h\r\n", b""), 400),
    (get("/", "X: " + "x" * 70_000), 431),
    (get("/" + "x" * 9000), 414),
    (get("/v1/models")[:-2], 408),
    (get("/v1/models"), 401),
    (get("/nothing", MINE), 404),
    (post(b"{}", path="/health"), 413),
    (post(b"{}", MINE, path=CHAT)[:-1], 408),
    (post(b"x" * 3_000_000, MINE, path=CHAT), 413),
    (post(b"{}", MINE, "Content-Type: text/html", path=CHAT), 415),
    (post(b"{", MINE, path=CHAT), 400),
    (chunked(b"{}", end=b"zz\r\n"), 400),
]


async def _misbehave(port: int) -> None:
    """Everything that a client can do wrong, and clients that leave."""
    # side by side, because some wait for a timeout
    answers = await asyncio.gather(*[ask(port, data) for data, _ in REFUSED])
    for (data, status), answer in zip(REFUSED, answers, strict=True):
        assert answer.status == status, data[:60]
    for data in (b"", b"GET /", get("/health") * 3, post(b"{}", MINE, path=CHAT)):
        async with connected(port) as client:
            await client.send(data)
            client.writer.transport.abort()
    async with contextlib.AsyncExitStack() as stack:
        many = [await stack.enter_async_context(connected(port)) for _ in range(31)]
        assert (await many[-1].answer()).status == 429
        await many[0].closed()


def test_no_line_names_a_client(tmp_path: Path, byte_checkpoint: Path) -> None:
    """At the level that says most, and with asyncio's own debugging on; in either form."""
    variables = {"DLLMSERVE_API_KEYS": KEY, "PYTHONASYNCIODEBUG": "1"}

    async def both(servers: list[Started]) -> None:
        await asyncio.gather(*[_misbehave(server.port) for server in servers])

    with contextlib.ExitStack() as stack:
        servers = []
        for form in ("json", "text"):
            folder = tmp_path / form
            folder.mkdir()
            asked = [str(byte_checkpoint), *OPTIONS, "--log-format", form]
            servers.append(stack.enter_context(started(folder, *asked, **variables)))
        asyncio.run(both(servers))
        logs = [_log(server) for server in servers]
    for log in logs:
        ours = [line for line in log if "listening on http://127.0.0.1:" in line]
        assert len(ours) == 1
        named = [line for line in log if re.search(r"127\.0\.0\.1|::1", line) and line not in ours]
        assert named == []
        assert sum("connection refused" in line for line in log) >= 6


def _log(server: Started) -> list[str]:
    return server.log.read_text(encoding="utf-8").splitlines()
