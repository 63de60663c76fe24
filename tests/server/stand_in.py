"""A server without an engine process: a stand-in answers, and an ASGI client that may leave.

Everything but :class:`dllmserve.process.fleet.Fleet` is the real thing.
"""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp, Message

from dllmserve.config import EngineConfig
from dllmserve.core.limits import Limits
from dllmserve.engine.tokenizer import AnswerText, Tokenizer, load_tokenizer
from dllmserve.errors import DllmServeError, EngineError, RequestAbortedError
from dllmserve.outputs import CanvasStep, FilledHole, RequestOutput, TokenLogprob
from dllmserve.process.calls import Call, Delta
from dllmserve.process.messages import Counters, EngineInfo, Submit
from dllmserve.process.supervisor import State
from dllmserve.server.app import create_app
from dllmserve.server.config import ServerConfig
from dllmserve.server.http.keys import ApiKeys
from dllmserve.server.jobs import Jobs
from dllmserve.server.service import Service
from dllmserve.server.settings import Settings
from tests import steady
from tests.helpers import PLAIN

#: what no test waits longer for; far more than any of them needs
PATIENCE = 20.0
MAX_LEN = 256
SPEC = replace(
    PLAIN, vocab_size=260, embedding_size=260, max_model_len=MAX_LEN, mask_id=259, eos_ids=(256,)
)
LIMITS = Limits(
    max_model_len=MAX_LEN,
    max_num_seqs=8,
    max_num_batched_tokens=4096,
    max_logit_rows=1024,
    page_size=16,
    num_pages=512,
)
#: two keys; the secrets are their names, made long
KEYS = ApiKeys.from_env("ann=ann-0123456789abcdef,bob=bob-0123456789abcdef", "test")


