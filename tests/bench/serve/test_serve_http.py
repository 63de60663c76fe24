"""The HTTP client against scripted sockets: framing, reuse, and every way to lose a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from dllmserve.tools.bench.serve import http
from dllmserve.tools.bench.serve.http import HttpClient, Reply
from dllmserve.tools.bench.serve.outcome import RequestFailed

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Queue-Time: 0.5\r\n\r\nhi"


class Scripted:
    """Answers the requests of each connection with the next bytes of its script.

    ``None`` closes the connection; a connection without a script left is closed, too.
    """

    def __init__(self, *scripts: list[bytes | None]) -> None:
        self._scripts = list(scripts)
        self.requests: list[bytes] = []
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        script = self._scripts.pop(0) if self._scripts else []
        try:
            for answer in script:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                if answer is None:
                    break
                # in two pieces, so that the client has to put them together
                for piece in (answer[:20], answer[20:]):
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.01)
            if len(script) > 1 and script[-1] is not None:
                await reader.read()  # until the client hangs up
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            assert error is not None
        finally:
            writer.close()


def talk(server: Scripted, main: Callable[[HttpClient], Awaitable[None]]) -> None:
    """Run ``main`` with a client of the server."""

    async def both() -> None:
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        address = f"http://127.0.0.1:{port}/team"
        client = HttpClient(address, {"x-a": "b"})
        try:
            await asyncio.wait_for(main(client), 20)
        finally:
            await client.close()
            listener.close()

    asyncio.run(both())


async def ask(client: HttpClient, body: bytes = b"") -> Reply:
    reply = Reply()
    await client.exchange("POST", "/v1/x", body, reply)
    return reply


async def failure(client: HttpClient) -> RequestFailed:
    with pytest.raises(RequestFailed) as caught:
        await ask(client)
    return caught.value


def test_request_and_answer() -> None:
    server = Scripted([OK, OK])

    async def main(client: HttpClient) -> None:
        reply = await ask(client, b"{}")
        assert (reply.status, bytes(reply.body), reply.headers.get("x-queue-time")) == (
            200,
            b"hi",
            "0.5",
        )
        assert reply.sent_at is not None and reply.complete and "none" not in reply.headers
        await ask(client)

    talk(server, main)
    assert server.connections == 1  # used again
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /team/v1/x HTTP/1.1" and body == b"{}"
    assert {b"x-a: b", b"content-type: application/json", b"content-length: 2"} <= {
        line.lower() for line in lines
    }
    assert [line for line in lines if line.lower().startswith(b"host: 127.0.0.1:")]
    assert b"content-type" not in server.requests[1].lower()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nh\r\n1\r\ni\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\nA: b\r\n\r\n" + OK,
        b"HTTP/1.1 200 OK\r\n\r\nhi",
        b"HTTP/1.0 200 OK\r\nConnection: close\r\n\r\nhi",
    ],
    ids=["chunked", "interim", "until the end", "HTTP/1.0"],
)
def test_framing(answer: bytes) -> None:
    async def main(client: HttpClient) -> None:
        reply = await ask(client)
        assert (reply.status, bytes(reply.body)) == (200, b"hi") and "a" not in reply.headers

    talk(Scripted([answer]), main)


def test_connections_that_may_not_be_used_again() -> None:
    closing = OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    server = Scripted([closing, OK], [OK])

    async def main(client: HttpClient) -> None:
        await ask(client)
        await ask(client)

    talk(server, main)
    assert server.connections == 2


def test_old_connections_are_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_MAX_IDLE", 0.05)
    server = Scripted([OK, OK], [OK, OK])

    async def main(client: HttpClient) -> None:
        await ask(client)
        await asyncio.sleep(0.2)
        await ask(client)

    talk(server, main)
    assert server.connections == 2


@pytest.mark.parametrize(
    ("answer", "kind", "status"),
    [
        (None, "connection lost", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi", "connection lost", 200),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhi", "connection lost", 200),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "bad answer", None),
        (b"SSH-2.0-OpenSSH_9.6 and what else there is\r\n", "bad answer", None),
    ],
)
def test_lost(answer: bytes | None, kind: str, status: int | None) -> None:
    server = Scripted([answer], [OK])

    async def main(client: HttpClient) -> None:
        found = await failure(client)
        assert (found.kind, found.status) == (kind, status)
        assert (await ask(client)).complete  # the next request has a connection of its own

    talk(server, main)
    assert len(server.requests) == 2  # the lost one was not sent again


def test_a_lost_get_is_not_sent_again() -> None:
    server = Scripted([OK, None], [OK])

    async def main(client: HttpClient) -> None:
        await ask(client)
        with pytest.raises(RequestFailed) as caught:  # on a connection that was kept
            await client.exchange("GET", "/v1/x", b"x", Reply())
        assert caught.value.kind == "connection lost"

    talk(server, main)
    assert len(server.requests) == 2


def test_only_what_is_asked_for_is_read() -> None:
    """An answer to nothing ends the connection instead of being taken for the next one."""
    server = Scripted([OK + OK, OK], [OK])

    async def main(client: HttpClient) -> None:
        assert bytes((await ask(client)).body) == b"hi"
        await asyncio.sleep(0.1)
        assert bytes((await ask(client)).body) == b"hi"

    talk(server, main)
    assert server.connections == 2


def test_a_timeout_ends_the_connection() -> None:
    server = Scripted([OK[:-1], OK], [OK])

    async def main(client: HttpClient) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await ask(client)
        assert (await ask(client)).complete

    talk(server, main)
    assert server.connections == 2


def test_no_connection() -> None:
    async def main() -> None:
        client = HttpClient("http://localhost:1", {})
        with pytest.raises(RequestFailed) as caught:
            await ask(client)
        assert (caught.value.kind, caught.value.message) == ("no connection", "Connection refused")
        unknown = HttpClient("http://no-such-host.invalid", {})
        with pytest.raises(RequestFailed) as caught:
            await ask(unknown)
        assert caught.value.kind == "no connection" and caught.value.message
        await client.close()
        await unknown.close()

    asyncio.run(main())


def test_tls_to_a_server_without() -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        await reader.read(1)
        writer.close()

    async def main() -> None:
        listener = await asyncio.start_server(plain, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        client = HttpClient(f"https://127.0.0.1:{port}", {})
        found = await failure(client)
        assert found.kind == "no connection" and "SSL" in found.message.upper()
        await client.close()
        listener.close()

    asyncio.run(main())
