"""AsyncEngine: engine processes, from their start to their end, and requests to them."""

from __future__ import annotations

import asyncio
import os
import secrets
import warnings
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from dllmserve._checks import check_known
from dllmserve._settings import with_sparse
from dllmserve._system import refuse_torchrun
from dllmserve._values import SparseConfig
from dllmserve.config import EngineConfig
from dllmserve.core.canvas import Canvas
from dllmserve.core.request import Request
from dllmserve.core.validator import RequestValidator
from dllmserve.core.work import work_of
from dllmserve.decisions.requests import Decider
from dllmserve.engine.filled import Template, template_row
from dllmserve.engine.grammars import Grammars
from dllmserve.engine.text import CommittedText
from dllmserve.engine.tokenizer import Tokenizer, load_tokenizer, prompt_ids
from dllmserve.errors import DllmServeError, EngineError, TokenizerError
from dllmserve.holes import Holes
from dllmserve.messages import template_messages
from dllmserve.outputs import RequestOutput, TextDelta, TokenLogprob
from dllmserve.process.calls import Call, Delta, Event
from dllmserve.process.fleet import Fleet
from dllmserve.process.home import Home
from dllmserve.process.messages import EngineInfo, Submit
from dllmserve.process.supervisor import State, SupervisorOptions
from dllmserve.sampling_params import SamplingParams

#: seconds that another event loop gets to close the engines, before they are killed
_CLOSE_S = 15.0
_NOT_STARTED = "the engine has not been started: await start(), or use 'async with'"
#: texts up to this many characters are tokenised where they are, longer ones in a thread
_SHORT_TEXT = 4096
_Ids = TypeVar("_Ids")


