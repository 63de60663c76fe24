"""Heads of requests: Host, offers to upgrade, and what requests were smuggled with."""

import asyncio
import itertools

import pytest

from dllmserve.server.http.body import BodyGuard
from tests.server.http.live import Answer, Echo, connected, post, serving
from tests.steady import run

GOOD_HOSTS = [
    b"h",
    b"localhost:8000",
    b"127.0.0.1",
    b"127.0.0.1:65535",
    b"[::1]",
    b"[::1]:8000",
    b"[2001:db8::192.0.2.1]:1",
    b"[v1.fe80::a+en1]",
    b"a_b.example.",
    b"a.example:",
    b"xn--bcher-kva.example",
    b"%41.example",
    b"a,b",  # RFC 3986 has it, though no name does
    b"",
    b"   ",
    b"\t h \t",
]
BAD_HOSTS = [
    b"a b",
    b"a, b",
    b"a/",
    b"/",
    b"h/health?",
    b"x/health#",
    b"h:80/health?x=",
    b"a\\b",
    b"http://a",
    b"user@a",
    b"user:secret@a",
    b"@a",
    b"a:b",
    b"a:-1",
    b"a:+1",
    b"a:1:2",
    b"a:65536",
    b"a:999999",
    b":80",
    b":",
    b"::1",
    b"[::1",
    b"::1]",
    b"[]",
    b"[a]",
    b"[1.2.3.4]",
    b"[:::1]",
    b"[::1]x",
    b"[fe80::1%25eth0]",
    b"a[::1]",
    b"%",
    b"%4",
    b"%zz",
    b"a?b",
    b"a#b",
    b"a<b>",
    b'"a"',
    b"a^b",
    b"a|b",
    b"a`b",
    b"{a}",
    b"b\xc3\xbccher.example",
    b"\xff",
    b"a b/\x80",
]


def _get(*lines: bytes, version: bytes = b"1.1", target: bytes = b"/") -> bytes:
    return b"\r\n".join([b"GET %b HTTP/%b" % (target, version), *lines, b"", b""])


REFUSED = {
    **{f"{host!r} {v!r}": _get(b"Host: " + host, version=v)
       for host in BAD_HOSTS for v in (b"1.1", b"1.0")},
    "none": _get(),
    "none, with others": _get(b"A: b", b"X-Host: h", b"X-Forwarded-Host: h"),
    "two": _get(b"Host: a", b"Host: b"),
    "the same twice": _get(b"Host: a", b"A: b", b"host: a"),
    "one of them empty": _get(b"Host:", b"Host: a"),
    "two in HTTP/1.0": _get(b"Host: a", b"Host: a", version=b"1.0"),
    "none, for a whole URL": _get(target=b"http://a/"),
    "two, for a whole URL": _get(b"Host: a", b"Host: a", target=b"http://a/"),
    "bad, for a whole URL": _get(b"Host: a b", target=b"http://a/"),
    "a user in the target": _get(b"Host: a", target=b"http://u@a/"),
    "nobody in the target": _get(b"Host: a", target=b"http:///x"),
    "a bad port in the target": _get(b"Host: a", target=b"http://a:99999/x"),
}  # fmt: skip

ACCEPTED = {
    **{f"{host!r} {v!r}": _get(b"Host: " + host, version=v)
       for host in GOOD_HOSTS for v in (b"1.1", b"1.0")},
    "none in HTTP/1.0": _get(version=b"1.0"),
    "any case": _get(b"hOST: h"),
    "a whole URL": _get(b"Host: a", target=b"http://a:80/"),
    "another host in the target": _get(b"Host: a", target=b"http://[::1]:80/"),
    "a URL in the query": _get(b"Host: a", target=b"/?a=http://u@a/"),
}  # fmt: skip


async def answered(port: int, data: bytes, count: int = 1) -> tuple[list[Answer], bytes]:
    """All answers to what is sent, of which so many must come, and what came after them."""
    answers: list[Answer] = []
    async with connected(port) as client:
        await client.send(data)
        try:
            while True:
                answers.append(await client.answer())
                if len(answers) == count:  # sooner, it would be a client that leaves
                    client.writer.write_eof()
        except asyncio.IncompleteReadError as error:
            return answers, error.partial
        except ConnectionError:
            return answers, b""


