"""AsyncLLM: the engine, or several, in processes of their own, used from an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dllmserve._values import SparseConfig
from dllmserve.async_engine import AsyncEngine
from dllmserve.core.likelihood import Forward
from dllmserve.core.request import Request
from dllmserve.decisions.answers import decision
from dllmserve.decisions.inputs import read_input
from dllmserve.decisions.questions import read_questions
from dllmserve.decisions.reading import How
from dllmserve.decisions.requests import Decider
from dllmserve.engine import likelihood
from dllmserve.engine.filled import Template
from dllmserve.outputs import CanvasStep, RequestOutput, TextDelta
from dllmserve.process.calls import Call
from dllmserve.sampling_params import SamplingParams


class AsyncLLM(AsyncEngine):
    """A diffusion language model in its own process, supervised.

    If the engine dies or hangs, a new one is started and requests that have given nothing
    out yet are run again, so a caller only sees that it took longer.

    Args:
        model: as for :class:`dllmserve.LLM`.
        data_parallel_size: engines, each a process with a model of its own; a request goes to
            the one with the least outstanding work. On CUDA each takes the next
            ``tensor_parallel_size`` GPUs; on a CPU they divide cores and memory.
        supervision: how the process is started and watched.
        **engine_options: any field of :class:`dllmserve.config.EngineConfig`. As for LLM,
            ``trust_remote_code=True`` is the default: a tokenizer that nothing else can load runs
            its own code, after a warning that names the file.

    Raises:
        UnknownOptionError: (a TypeError) an unknown option, with the nearest name.
        ConfigError: (a ValueError) a bad option value, or torchrun has started this process.

    Example:
        >>> async def main():
        ...     async with AsyncLLM("tiny") as llm:
        ...         params = SamplingParams(temperature=0.0, gen_length=8, steps=8)
        ...         return await llm.generate("Hello", params)
        >>> sorted(asyncio.run(main()))  # doctest: +SKIP
        ['finish_reason', 'steps', 'text', 'token_ids', 'usage']
    """

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        sparse_config: SparseConfig | None = None,
        history: bool = False,
    ) -> dict[str, Any]:
        """Complete one prompt; many calls at once share forward passes.

        Args:
            prompt: text or token ids.
            sampling_params, sparse_config, history: as in :meth:`dllmserve.LLM.generate`.

        Returns:
            As one entry of :meth:`dllmserve.LLM.generate`.

        Raises:
            DllmServeError: the request is wrong, or failed. A cancelled call drops its
                request.
        """
        ids = await self.prompt_ids(prompt)
        await self.prepare(sampling_params)
        call = self.submit(self.check(ids, sampling_params, sparse_config, trace=history))
        try:
            return (await call.output()).as_dict()
        finally:
            self.abort(call)

    async def infill(
        self, template: Template, sampling_params: SamplingParams | None = None
    ) -> dict[str, Any]:
        """Fill the holes of a template, as :meth:`dllmserve.LLM.infill`; see :meth:`generate`."""
        row, holes = await self.template_row(template)
        await self.prepare(sampling_params, holes)
        call = self.submit(self.check(row, sampling_params, holes=holes, name="template"))
        try:
            return (await call.output()).as_dict()
        finally:
            self.abort(call)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        sparse_config: SparseConfig | None = None,
        continue_final_message: bool = False,
    ) -> dict[str, Any]:
        """Answer a conversation with the checkpoint's chat template; as :meth:`dllmserve.LLM.chat`.

        See :meth:`generate`.
        """
        self._ready()
        ids = await self.chat_ids(messages, continue_final_message=continue_final_message)
        return await self.generate(ids, sampling_params, sparse_config)

    async def log_likelihood(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        answers: Sequence[str] | Sequence[Sequence[int]],
        samples: int = 128,
        seed: int = 0,
    ) -> list[float]:
        """How likely answers to prompts are; as :meth:`dllmserve.LLM.log_likelihood`."""
        validator, asked = self._ready(), (self.tokenizer, prompts, answers, samples, seed)
        found = await asyncio.to_thread(likelihood.batches, validator, *asked)

        def begin(one: Forward) -> Call:
            params, named = likelihood.scoring_params(len(one.named)), one.candidates
            ids, canvas = one.canvas.ids, one.canvas
            return self.submit(self.check(ids, params, candidates=named, canvas=canvas))

        return await likelihood.totals(found, begin, self.abort)

    async def decide(
        self,
        input: str | Sequence[Mapping[str, Any]],
        questions: Sequence[Mapping[str, Any]],
        model: str | None = None,
        *,
        reading: str = "parallel",
        orders: int = 1,
    ) -> dict[str, Any]:
        """Answer typed questions about an input; see :meth:`dllmserve.LLM.decide`."""
        given, read, how = read_input(input), read_questions(questions), How(reading, orders)

        async def outputs(requests: list[Request]) -> list[RequestOutput]:
            calls: list[Call] = []
            try:
                calls += map(self.submit, requests)
                return [await call.output() for call in calls]
            finally:
                for call in calls:
                    self.abort(call)

        decided = await self.decider.answer(given, read, how, self.check, outputs)
        return decision(model or self.config.model, read, *decided)

    @property
    def decider(self) -> Decider:
        """What :meth:`decide` works with.

        Raises:
            TokenizerError: the checkpoint has no tokenizer.
            EngineError: not started, closed, or started in another event loop or process.
        """
        validator = self._ready()
        if self._decider is None:
            self._decider = Decider(self.tokenizer, validator.spec, validator.limits)
        return self._decider

    async def stream_text(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        sparse_config: SparseConfig | None = None,
    ) -> AsyncIterator[TextDelta]:
        """Committed text as it comes, from left to right; none of it is ever taken back."""
        ids = await self.prompt_ids(prompt)
        await self.prepare(sampling_params)
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
        await self.prepare(sampling_params)
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