class AsyncEngine:
    """Engine processes, and requests to them; :class:`dllmserve.AsyncLLM` has what users call.

    Args:
        model, data_parallel_size, supervision, engine_options: see there.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "tiny",
        *,
        data_parallel_size: int = 1,
        supervision: SupervisorOptions | None = None,
        **engine_options: Any,
    ) -> None:
        refuse_torchrun(
            "AsyncLLM and dllmserve serve start the processes of their engines themselves, with "
            "tensor_parallel_size and data_parallel_size"
        )
        own = ("data_parallel_size", "supervision")
        check_known("AsyncLLM", engine_options, [*own, *(f.name for f in fields(EngineConfig))])
        name = os.fspath(model) if isinstance(model, os.PathLike) else model
        self.config = EngineConfig.from_options("AsyncLLM", {"model": name, **engine_options})
        self.fleet = Fleet(
            asdict(self.config), supervision or SupervisorOptions(), data_parallel_size
        )
        self.tokenizer: Tokenizer | None = None
        self._validator: RequestValidator | None = None
        self._grammars: Grammars | None = None
        self._decider: Decider | None = None
        #: where start() was called; it is called once
        self._home: Home | None = None
        self._starting: asyncio.Task[EngineInfo] | None = None
        self._closing: asyncio.Task[None] | None = None
        #: why it cannot be used any more
        self._over = ""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def start(self) -> EngineInfo:
        """Start the engine processes and load the model in each; may be called once.

        All other calls have to come from the event loop in which this one is made, except
        :meth:`close` and :meth:`abort`.

        Raises:
            ConfigError: there are not enough GPUs for all of them.
            DllmServeError: what :class:`dllmserve.LLM` raises, or a process did not start.
            EngineError: it has been started or closed before, or is closed meanwhile.
        """
        if self._home is not None:
            self._home.check_process()
        if self._home is not None or self._over:
            raise EngineError(self._over or "start() has been called already: use what it started")
        self._home = Home()
        self._finalizer = weakref.finalize(self, _forgotten, self.fleet, self._home)
        self._starting = asyncio.create_task(self._start())
        try:
            return await self._starting
        except BaseException as error:
            self._finalizer.detach()  # nothing runs any more
            cancelled = isinstance(error, asyncio.CancelledError)
            if cancelled and self._closing is not None and not _cancelled():
                raise EngineError("the engine has been closed while it was being started") from None
            how = "was cancelled" if cancelled else f"has failed ({error})"
            self._over = self._over or f"start() {how}: make a new AsyncLLM"
            raise

    async def _start(self) -> EngineInfo:
        info = await self.fleet.start()
        try:
            self.tokenizer = await asyncio.to_thread(
                load_tokenizer,
                Path(info.directory),
                trust_remote_code=self.config.trust_remote_code,
            )
            if self.tokenizer is not None:
                await asyncio.to_thread(self.tokenizer.warm_up)
        except BaseException:
            await self.fleet.close()
            raise
        self._validator = RequestValidator(info.spec, info.limits, self.tokenizer is not None)
        self._grammars = Grammars(info.spec, self.tokenizer)
        return info

    async def close(self) -> None:
        """End the engine processes; what is still under way fails with an EngineError.

        May be called again, before :meth:`start`, while it runs, and from another event loop; if
        the loop of start() does not run any more, the processes are killed. In a forked process
        it does nothing: the engines are the parent's.
        """
        home = self._home
        if home is not None and home.forked:
            return
        self._over = self._over or "the engine has been closed: make a new AsyncLLM"
        if home is None:
            await self.fleet.close()
        elif home.here:
            await self._close()
        elif not (home.loop.is_running() and await self._closed_there(home.loop)):
            await self.fleet.kill()

    async def _close(self) -> None:
        """Close it in its own loop, even if the caller loses patience."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close_all())
        await asyncio.shield(self._closing)

    async def _close_all(self) -> None:
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting])
        await self.fleet.close()

    async def _closed_there(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Close it from another loop; False if its own does not do it."""
        close = self._close()
        try:
            closing = asyncio.run_coroutine_threadsafe(close, loop)
        except RuntimeError:  # it has been closed meanwhile
            close.close()
            return False
        try:
            await asyncio.wait_for(asyncio.wrap_future(closing), _CLOSE_S)
        except TimeoutError:
            return False
        except asyncio.CancelledError:
            if _cancelled():
                raise
            return False  # its loop ends, and cancels all that runs there
        return True

    def _ready(self) -> RequestValidator:
        """The validator, if calls can be served here.

        Raises:
            EngineError: not started, closed, or started in another event loop or process.
        """
        if self._home is not None:
            self._home.check_process()
        if self._over:
            raise EngineError(self._over)
        if self._home is None:
            raise EngineError(_NOT_STARTED)
        self._home.check()
        if self._validator is None:
            raise EngineError("the engine is still being started: wait for await start() to return")
        return self._validator

    @property
    def info(self) -> EngineInfo:
        """The loaded engine, the smallest of several.

        Raises:
            EngineError: :meth:`start` is not through.
        """
        found = self.fleet.info
        if self._validator is None or found is None:
            raise EngineError(self._over or _NOT_STARTED)
        return found

    async def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt.

        Raises:
            TokenizerError: a text, but the checkpoint has no tokenizer.
            PromptError: neither text nor ids, or no valid Unicode text.
        """
        self._ready()
        size = len(prompt) if isinstance(prompt, str) else 0
        return await _tokenised(size, partial(prompt_ids, self.tokenizer, prompt, "the prompt"))

    async def template_row(
        self, template: Template, name: str = "template"
    ) -> tuple[list[int], Holes]:
        """Ids of a template's row, and its holes; see :func:`dllmserve.engine.filled.template_row`.

        Raises:
            TokenizerError: it has a text, but the checkpoint has no tokenizer.
            PromptError: this is no template.
        """
        self._ready()
        pieces = template if isinstance(template, Sequence) else ()
        # each text takes some time, however short it is
        size = sum(len(piece) + 32 for piece in pieces if isinstance(piece, str))
        return await _tokenised(size, partial(template_row, self.tokenizer, template, name))

    async def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        literal_contents: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Prompt ids of a conversation; see :meth:`Tokenizer.chat_ids`.

        Raises:
            TokenizerError: no tokenizer or chat template, or it refuses the messages.
            PromptError: this is no conversation, see :mod:`dllmserve.messages`.
        """
        self._ready()
        tokenizer = self._text_tokenizer()
        read = template_messages(messages)
        encode = partial(
            tokenizer.chat_ids,
            literal_contents=literal_contents,
            tools=tools,
            continue_final_message=continue_final_message,
            variables=variables,
        )
        size = sum(len(str(value)) for message in read for value in message.values())
        return await _tokenised(size + len(str(tools)), partial(encode, read))

    def check(
        self,
        prompt_ids: Sequence[int],
        sampling_params: SamplingParams | None = None,
        sparse_config: SparseConfig | None = None,
        *,
        candidates: tuple[tuple[int, ...], ...] = (),
        trace: bool = False,
        canvas: Canvas | None = None,
        holes: Holes = (),
        name: str = "prompt",
    ) -> Request:
        """A checked request, with a seed, not queued.

        With ``holes``, ``prompt_ids`` are a whole row, of which the holes are filled.

        Raises:
            InvalidRequestError, CapacityError: it could never run on this engine.
        """
        validator = self._ready()
        params = with_sparse(sampling_params or SamplingParams(), sparse_config)
        if params.seed is None:
            # so that it gives the same answer when it has to be run again
            params = replace(params, seed=secrets.randbits(63))
        asked: dict[str, Any] = {"candidates": candidates, "trace": trace}
        asked |= {"canvas": canvas, "holes": holes}
        grammars = self._grammars.of(params, holes) if self._grammars else ()
        return validator.request(0, prompt_ids, params, **asked, grammars=grammars, name=name)

    async def prepare(
        self, sampling_params: SamplingParams | None = None, holes: Holes = ()
    ) -> None:
        """Compile what an answer has to match, beside the event loop; :meth:`check` then has it.

        Raises:
            InvalidParameterError: it is no such thing, is not regular, or is too large.
        """
        self._ready()
        params = sampling_params or SamplingParams()
        if self._grammars and (params.constrained or any(hole.constraints for _, hole in holes)):
            await asyncio.to_thread(self._grammars.of, params, holes)

    def submit(
        self,
        request: Request,
        *,
        stream: bool = False,
        watch: bool = False,
        work: int | None = None,
        owner: str = "",
    ) -> Call:
        """Queue a checked request.

        Args:
            request: from :meth:`check`.
            stream, watch: what the engine is to report.
            work: what it is expected to cost; by default what it costs at most.
            owner: a short name of whose it is. Owners are served in turns, by the work done for
                each, and those with a name leave some rows and pages free for others.

        Raises:
            EngineError: the engine is gone for good, was not started, or not in this event loop.
        """
        self._ready()
        message = Submit(
            request.prompt_ids,
            request.params,
            stream,
            watch,
            owner,
            request.candidates,
            request.trace,
            request.holes,
            request.grammars,
            replace(request.canvas, ids=()) if request.candidates and not request.holes else None,
        )
        call = self.fleet.submit(message, work_of(request) if work is None else work)
        call.home = self._home
        return call

    def abort(self, call: Call, error: DllmServeError | None = None) -> None:
        """Drop a request that has not ended; it frees its place within one forward pass.

        May be called in any thread.

        Args:
            call: the request.
            error: what whoever waits for it gets; a RequestAbortedError by default.
        """
        if call.home is None or call.home.here:
            self.fleet.abort(call, error)
        elif not call.home.forked:
            call.home.call(partial(self.fleet.abort, call, error))

    async def deltas(
        self, call: Call, take: Callable[[], Awaitable[Event]] | None = None
    ) -> AsyncIterator[TextDelta]:
        """Text of a call that was submitted with ``stream=True``.

        Args:
            call: the request.
            take: gives the call's next event; ``call.next`` by default.
        """
        strings = call.submit.params.stop_strings
        text = CommittedText(self._text_tokenizer(), strings)
        count = given = reruns = 0
        held: list[TokenLogprob] = []
        wanted = call.submit.params.logprobs is not None
        while True:
            event = await (take or call.next)()
            if call.reruns != reruns:  # nothing was given out, and a new engine begins again
                reruns, count, held = call.reruns, 0, []
                text = CommittedText(self._text_tokenizer(), strings)
            if isinstance(event, Delta):
                count += len(event.token_ids)
                held += event.logprobs or []
                if piece := text.add(event.token_ids):
                    yield TextDelta(piece, count, logprobs=held if wanted else None)
                    count, given, held = 0, given + count, []
                elif not given:
                    call.hold_back()  # the beginning of a character, or of a stop string
            elif isinstance(event, RequestOutput):
                # the last step's ids come with the output
                output = event.answer
                left = output.completion_tokens - given
                rest = None if output.logprobs is None else output.logprobs[given:]
                yield TextDelta(text.finish(output.text), max(left, 0), output, rest)
                return

    def _text_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError("the checkpoint has no tokenizer: give token ids, not texts")
        return self.tokenizer


async def _tokenised(size: int, work: Callable[[], _Ids]) -> _Ids:
    """What turns a text of so many characters into ids gives, off the event loop if it is long."""
    return work() if size <= _SHORT_TEXT else await asyncio.to_thread(work)


def _cancelled() -> bool:
    """Whether somebody cancels the task that asks."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _forgotten(fleet: Fleet, home: Home) -> None:
    """An AsyncLLM is gone and was not closed: its engines must not stay."""
    if home.forked or fleet.state is State.CLOSED:
        return
    if home.loop.is_running():
        home.call(fleet.kill_at_once)
    else:
        fleet.kill_at_once()
    warnings.warn("an AsyncLLM was not closed", ResourceWarning, stacklevel=2)
