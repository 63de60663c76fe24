"""AsyncLLM: the engine, or several, in processes of their own, used from an event loop."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from dllmserve._checks import check_known
from dllmserve.config import EngineConfig
from dllmserve.core.door import Door
from dllmserve.core.request import Request
from dllmserve.core.work import work_of
from dllmserve.engine.text import CommittedText
from dllmserve.engine.tokenizer import Tokenizer, load_tokenizer
from dllmserve.errors import DllmServeError, EngineError, PromptError, TokenizerError
from dllmserve.messages import template_messages
from dllmserve.outputs import CanvasStep, RequestOutput
from dllmserve.process.calls import Call, Delta, Event
from dllmserve.process.devices import refuse_torchrun
from dllmserve.process.fleet import Fleet
from dllmserve.process.messages import EngineInfo, changed_fields
from dllmserve.process.supervisor import SupervisorOptions
from dllmserve.sampling_params import SamplingParams
from dllmserve.sparse.state import SparseConfig

#: texts up to this many characters are tokenised where they are, longer ones in a thread
_SHORT_TEXT = 4096


@dataclass(frozen=True)
class TextDelta:
    """A piece of committed text. The last one carries the output.

    Attributes:
        text: never taken back; all pieces together are the answer's text.
        tokens: ids that became committed with it.
        output: the finished request, in the last piece.
    """

    text: str
    tokens: int = 0
    output: RequestOutput | None = None


class AsyncLLM:
    """A diffusion language model in its own process, supervised.

    If the engine dies or hangs, a new one is started and requests that have given nothing
    out yet are run again, so a caller only sees that it took longer.

    Args:
        model: as for :class:`dllmserve.LLM`.
        data_parallel_size: engines, each a process with a model of its own; a request goes to
            the one with the least outstanding work. On CUDA each takes the next
            ``tensor_parallel_size`` GPUs; on a CPU they divide cores and memory.
        supervision: how the process is started and watched.
        **engine_options: any field of :class:`dllmserve.config.EngineConfig`.

    Raises:
        UnknownOptionError: (a TypeError) an unknown option, with the nearest name.
        ConfigError: (a ValueError) a bad option value, or torchrun has started this process.

    Example:
        >>> async def main():
        ...     async with AsyncLLM("tiny") as llm:
        ...         params = SamplingParams(temperature=0.0, gen_length=8, steps=8)
        ...         return await llm.generate("Hello", params)
        >>> sorted(asyncio.run(main()))  # doctest: +SKIP
        ['finish_reason', 'text', 'token_ids', 'usage']
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "tiny",
        *,
        data_parallel_size: int = 1,
        supervision: SupervisorOptions | None = None,
        **engine_options: Any,
    ) -> None:
        refuse_torchrun()
        own = ("data_parallel_size", "supervision")
        check_known("AsyncLLM", engine_options, [*own, *(f.name for f in fields(EngineConfig))])
        name = os.fspath(model) if isinstance(model, os.PathLike) else model
        self.config = EngineConfig.from_options("AsyncLLM", {"model": name, **engine_options})
        self.supervisor = Fleet(
            asdict(self.config), supervision or SupervisorOptions(), data_parallel_size
        )
        self.tokenizer: Tokenizer | None = None
        self._door: Door | None = None

    async def __aenter__(self) -> AsyncLLM:
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
        """Start the engine processes and load the model in each.

        Raises:
            ConfigError: there are not enough GPUs for all of them.
            DllmServeError: what :class:`dllmserve.LLM` raises, or a process did not start.
        """
        info = await self.supervisor.start()
        try:
            self.tokenizer = await asyncio.to_thread(
                load_tokenizer,
                Path(info.directory),
                trust_remote_code=self.config.trust_remote_code,
            )
            if self.tokenizer is not None:
                await asyncio.to_thread(self.tokenizer.warm_up)
        except BaseException:
            await self.close()
            raise
        self._door = Door(info.spec, info.limits, self.tokenizer is not None)
        return info

    async def close(self) -> None:
        """End the engine processes; what is still under way fails."""
        await self.supervisor.close()

    @property
    def info(self) -> EngineInfo:
        """The loaded engine, the smallest of several.

        Raises:
            EngineError: :meth:`start` is not through.
        """
        if self._door is None or self.supervisor.info is None:
            raise EngineError("the engine has not been started: await start() first")
        return self.supervisor.info

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        sparse_config: SparseConfig | None = None,
    ) -> dict[str, Any]:
        """Complete one prompt; many calls at once share forward passes.

        Returns:
            As one entry of :meth:`dllmserve.LLM.generate`.

        Raises:
            DllmServeError: the request is wrong, or failed. A cancelled call drops its
                request.
        """
        ids = await self.prompt_ids(prompt)
        call = self.submit(self.check(ids, sampling_params, sparse_config))
        try:
            return (await call.output()).as_dict()
        finally:
            self.abort(call)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        sparse_config: SparseConfig | None = None,
    ) -> dict[str, Any]:
        """Answer a conversation with the checkpoint's chat template; see :meth:`generate`."""
        return await self.generate(await self.chat_ids(messages), sampling_params, sparse_config)

    async def stream_text(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        sparse_config: SparseConfig | None = None,
    ) -> AsyncIterator[TextDelta]:
        """Committed text as it comes, from left to right; none of it is ever taken back."""
        ids = await self.prompt_ids(prompt)
        call = self.submit(self.check(ids, sampling_params, sparse_config), stream=True)
        try:
            async for delta in self.deltas(call):
                yield delta
        finally:
            self.abort(call)

    async def stream(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        sparse_config: SparseConfig | None = None,
    ) -> AsyncIterator[CanvasStep]:
        """Watch one answer being filled in; as :meth:`dllmserve.LLM.stream`."""
        ids = await self.prompt_ids(prompt)
        call = self.submit(self.check(ids, sampling_params, sparse_config), watch=True)
        last: CanvasStep | None = None
        try:
            while True:
                event = await call.next()
                if isinstance(event, CanvasStep):
                    if last is not None:
                        yield last
                    last = event
                elif isinstance(event, RequestOutput):
                    if last is not None:
                        yield replace(last, output=event)
                    return
        finally:
            self.abort(call)

    async def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt.

        Raises:
            TokenizerError: a text, but the checkpoint has no tokenizer.
            PromptError: neither text nor ids, or no valid Unicode text.
        """
        if isinstance(prompt, str):
            tokenizer = self._text_tokenizer()
            if len(prompt) <= _SHORT_TEXT:
                return tokenizer.encode(prompt)
            return await asyncio.to_thread(tokenizer.encode, prompt)
        if hasattr(prompt, "tolist"):  # a numpy array or a tensor
            prompt = prompt.tolist()
        if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence):
            kind = type(prompt).__name__
            raise PromptError(f"the prompt must be a text or a list of token ids, got {kind}")
        return [*prompt]

    async def chat_ids(
        self, messages: Sequence[Mapping[str, Any]], *, literal_contents: bool = False
    ) -> list[int]:
        """Prompt ids of a conversation; see :meth:`Tokenizer.encode_chat`.

        Raises:
            TokenizerError: no tokenizer or chat template, or it refuses the messages.
            PromptError: this is no conversation, see :mod:`dllmserve.messages`.
        """
        tokenizer = self._text_tokenizer()
        read = template_messages(messages)
        size = sum(len(str(value)) for message in read for value in message.values())
        if size <= _SHORT_TEXT:
            return tokenizer.encode_chat(read, literal_contents=literal_contents)
        return await asyncio.to_thread(
            tokenizer.encode_chat, read, literal_contents=literal_contents
        )

    def check(
        self,
        prompt_ids: Sequence[int],
        sampling_params: SamplingParams | None = None,
        sparse_config: SparseConfig | None = None,
        *,
        name: str = "prompt",
    ) -> Request:
        """A checked request, with a seed, not queued.

        Raises:
            InvalidRequestError, CapacityError: it could never run on this engine.
        """
        if self._door is None:
            raise EngineError("the engine has not been started: await start() first")
        params = sampling_params or SamplingParams()
        if params.seed is None:
            # so that it gives the same answer when it has to be run again
            params = replace(params, seed=secrets.randbits(63))
        return self._door.request(0, prompt_ids, params, sparse_config, name=name)

    def submit(
        self,
        request: Request,
        *,
        stream: bool = False,
        watch: bool = False,
        work: int | None = None,
    ) -> Call:
        """Queue a checked request.

        Args:
            request: from :meth:`check`.
            stream, watch: what the engine is to report.
            work: what it is expected to cost; by default what it costs at most.

        Raises:
            EngineError: the engine is gone for good.
        """
        sparse = None if request.sparse is None else changed_fields(request.sparse)
        return self.supervisor.submit(
            request.prompt_ids,
            changed_fields(request.params),
            sparse,
            stream=stream,
            watch=watch,
            work=work_of(request) if work is None else work,
        )

    def abort(self, call: Call, error: DllmServeError | None = None) -> None:
        """Drop a request that has not ended; it frees its place within one forward pass.

        Args:
            call: the request.
            error: what whoever waits for it gets; a RequestAbortedError by default.
        """
        self.supervisor.abort(call, error)

    async def deltas(
        self, call: Call, take: Callable[[], Awaitable[Event]] | None = None
    ) -> AsyncIterator[TextDelta]:
        """Text of a call that was submitted with ``stream=True``.

        Args:
            call: the request.
            take: gives the call's next event; ``call.next`` by default.
        """
        stop = call.submit.params.get("stop")
        strings = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
        text = CommittedText(self._text_tokenizer(), strings)
        count = given = reruns = 0
        while True:
            event = await (take or call.next)()
            if call.reruns != reruns:  # nothing was given out, and a new engine begins again
                reruns, count = call.reruns, 0
                text = CommittedText(self._text_tokenizer(), strings)
            if isinstance(event, Delta):
                count += len(event.token_ids)
                if piece := text.add(event.token_ids):
                    yield TextDelta(piece, count)
                    count, given = 0, given + count
                elif not given:
                    call.hold_back()  # the beginning of a character, or of a stop string
            elif isinstance(event, RequestOutput):
                # the last step's ids come with the output
                left = event.completion_tokens - given
                yield TextDelta(text.finish(event.text), max(left, 0), event)
                return

    def _text_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError("the checkpoint has no tokenizer: give token ids, not texts")
        return self.tokenizer
