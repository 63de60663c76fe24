"""Compressed request bodies: decoded within the limit, or refused."""

import gzip
import tracemalloc

import pytest

from dllmserve.server.http.body import BodyGuard
from dllmserve.server.http.coding import CodingError, DecodedTooLarge, decode, zstd
from tests.server.http.live import Echo, connected, post, serving
from tests.steady import run

LIMIT = 1000


def zipped(data: bytes, coding: str) -> bytes:
    if coding == "gzip":
        return gzip.compress(data)
    return bytes(zstd.compress(data))


CODINGS = ["gzip", pytest.param("zstd", marks=pytest.mark.skipif(zstd is None, reason="no zstd"))]


@pytest.mark.parametrize("coding", CODINGS)
def test_compressed_bodies_are_decoded(coding: str) -> None:
    plain = b'{"a": "' + b"b" * (LIMIT - 9) + b'"}'

    async def main() -> None:
        async with serving(BodyGuard(Echo(), max_bytes=LIMIT)) as live:
            async with connected(live.port) as client:
                for data in (b"{}", plain):
                    given = post(zipped(data, coding), f"Content-Encoding: {coding}")
                    assert (await client.ask(given)).body == b"POST / " + data
                    given = post(zipped(data, coding), f"Content-Encoding: {coding.upper()}")
                    assert (await client.ask(given)).body == b"POST / " + data
                for size in (LIMIT + 1, 400_000):
                    given = post(zipped(b" " * size, coding), f"Content-Encoding: {coding}")
                    answer = await client.ask(given)
                    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
                    assert f"limited to {LIMIT} bytes, also after" in answer.error["message"]
                whole = zipped(b"{}", coding)
                for data, text in (
                    (b"{}", f"no valid {coding}"),
                    (whole[:-1], "ends inside"),
                    (whole + whole, "goes on behind"),
                    (whole + b"x", "goes on behind"),
                ):
                    answer = await client.ask(post(data, f"Content-Encoding: {coding}"))
                    assert (answer.status, answer.error["code"]) == (400, "malformed_request")
                    assert text in answer.error["message"], data

    run(main())


@pytest.mark.parametrize("coding", CODINGS)
def test_a_bomb_is_not_unpacked(coding: str) -> None:
    """A hundred megabytes in few bytes take next to nothing."""
    bomb = zipped(bytes(10**8), coding)
    tracemalloc.start()
    try:
        with pytest.raises(DecodedTooLarge):
            decode(bomb, coding.encode(), LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(zstd is None, reason="no zstd")
def test_windows_that_take_much_memory_are_refused() -> None:
    level = zstd.CompressionParameter
    maker = zstd.ZstdCompressor(options={level.window_log: 27})
    made = maker.compress(b"{}") + maker.flush()  # a stream, whose size is not known beforehand
    with pytest.raises(CodingError, match="no valid zstd"):
        decode(made, b"zstd", LIMIT)


def test_other_codings_are_refused() -> None:
    async def main() -> None:
        async with serving(BodyGuard(Echo())) as live, connected(live.port) as client:
            for given in ("br", "gzip, gzip", "deflate", "x" * 100):
                answer = await client.ask(post(b"{}", f"Content-Encoding: {given}"))
                assert answer.status == 415
                assert answer.error["code"] == "unsupported_media_type"
                assert given[:40] in answer.error["message"]
                assert "compressed by gzip" in answer.error["message"]
            twice = post(zipped(b"{}", "gzip"), "Content-Encoding: gzip", "Content-Encoding: gzip")
            assert (await client.ask(twice)).status == 415
            assert (await client.ask(post(b"{}", "Content-Encoding: identity"))).status == 200

    run(main())