def secret(name: str) -> dict[str, str]:
    """The header of a key."""
    return {"authorization": f"Bearer {name}-0123456789abcdef"}


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a test; one that hangs fails soon."""
    steady.run(asyncio.wait_for(main, 2 * PATIENCE))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.002)


def echo_ids(prompt: list[int], length: int) -> list[int]:
    """The answer to every prompt: the prompt, again and again."""
    return list(itertools.islice(itertools.cycle(prompt), length))


class StandIn:
    """A fleet of one engine, which repeats the prompt at once; or, on hold, does as it is told.

    Attributes:
        hold: calls wait for the test to play them.
        calls: everything that was ever submitted.
        aborted: what was dropped before its end.
        answer: what it says in place of the prompt; texts, of which each call gets the next.
        loaded: start() waits for it.
    """

    def __init__(self, directory: Path, max_len: int = MAX_LEN) -> None:
        self.state = State.STARTING
        self.info: EngineInfo | None = None
        self.counters = Counters()
        self.silence, self.restarts = 0.0, 0
        self.supervisors = [self]
        self.hold = False
        self.calls: list[Call] = []
        self.aborted: list[Call] = []
        self.answer: Iterator[str] | None = None
        self.loaded = asyncio.Event()
        self.loaded.set()
        self.failure: DllmServeError | None = None
        self._gone = asyncio.Event()
        self._text: Tokenizer | None = load_tokenizer(directory)
        spec, limits = replace(SPEC, max_model_len=max_len), replace(LIMITS, max_model_len=max_len)
        self._known = EngineInfo(str(directory), spec, limits, "cpu", "float32", "no memory")

    async def start(self) -> EngineInfo:
        await self.loaded.wait()
        self.info, self.state = self._known, State.READY
        return self._known

    async def close(self) -> None:
        self.state = State.CLOSED
        for call in self.open_calls:
            call.end(EngineError("the engine has been closed"))

    async def failed(self) -> DllmServeError:
        await self._gone.wait()
        assert self.failure is not None
        return self.failure

    def fail(self, error: DllmServeError) -> None:
        """The engine is gone for good."""
        self.failure, self.state = error, State.FAILED
        for call in self.open_calls:
            call.end(error)
        self._gone.set()

    def submit(self, request: Submit, work: int = 0) -> Call:
        if self.state in (State.FAILED, State.CLOSED):
            raise self.failure or EngineError("the engine has been closed")
        call = Call(request, work)
        self.calls.append(call)
        if not self.hold:
            asyncio.get_running_loop().call_soon(self.play, call)
        return call

    def abort(self, call: Call, error: DllmServeError | None = None) -> None:
        if not call.ended:
            self.aborted.append(call)
            call.end(error or RequestAbortedError("the request has been aborted"))

    @property
    def serving(self) -> int:
        return int(self.state is State.READY)

    @property
    def running(self) -> int:
        return sum(call.running for call in self.open_calls)

    @property
    def work(self) -> int:
        return sum(call.work for call in self.open_calls)

    @property
    def open_calls(self) -> list[Call]:
        return [call for call in self.calls if not call.ended]

    def play(self, call: Call, ids: list[int] | None = None) -> None:
        """Run a call to its end."""
        if call.ended:
            return
        call.start()
        output = self.output(call, ids)
        shown = output.answer.token_ids if len(output.holes) < 2 else output.token_ids
        if call.submit.stream:
            for place in range(0, max(len(shown) - 2, 0), 2):
                part = slice(place, place + 2)
                logprobs = None if output.logprobs is None else output.logprobs[part]
                call.put(Delta(shown[part], logprobs))
        if call.submit.watch:
            for step in range(1, len(output.token_ids) + 1):
                call.put(canvas(output.token_ids, step))
        call.end(output)

    def output(self, call: Call, ids: list[int] | None = None) -> RequestOutput:
        """What becomes of a call."""
        submit = call.submit
        if submit.holes:
            return self._filled(submit)
        length = int(submit.params.gen_length)
        found = echo_ids(submit.prompt_ids, length) if ids is None else ids
        if self.answer is not None and self._text is not None:
            found = self._text.encode(next(self.answer), special=False)
        stops = submit.params.stop_strings
        text, used, stopped = AnswerText(self._text).read(found, stops)
        return RequestOutput(
            text=text,
            token_ids=found[:used],
            finish_reason="stop" if stopped or self.answer is not None else "length",
            prompt_tokens=len(submit.prompt_ids),
            completion_tokens=used,
            forward_passes=length,
            steps=list(range(1, used + 1)),
            logprobs=logprobs_of(found[:used], submit.params.logprobs),
            candidate_logprobs=named_logprobs(submit),
        )

    def _filled(self, submit: Submit) -> RequestOutput:
        """What becomes of a template: every hole says "ABAB"."""
        row, holes = list(submit.prompt_ids), []
        text = AnswerText(self._text)
        for start, hole in submit.holes:
            own = echo_ids([32, 33], hole.length)
            row[start : start + hole.length] = own
            told = logprobs_of(own, submit.params.logprobs)
            holes.append(FilledHole(hole.name, text.read(own, ())[0], own, [1] * len(own), told))
        filled = sum(hole.length for _, hole in submit.holes)
        return RequestOutput(
            text=text.read(row, ())[0],
            token_ids=row,
            finish_reason="length",
            prompt_tokens=len(row) - filled,
            completion_tokens=filled,
            forward_passes=1,
            steps=[1] * len(row),
            logprobs=logprobs_of(row, submit.params.logprobs),
            holes=tuple(holes),
            candidate_logprobs=named_logprobs(submit),
        )


def named_logprobs(submit: Submit) -> list[list[float]] | None:
    """Of a request's candidates: the lowest id is the likeliest."""
    return [[-float(id) for id in ids] for ids in submit.candidates] or None


def logprobs_of(ids: list[int], likeliest: int | None) -> list[TokenLogprob] | None:
    """-1/2 for every token, which is the likeliest, and less for "A", "B" and so on."""
    if likeliest is None:
        return None
    others = [[64 - 33 + 1 + place, -2.0 - place] for place in range(likeliest)]
    return [
        {"token_id": id, "logprob": -0.5, "top": [[id, -0.5], *others][:likeliest]} for id in ids
    ]


def canvas(ids: list[int], done: int) -> CanvasStep:
    """The canvas in which the first ``done`` ids are committed, and the next one is proposed."""
    shown = [token if place <= done else None for place, token in enumerate(ids)]
    return CanvasStep(
        token_ids=shown,
        committed=[place < done for place in range(len(ids))],
        confidence=[0.5 if place == done else None for place in range(len(ids))],
        block=(0, len(ids)),
        forward_passes=done,
    )


