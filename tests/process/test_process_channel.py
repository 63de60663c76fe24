"""The socket between an engine and its owner."""

import asyncio
import os
import socket

from dllmserve.process.channel import Channel, Listener


def test_last_words_of_an_engine_that_leaves_with_unread_messages() -> None:
    """The system resets such a connection; what the engine said before still counts."""

    async def main() -> None:
        listener = Listener()
        await listener.start()
        try:
            engine = await asyncio.to_thread(Channel, listener.path)
            connection = await listener.accept(os.getpid())
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
        finally:
            listener.close()

    asyncio.run(asyncio.wait_for(main(), 20))
