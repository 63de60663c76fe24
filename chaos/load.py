"""Load: clients that ask for known answers in all ways, and judge what they get."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from chaos.answers import Ask, Choice, in_turn
from chaos.client import Answer, Client, Events, Hung, LostAnswer

#: seconds between polls of those clients that do not wait for the result
_POLL_S = 0.05
_LONG_POLL_S = 20
_MOST_RETRIES = 60

Way = Callable[[Client, Ask, "Tally"], Coroutine[Any, Any, None]]


class Tally:
    """What became of the requests of a load.

    Attributes:
        counts: by what became of them: "right", "refused" (503 and asked again), "cut" (an
            error event and [DONE] after text that was right so far), "cut early" (the same
            before any text), and whatever a scenario adds.
        wrong: in words.
        seconds: of right answers.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.seconds: list[float] = []

    def right(self, seconds: float) -> None:
        """A right answer."""
        self.counts["right"] += 1
        self.seconds.append(seconds)

    def bad(self, text: str) -> None:
        """A wrong one."""
        self.wrong.append(text)

    def judge(self, ask: Ask, way: str, got: Sequence[Choice], seconds: float) -> None:
        """Compare answers with those of the request alone."""
        if tuple(got) == ask.choices:
            self.right(seconds)
        else:
            self.bad(f"{way}, {ask.name}: {got!r} instead of {ask.choices!r}"[:300])


async def patiently(tally: Tally, post: Callable[[], Awaitable[Answer]]) -> Answer:
    """Ask again while the server says 503 with Retry-After."""
    for _ in range(_MOST_RETRIES):
        answer = await post()
        if answer.status != 503 or answer.retry_after is None:
            return answer
        tally.counts["refused"] += 1
        await asyncio.sleep(answer.retry_after)
    return answer


async def chat(client: Client, ask: Ask, tally: Tally) -> None:
    """A whole answer of /v1/chat/completions."""
    answer = await patiently(tally, lambda: client.post("/v1/chat/completions", ask.chat_body))
    if answer.status != 200:
        tally.bad(f"chat, {ask.name}: status {answer.status} {answer.code}")
        return
    choices = sorted(answer.json()["choices"], key=lambda choice: int(choice["index"]))
    got = [
        Choice(choice["message"]["content"], choice["finish_reason"], right.tokens)
        for choice, right in zip(choices, ask.choices, strict=False)
    ]
    if answer.json()["usage"]["completion_tokens"] != sum(c.tokens for c in ask.choices):
        tally.bad(f"chat, {ask.name}: wrong usage {answer.json()['usage']}")
        return
    tally.judge(ask, "chat", got, answer.seconds)


async def stream(client: Client, ask: Ask, tally: Tally) -> None:
    """A stream of /v1/chat/completions; its pieces have to make up the whole text."""
    began = asyncio.get_running_loop().time()
    for _ in range(_MOST_RETRIES):
        events = await client.stream("/v1/chat/completions", ask.chat_body)
        refusal = events.refusal
        if refusal is None or refusal.status != 503 or refusal.retry_after is None:
            break
        tally.counts["refused"] += 1
        await asyncio.sleep(refusal.retry_after)
    judge_stream(ask, events, tally, asyncio.get_running_loop().time() - began)


def judge_stream(ask: Ask, events: Events, tally: Tally, seconds: float) -> None:
    """Right, cut after an error, or wrong."""
    if events.refusal is not None:
        tally.bad(f"stream, {ask.name}: status {events.status} {events.refusal.code}")
    elif not events.done or events.after_done:
        tally.bad(f"stream, {ask.name}: [DONE] is not the last event")
    elif events.error is not None:
        pairs = [(events.texts.get(i, ""), right.text) for i, right in enumerate(ask.choices)]
        if all(right.startswith(text) for text, right in pairs):
            tally.counts["cut" if events.began else "cut early"] += 1
            tally.counts[f"stream error {events.error}"] += 1
        else:
            tally.bad(f"stream, {ask.name}: wrong text before the error: {pairs!r}"[:300])
    else:
        got = [
            Choice(events.texts.get(i, ""), events.reasons.get(i, ""), right.tokens)
            for i, right in enumerate(ask.choices)
        ]
        tally.judge(ask, "stream", got, seconds)