@dataclass
class Server:
    """A server under test."""

    app: ASGIApp
    service: Service
    jobs: Jobs
    engine: StandIn

    def begin(self, method: str, target: str, body: Any = None, **more: str) -> "Exchange":
        """Send a request."""
        return Exchange(self.app, method, target, body, more)

    async def ask(self, method: str, target: str, body: Any = None, **more: str) -> "Reply":
        """Send a request and wait for its whole answer."""
        return await self.begin(method, target, body, **more).reply()

    async def get(self, target: str, **more: str) -> "Reply":
        return await self.ask("GET", target, **more)

    async def post(self, target: str, body: Any, **more: str) -> "Reply":
        return await self.ask("POST", target, body, **more)

    def metric(self, name: str, **labels: str) -> float:
        """A value of /metrics; 0 for one that is not there yet."""
        page = self.service.metrics.render(self.service.gauges()).decode()
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name == f"dllmserve:{name}" and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0

    def idle(self) -> bool:
        """Nothing is under way, and every slot was given back."""
        admission = self.service.admission
        return not (self.service.runs or admission.requests or admission.work)


def make_server(
    directory: Path,
    *,
    keys: ApiKeys | None = None,
    store: str = "memory",
    max_len: int = MAX_LEN,
    **options: Any,
) -> tuple[Any, Server]:
    """An application around a stand-in, and a handle on both; not started."""
    options = {"shutdown_timeout": 0.0, "job_store": store, **options}
    config = ServerConfig(**options)
    app = create_app(Settings(config, EngineConfig(model=str(directory)), keys))
    service: Service = app.state.service
    service.llm.fleet = engine = StandIn(directory, max_len)  # type: ignore[assignment]
    return app, Server(app, service, app.state.jobs, engine)


@asynccontextmanager
async def serving(directory: Path, **options: Any) -> AsyncIterator[Server]:
    """A started server; at the end nothing of it may be under way."""
    app, server = make_server(directory, **options)
    async with app.router.lifespan_context(app):
        yield server
    await until(server.idle)


@dataclass
class Reply:
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, which must be complete."""
        answer = self.json()
        error: dict[str, Any] = answer["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert answer.get("detail", error["message"]) == error["message"]
        return error

    def events(self) -> list[tuple[str, Any]]:
        """Server-sent events: name ("" for none) and data, read from its JSON."""
        return list(parsed(self.body))


def parsed(body: bytes) -> Iterator[tuple[str, Any]]:
    """The events of a stream, without comments."""
    for block in body.decode().split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        name = "".join(line[7:] for line in lines if line.startswith("event: "))
        data = "".join(line[6:] for line in lines if line.startswith("data: "))
        if data:
            yield name, data if data == "[DONE]" else json.loads(data)


class Exchange:
    """One request to an ASGI application.

    Attributes:
        status, headers: of the answer, once it has begun.
        body: what has come of it so far.
        task: the application.
        reading: cleared, the client takes nothing more.
    """

    def __init__(
        self, app: ASGIApp, method: str, target: str, body: Any, headers: dict[str, str]
    ) -> None:
        path, _, query = target.partition("?")
        raw = (
            b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        )
        given = {"content-type": "application/json"} if body is not None else {}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(k.encode(), v.encode()) for k, v in {**given, **headers}.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self.status, self.headers, self.body = 0, {}, b""
        self.complete = False
        self.reading = asyncio.Event()
        self.reading.set()
        self._gone = asyncio.Event()
        self._changed = asyncio.Event()
        self._request: Message | None = {"type": "http.request", "body": raw, "more_body": False}
        self.task = asyncio.create_task(app(scope, self._receive, self._send))  # type: ignore[arg-type]

    async def _receive(self) -> Message:
        message, self._request = self._request, None
        if message is not None:
            return message
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self.reading.wait()
        if self._gone.is_set():
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode().lower(): v.decode() for k, v in message["headers"]}
        else:
            self.body += message.get("body", b"")
            self.complete = not message.get("more_body", False)
        self._changed.set()

    def leave(self) -> None:
        """Close the connection."""
        self._gone.set()

    async def left(self) -> None:
        """Close the connection and wait until the application is through with it."""
        self.leave()
        async with asyncio.timeout(PATIENCE):
            await self.task

    async def until(self, part: bytes) -> None:
        """Wait until the answer holds the bytes."""
        async with asyncio.timeout(PATIENCE):
            while part not in self.body:
                assert not self.task.done(), self.body
                self._changed.clear()
                await self._changed.wait()

    async def reply(self) -> Reply:
        """Wait for the whole answer."""
        async with asyncio.timeout(PATIENCE):
            await self.task
        assert self.complete
        return Reply(self.status, self.headers, self.body)
