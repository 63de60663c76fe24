"""Event streams by themselves: silence, clients that leave, and exceptions."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message

from dllmserve.errors import EngineError
from dllmserve.server.sse import ClientGone, EventStream, event, unless_gone
from tests.server.stand_in import run


class Client:
    """The other side of a response."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.gone = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await self.reading.wait()
        self.messages.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.messages)

    @property
    def complete(self) -> bool:
        return self.messages[-1].get("more_body") is False


class Source:
    """A generator of events that notes how it ends."""

    def __init__(self, *items: Any) -> None:
        self.items = items
        self.began = self.cleaned = self.told = 0
        self.go = asyncio.Event()

    async def events(self) -> AsyncGenerator[bytes, None]:
        self.began += 1
        try:
            for item in self.items:
                if item is None:
                    await self.go.wait()
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            self.cleaned += 1

    def response(self, keep_alive_s: float = 60.0) -> EventStream:
        return EventStream(self.events(), keep_alive_s, self.end)

    def end(self) -> None:
        self.told += 1


def test_events_are_lines_of_json() -> None:
    assert event({"a": "é\n\n"}) == 'data: {"a":"é\\n\\n"}\n\n'.encode()
    assert event([1], "step") == b"event: step\ndata: [1]\n\n"


def test_everything_is_sent_in_order() -> None:
    async def main() -> None:
        client, source = Client(), Source(b"1", b"2", b"3")
        await source.response()({}, client.receive, client.send)
        assert client.body == b"123" and client.complete
        start = client.messages[0]
        headers = dict(start["headers"])
        assert start["status"] == 200
        assert headers[b"content-type"].startswith(b"text/event-stream")
        assert headers[b"x-accel-buffering"] == b"no" and b"content-length" not in headers
        assert (source.cleaned, source.told) == (1, 1)

    run(main())


def test_silence_is_filled_without_losing_anything() -> None:
    async def main() -> None:
        client, source = Client(), Source(b"1", None, b"2")
        sending = asyncio.create_task(source.response(0.01)({}, client.receive, client.send))
        while client.body.count(b": keep-alive\n\n") < 3:
            await asyncio.sleep(0.001)
        source.go.set()
        await sending
        assert client.body.replace(b": keep-alive\n\n", b"") == b"12" and client.complete

    run(main())


@pytest.mark.parametrize("stuck", [False, True], ids=["silent", "not reading"])
def test_a_client_that_leaves_ends_the_generator(stuck: bool) -> None:
    async def main() -> None:
        client, source = Client(), Source(b"1", None, b"2")
        sending = asyncio.create_task(source.response()({}, client.receive, client.send))
        while client.body != b"1":
            await asyncio.sleep(0.001)
        if stuck:
            client.reading.clear()
            source.go.set()
            await asyncio.sleep(0.01)
        client.gone.set()
        await sending
        assert (source.cleaned, source.told) == (1, 1)
        assert not client.complete

    run(main())


def test_a_client_that_was_never_there() -> None:
    async def main() -> None:
        client, source = Client(), Source(None)
        client.gone.set()
        await source.response()({}, client.receive, client.send)
        assert source.told == 1 and source.began == source.cleaned

        class Broken(Client):
            async def send(self, message: Message) -> None:
                raise OSError("gone")

        client, source = Broken(), Source(b"1")
        with pytest.raises(OSError, match="gone"):
            await source.response()({}, client.receive, client.send)
        assert (source.began, source.told) == (0, 1)

    run(main())


def test_exceptions_are_not_lost() -> None:
    async def main() -> None:
        client, source = Client(), Source(b"1", RuntimeError("a fault on purpose"))
        with pytest.raises(RuntimeError, match="on purpose"):
            await source.response()({}, client.receive, client.send)
        assert client.body == b"1" and not client.complete
        assert (source.cleaned, source.told) == (1, 1)

        class Breaks(Client):
            async def send(self, message: Message) -> None:
                await super().send(message)
                if len(self.messages) == 2:
                    raise OSError("gone")

        client, source = Breaks(), Source(b"1", b"2")
        with pytest.raises(OSError, match="gone"):
            await source.response()({}, client.receive, client.send)
        # at once, not when the garbage collector finds it
        assert (source.cleaned, source.told) == (1, 1)

    run(main())


def test_a_cancelled_response_cleans_up() -> None:
    async def main() -> None:
        client, source = Client(), Source(b"1", None)
        sending = asyncio.create_task(source.response()({}, client.receive, client.send))
        while client.body != b"1":
            await asyncio.sleep(0.001)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert (source.cleaned, source.told) == (1, 1)

    run(main())


def http(client: Client) -> Request:
    return Request({"type": "http"}, client.receive, client.send)


def test_work_ends_when_the_client_leaves() -> None:
    async def main() -> None:
        ended: list[str] = []

        async def work(seconds: float) -> str:
            try:
                await asyncio.sleep(seconds)
                return "done"
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise

        async def fails() -> None:
            raise EngineError("no")

        assert await unless_gone(http(Client()), work(0.01)) == "done"
        with pytest.raises(EngineError, match="no"):
            await unless_gone(http(Client()), fails())
        client = Client()
        asyncio.get_running_loop().call_later(0.01, client.gone.set)
        with pytest.raises(ClientGone):
            await unless_gone(http(client), work(60))
        assert ended == ["cancelled"]
        waiting = asyncio.create_task(unless_gone(http(Client()), work(60)))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert ended == ["cancelled"] * 2

    run(main())