async def job(client: Client, ask: Ask, tally: Tally) -> None:
    """Jobs of /v1/generate, one for each choice, with long polls."""
    await _jobs(client, ask, tally, f"?details=true&wait={_LONG_POLL_S}", 0.0)


async def polled_job(client: Client, ask: Ask, tally: Tally) -> None:
    """Jobs of /v1/generate, asked for again and again."""
    await _jobs(client, ask, tally, "?details=true", _POLL_S)


async def _jobs(client: Client, ask: Ask, tally: Tally, query: str, pause_s: float) -> None:
    began = asyncio.get_running_loop().time()
    ids = []
    for choice in range(ask.n):
        body = ask.native_body(choice)
        answer = await patiently(tally, lambda body=body: client.post("/v1/generate", body))  # type: ignore[misc]
        if answer.status != 200:
            tally.bad(f"job, {ask.name}: status {answer.status} {answer.code}")
            return
        ids += answer.json()["request_ids"]
    got = []
    for id in ids:
        result = await result_of(client, id, query, pause_s)
        if result.get("status") != "finished":
            tally.bad(f"job, {ask.name}: {result}"[:300])
            return
        tokens = result["usage"]["completion_tokens"]
        got.append(Choice(result["text"], result["finish_reason"], tokens))
    tally.judge(ask, "job", got, asyncio.get_running_loop().time() - began)


async def result_of(
    client: Client, id: int, query: str = "?details=true&wait=20", pause_s: float = 0.0
) -> dict[str, Any]:
    """A job's end, however often it has to be asked for; {"status": "404 ..."} if it is not there.

    Raises:
        Hung: it is still running after a minute.
    """
    until = asyncio.get_running_loop().time() + 60
    while asyncio.get_running_loop().time() < until:
        answer = await client.get(f"/v1/result/{id}{query}")
        if answer.status != 200:
            return {"status": f"{answer.status} {answer.code}"}
        found: dict[str, Any] = answer.json()
        if found["status"] != "running":
            return found
        await asyncio.sleep(pause_s)
    raise Hung(f"job {id} still runs after a minute")


#: share of each way in a mixed load
WAYS: Mapping[Way, int] = {stream: 8, chat: 8, job: 3, polled_job: 1}


class Load:
    """Clients that ask one request after the other until they are told to stop.

    Args:
        port: of the server.
        asks: requests, taken in random order.
        clients: how many at once.
        ways: shares of the ways to ask.
        seed: of the order.

    Example::

        async with Load(server.port, asks, clients=16) as load:
            ...  # break something
        report.expect_none("wrong answers", load.tally.wrong)
    """

    def __init__(
        self,
        port: int,
        asks: Sequence[Ask],
        *,
        clients: int,
        ways: Mapping[Way, int] = WAYS,
        seed: int = 0,
    ) -> None:
        self.tally = Tally()
        self.stopping = False
        rng = random.Random(seed)
        drawn = rng.choices(list(ways), list(ways.values()), k=997)
        self._turns = zip(in_turn(asks, rng), _for_ever(drawn), strict=False)
        self._client = Client(port)
        self._clients = clients
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._go_on()) for _ in range(self._clients)]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            await self.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()

    async def stop(self) -> None:
        """Let every client finish what it is at."""
        self.stopping = True
        await asyncio.gather(*self._tasks)

    async def _go_on(self) -> None:
        while not self.stopping:
            ask, way = next(self._turns)
            await attempt(way, self._client, ask, self.tally)


async def attempt(way: Way, client: Client, ask: Ask, tally: Tally) -> None:
    """One request; a lost connection and a wait without end are wrong answers."""
    try:
        await way(client, ask, tally)
    except LostAnswer as error:
        tally.bad(f"{way.__name__}, {ask.name}: {error}")
    except Hung as error:
        tally.counts["hung"] += 1
        tally.bad(f"hung: {error}")


async def take_all(port: int, turns: Sequence[tuple[Ask, Way]], clients: int, tally: Tally) -> None:
    """Work through a list with so many clients at once."""
    left = iter(turns)
    async with Client(port) as client:

        async def go_on() -> None:
            for ask, way in left:
                await attempt(way, client, ask, tally)

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(go_on())


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of all values does not exceed; 0 without values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _for_ever(ways: Sequence[Way]) -> Iterator[Way]:
    while True:
        yield from ways