def test_hosts_that_are_refused() -> None:
    async def main() -> None:
        echo = Echo()
        async with serving(echo) as live:
            for name, data in REFUSED.items():
                [answer], rest = await answered(live.port, data)
                assert (answer.status, rest) == (400, b""), name
                assert answer.headers["connection"] == "close"
                assert answer.error["code"] in ("invalid_host", "malformed_request"), name
            assert not echo.seen

    run(main())


def test_hosts_that_are_taken() -> None:
    async def main() -> None:
        echo = Echo()
        async with serving(echo) as live:
            for name, data in ACCEPTED.items():
                [answer], rest = await answered(live.port, data)
                assert (answer.status, rest) == (200, b""), name
            assert len(echo.seen) == len(ACCEPTED)

    run(main())


OFFERS = [
    (b"Connection: close", b"Upgrade: h2c", b"Connection: Upgrade"),
    (b"Connection: Upgrade", b"Upgrade: h2c", b"Connection: close"),
    (b"Upgrade: h2c", b"Connection: close, Upgrade"),
    (b"Upgrade: h2c", b"Connection: Upgrade, close"),
    (b"Connection: upgrade , HTTP2-Settings,CLOSE", b"HTTP2-Settings: AAMAAABk", b"Upgrade: h2c"),
    (b"Connection: Upgrade", b"Upgrade: websocket", b"Connection: Close"),
    (b"Connection: Upgrade", b"Upgrade: h2c, websocket", b"Upgrade: x", b"Connection: close"),
    (b"Connection: close", b"Upgrade: h2c"),
]


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_an_offer_to_upgrade_with_close_is_answered(size: int) -> None:
    """The body is read, the answer is the last one, and the connection is closed behind it."""

    async def one(port: int, data: bytes) -> None:
        async with connected(port) as client:
            for at in range(0, len(data), size):
                await client.send(data[at : at + size])
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, b'POST / {"a": 1}')
            assert answer.headers["connection"] == "close"
            await client.closed()

    async def main() -> None:
        async with serving(BodyGuard(Echo())) as live:
            for offer in OFFERS:
                lines = [line.decode() for line in offer]
                await one(live.port, post(b'{"a": 1}', *lines))
                old = post(b'{"a": 1}', *lines).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
                await one(live.port, old)
            # and after requests that did not close
            async with connected(live.port) as client:
                await client.send(post(b"1") + post(b"2", "Connection: Upgrade", "Upgrade: h2c"))
                await client.send(post(b"3", "Connection: close, Upgrade", "Upgrade: h2c"))
                bodies = [(await client.answer()).body for _ in range(3)]
                assert bodies == [b"POST / 1", b"POST / 2", b"POST / 3"]
                await client.closed()

    run(main())


HEAD = b"POST /first HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
SECOND = b"GET /second HTTP/1.1\r\nHost: h\r\n\r\n"
#: ways to write Transfer-Encoding: chunked, and whether they mean it
CODINGS = {
    b"Transfer-Encoding: chunked": True,
    b"transfer-encoding: CHUNKED": True,
    b"Transfer-Encoding:\tchunked": True,
    b"Transfer-Encoding: chunked\t": None,  # right, and refused by the parser
    b"Transfer-Encoding:chunked": True,
    b"Transfer_Encoding: chunked": False,
    b"X-Transfer-Encoding: chunked": False,
    b"A: b\tTransfer-Encoding: chunked": False,
    b"Transfer-Encoding : chunked": None,
    b"Transfer-Encoding\x00: chunked": None,
    b"Transfer-Encoding: xchunked": None,
    b"Transfer-Encoding: chunke": None,
    b"Transfer-Encoding: identity": None,
    b"Transfer-Encoding: gzip, chunked": None,
    b"Transfer-Encoding: chunked, gzip": None,
    b"Transfer-Encoding: chunked, chunked": None,
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked": None,
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x": None,
    b"Transfer-Encoding: \x0bchunked": None,
    b"Transfer-Encoding: chunked\x0c": None,
    b"Transfer-Encoding: chunked\x00": None,
    b'Transfer-Encoding: "chunked"': None,
    b"Transfer-Encoding: chunked;q=1": None,
    b"Transfer-Encoding:": None,
    b"Transfer-Encoding:\r\n chunked": None,
    b"Transfer-Encoding:\n chunked": None,
    b"A: b\nTransfer-Encoding: chunked": None,
    b"A: b\rTransfer-Encoding: chunked": None,
    b" Transfer-Encoding: chunked": None,
}
LENGTHS = (None, 0, 5, 5 + len(SECOND))


