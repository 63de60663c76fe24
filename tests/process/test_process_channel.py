"""The socket between an engine and its owner."""

import asyncio
import socket

import pytest

from dllmserve.process.channel import Channel, Connection


def test_last_words_of_an_engine_that_leaves_with_unread_messages() -> None:
    """The system resets such a connection; what the engine said before still counts."""

    async def main() -> None:
        mine, other = socket.socketpair()
        engine, connection = Channel(other), await Connection.open(mine)
        connection.send(b"never read")
        await asyncio.sleep(0)
        arrived = engine._socket.recv(1, socket.MSG_PEEK)
        assert arrived
        engine.send(b"one")
        engine.send(b"two")
        engine.close()
        await asyncio.sleep(0.05)  # the reset is noticed before anybody asks
        assert [await connection.receive() for _ in range(4)] == [b"one", b"two", None, None]
        connection.close()

    asyncio.run(asyncio.wait_for(main(), 20))


class Flood:
    """A socket that always has more: the same message again and again."""

    def __init__(self, message: bytes) -> None:
        self.framed = len(message).to_bytes(4, "big") + message
        self.given = 0

    def recv(self, size: int) -> bytes:
        begin = self.given % len(self.framed)
        part = (self.framed * (size // len(self.framed) + 2))[begin : begin + size]
        self.given += size
        return part

    def poll(self, timeout: float) -> list[int]:
        return [1]


@pytest.mark.parametrize("size", [1000, 3 << 20])
def test_a_flood_is_taken_in_parts(size: int) -> None:
    """However fast messages come, steps go on in between; a larger message still arrives."""
    mine, other = socket.socketpair()
    with other:
        engine = Channel(mine)
        engine.close()
    flood = Flood(b"m" * size)
    engine._socket = engine._poll = flood  # type: ignore[assignment]
    found: list[bytes] = []
    before = 0
    while len(found) < 3:
        found += engine.receive(20.0)
        assert 0 < flood.given - before <= (1 << 20) + (1 << 18)
        before = flood.given
    assert set(found) == {b"m" * size}