def test_no_combination_of_lengths_and_codings_smuggles_a_request() -> None:
    """A second request is answered only where RFC 9112 says that the first one has ended."""

    def expected(means: bool | None, length: int | None) -> list[bytes]:
        """Bodies of the requests that are seen; what does not fit is refused, and closes."""
        rest = b"0\r\n\r\n" + SECOND
        if means is None or (means and length is not None):
            return []
        if means or length == 5:
            return [b"" if means else rest[:5], b""]
        return [rest[: length or 0]]

    async def one(port: int, lines: list[bytes], seen: list[bytes]) -> None:
        data = HEAD + b"".join(line + b"\r\n" for line in lines) + b"\r\n0\r\n\r\n" + SECOND
        answers, rest = await answered(port, data, len(seen) or 1)
        good = [answer.body for answer in answers if answer.status == 200]
        paths = (b"POST /first ", b"GET /second ")
        assert good == [path + body for path, body in zip(paths, seen, strict=False)], data
        # whatever is left over is no request
        assert [a.status for a in answers[len(good) :]] in ([], [400]), data
        assert bool(seen) or answers[-1].status == 400, data
        assert rest == b"", data

    async def main() -> None:
        async with serving(BodyGuard(Echo())) as live:
            cases = itertools.product(CODINGS.items(), LENGTHS, (False, True))
            for (coding, means), length, turned in cases:
                lines = [coding] if length is None else [coding, b"Content-Length: %d" % length]
                await one(live.port, lines[::-1] if turned else lines, expected(means, length))

    run(main())


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"1;a=" + b"x" * 60_000 + b"\r\n1\r\n0\r\n\r\n", 200),
        (b"1;a=" + b"x" * 70_000 + b"\r\n1\r\n0\r\n\r\n", 431),
        (b"1\r\n1\r\n0;a=" + b"x" * 70_000 + b"\r\n\r\n", 431),
        (b"0" * 70_000 + b"1\r\n1\r\n0\r\n\r\n", 431),
        (b"1\r\n1\r\n0\r\nA: " + b"x" * 70_000 + b"\r\n\r\n", 431),
        (b"1\r\n1\r\n0\r\n" + b"".join(b"A%d: b\r\n" % n for n in range(120)) + b"\r\n", 431),
        # each is small, and none is justified by the body
        ((b"1;a=" + b"x" * 1000 + b"\r\n1\r\n") * 100 + b"0\r\n\r\n", 431),
        (b"1\r\n1\r\n" * 20_000 + b"0\r\n\r\n", 431),
        # as a client that sends words does
        (b"5\r\n12345\r\n" * 10_000 + b"0\r\n\r\n", 200),
        (b"40\r\n" + b"1" * 64 + b"\r\n" + b"1;ab=c\r\n1\r\n" * 7000 + b"0\r\n\r\n", 200),
        (b"2000\r\n" + b"1" * 8192 + b"\r\n" + b"0\r\n\r\n", 200),
    ],
)
@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_what_is_around_chunks_is_bounded(data: bytes, status: int, size: int) -> None:
    async def main() -> None:
        async with serving(BodyGuard(Echo())) as live, connected(live.port) as client:
            whole = CHUNKED + data
            answer = asyncio.ensure_future(client.answer())
            for at in range(0, len(whole), size):
                await client.send(whole[at : at + size])
                await asyncio.sleep(0)
            found = await answer
            assert found.status == status
            if status == 431:
                assert found.error["code"] in ("headers_too_large", "too_many_headers")

    run(main())
